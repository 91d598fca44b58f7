"""A LoRA adapter as a real GGUF: small random matrices."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy
from gguf.gguf_writer import GGUFValue

from tests.support.tiny_model import LAYERS, WIDTH

RANK = 4


def write_lora(
    path: Path,
    *,
    seed: int = 1,
    width: int = WIDTH,
    layers: int = LAYERS,
    architecture: str = "llama",
    scale: float = 0.3,
    depth: int = 1,
    metadata: Mapping[str, GGUFValue] | None = None,
) -> Path:
    """Write an adapter for the queries and the outputs of each layer's attention, which are square
    in the models of `write_tiny_model`. ``scale`` is how large its numbers are. ``metadata`` adds
    fields or replaces them. With a ``depth`` above 1 the matrices have a third dimension, which
    llama.cpp does not check."""
    random = numpy.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(RANK))
    writer.kv_data[0].update(metadata or {})
    for layer in range(layers):
        for name in ("attn_q", "attn_output"):
            for part, shape in (("a", (RANK, width)), ("b", (width, RANK))):
                values = random.standard_normal(shape if depth == 1 else (depth, *shape)) * scale
                writer.add_tensor(
                    f"blk.{layer}.{name}.weight.lora_{part}", values.astype(numpy.float32)
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
