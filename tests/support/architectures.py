"""GGUFs of models that are not the usual kind: tiny, with random weights."""

from pathlib import Path

import gguf
import numpy

from tests.support.tiny_model import copy_tokenizer, write_tiny_model

WIDTH, INNER, STATES, RANK, KERNEL, LAYERS = 32, 64, 8, 4, 4, 2


def write_mamba(path: Path) -> Path:
    """A state-space model: no attention, so no heads."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATES)
    writer.add_ssm_time_step_rank(RANK)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int, kind: type = numpy.float16) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(kind))

    def fill(name: str, value: float, *shape: int) -> None:
        writer.add_tensor(name, numpy.full(shape, value, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, WIDTH)
    fill("output_norm.weight", 1, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        fill(block + "attn_norm.weight", 1, WIDTH)
        add(block + "ssm_in.weight", 2 * INNER, WIDTH)
        add(block + "ssm_conv1d.weight", INNER, KERNEL, kind=numpy.float32)
        fill(block + "ssm_conv1d.bias", 0, INNER)
        add(block + "ssm_x.weight", RANK + 2 * STATES, INNER)
        add(block + "ssm_dt.weight", INNER, RANK)
        fill(block + "ssm_dt.bias", 0, INNER)
        fill(block + "ssm_a", -1, INNER, STATES)
        fill(block + "ssm_d", 1, INNER)
        add(block + "ssm_out.weight", WIDTH, INNER)
    _finish(writer)
    return path


def write_changed(path: Path, changes: dict[str, object], *, tokenizer: bool = True) -> Path:
    """The tiny model with other metadata, and without its tokenizer unless ``tokenizer``."""
    source = gguf.GGUFReader(write_tiny_model(path.with_suffix(".usual")))
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name in changes or name == "general.architecture":
            continue
        if name.startswith("tokenizer.") and not tokenizer:
            continue
        element = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    for name, value in changes.items():
        usual = gguf.GGUFValueType.get_type(value)
        unsigned = gguf.GGUFValueType.UINT32
        writer.add_key_value(name, value, unsigned if type(value) is int else usual)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    _finish(writer)
    return path


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
