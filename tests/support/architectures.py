"""GGUFs of other architectures: tiny, with random weights."""

from pathlib import Path

import gguf
import numpy

from tests.support.tiny_model import copy_tokenizer

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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
