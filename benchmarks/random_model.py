"""A model of a realistic size with random weights: how fast it is does not depend on their values.

.venv/bin/python -m benchmarks.random_model 8b q4_0 FILE
"""

import sys
from pathlib import Path

import gguf
import numpy
from gguf.gguf_writer import GGUFValue
from msgspec import Struct

from benchmarks.measuring import arguments
from shared.model_files import locate
from tests.support.gguf_fields import read_fields

Bytes = numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]


class Shape(Struct, frozen=True):
    """The sizes of a Llama."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int = 128_256
    context: int = 131_072
    ties_embeddings: bool = False
    """Whether the output has the same weights."""


SHAPES = {
    "1b": Shape(2048, 16, 32, 8, 8192, ties_embeddings=True),
    "8b": Shape(4096, 32, 32, 8, 14_336),
    "tiny": Shape(256, 2, 4, 1, 512, vocabulary=49_152),
}
"""Those of Llama 3.2 1B and Llama 3.1 8B, and one for a trial."""
FORMATS = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
NORMED = ("attn", "ffn")
DEVIATION = 0.02
"""Of the weights, about."""
POOL_BYTES = 2**26
"""Of different weights, which the tensors repeat."""
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


def write_random_model(path: Path, shape: Shape, format: str) -> Path:
    """Write a Llama of ``shape`` to ``path``, all matrices in ``format``, a key of `FORMATS`. It
    has the bundled model's tokenizer and template, and made-up tokens up to the size of the
    vocabulary."""
    kind = FORMATS[format]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(500_000)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{format.upper()}"])
    for name, field in _tokenizer_fields(shape.vocabulary).items():
        writer.add_key_value(name, field.value, field.type, sub_type=field.sub_type)
    matrices = _matrices(shape)
    sizes: dict[str, int] = {}
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in range(shape.layers) for name in NORMED]
    for name in ("output_norm.weight", *norms):
        writer.add_tensor_info(name, [shape.width], numpy.dtype("float32"), 4 * shape.width)
    for name, (rows, columns) in matrices.items():
        row_bytes = gguf.quant_shape_to_byte_shape((columns,), kind)[0]
        sizes[name] = rows * row_bytes
        writer.add_tensor_info(
            name, [rows, row_bytes], numpy.dtype("uint8"), sizes[name], raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in range(1 + len(norms)):
        writer.write_tensor_data(numpy.ones(shape.width, dtype=numpy.float32))
    pool = _pool(format)
    for size in sizes.values():
        writer.write_tensor_data(numpy.resize(pool, size))
    writer.close()
    return path


def _matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Rows and columns by name."""
    kv_width = shape.width // shape.heads * shape.kv_heads
    found = {"token_embd.weight": (shape.vocabulary, shape.width)}
    if not shape.ties_embeddings:
        found["output.weight"] = (shape.vocabulary, shape.width)
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("attn_q", shape.width, shape.width),
            ("attn_k", kv_width, shape.width),
            ("attn_v", kv_width, shape.width),
            ("attn_output", shape.width, shape.width),
            ("ffn_gate", shape.hidden, shape.width),
            ("ffn_up", shape.hidden, shape.width),
            ("ffn_down", shape.width, shape.hidden),
        ):
            found[f"blk.{layer}.{name}.weight"] = (rows, columns)
    return found


def _pool(format: str) -> Bytes:
    """Random weights. A block of a quantized format is a scale and 32 integers of 8 or 4 bits."""
    random = numpy.random.default_rng(7)
    if format == "f16":
        values = random.standard_normal(POOL_BYTES // 2, dtype=numpy.float32) * DEVIATION
        return values.astype(numpy.float16).view(numpy.uint8)
    size, spread = (32, 74.0) if format == "q8_0" else (16, 4.6)
    blocks = random.integers(0, 256, (POOL_BYTES // (2 + size), 2 + size), dtype=numpy.uint8)
    blocks[:, :2] = numpy.array([DEVIATION / spread], dtype=numpy.float16).view(numpy.uint8)
    return blocks.reshape(-1)


def _tokenizer_fields(vocabulary: int) -> dict[str, GGUFValue]:
    fields = read_fields(locate("smollm2"))
    found = {name: field for name, field in fields.items() if name.startswith("tokenizer.")}
    missing = vocabulary - len(found[TOKENS].value)
    found[TOKENS].value.extend(f"Ġx{number}" for number in range(missing))
    found[TOKEN_TYPES].value.extend([int(gguf.TokenType.NORMAL)] * missing)
    return found


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    write_random_model(options.file, SHAPES[options.shape], options.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
