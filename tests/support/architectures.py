"""GGUFs of other architectures: tiny, with random weights."""

from pathlib import Path

import gguf
import numpy

from tests.support.tiny_model import copy_tokenizer

WIDTH, INNER, STATES, RANK, KERNEL, LAYERS = 32, 64, 8, 4, 4, 2
HEADS, HIDDEN, HYBRID_LAYERS = 4, 64, 4
WINDOW, WINDOW_LAYERS = 64, 6


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


def write_hybrid(path: Path) -> Path:
    """LFM2: convolutions, whose state cannot be rewound, and attention in turn."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(HYBRID_LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, HEADS] * (HYBRID_LAYERS // 2))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_shortconv_l_cache(3)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int, kind: type = numpy.float16) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(kind))

    def add_norm(name: str, width: int = WIDTH) -> None:
        writer.add_tensor(name, numpy.ones(width, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, WIDTH)
    add_norm("token_embd_norm.weight")
    for layer in range(HYBRID_LAYERS):
        block = f"blk.{layer}."
        add_norm(block + "attn_norm.weight")
        add_norm(block + "ffn_norm.weight")
        add(block + "ffn_gate.weight", HIDDEN, WIDTH)
        add(block + "ffn_up.weight", HIDDEN, WIDTH)
        add(block + "ffn_down.weight", WIDTH, HIDDEN)
        if layer % 2:
            add_norm(block + "attn_q_norm.weight", WIDTH // HEADS)
            add_norm(block + "attn_k_norm.weight", WIDTH // HEADS)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                add(f"{block}{name}.weight", WIDTH, WIDTH)
        else:
            add(block + "shortconv.conv.weight", WIDTH, 3, kind=numpy.float32)
            add(block + "shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            add(block + "shortconv.out_proj.weight", WIDTH, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_windowed(path: Path) -> Path:
    """Gemma 3: five layers see the last `WINDOW` tokens, the sixth sees all."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "gemma3")
    head = WIDTH // HEADS
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(WINDOW_LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(WINDOW)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(numpy.float16))

    def add_norm(name: str, width: int = WIDTH) -> None:
        writer.add_tensor(name, numpy.ones(width, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, WIDTH)
    add_norm("output_norm.weight")
    for layer in range(WINDOW_LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add_norm(f"{block}{name}.weight")
        for name in ("attn_q_norm", "attn_k_norm"):
            add_norm(f"{block}{name}.weight", head)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}{name}.weight", WIDTH, WIDTH)
        add(block + "ffn_gate.weight", HIDDEN, WIDTH)
        add(block + "ffn_up.weight", HIDDEN, WIDTH)
        add(block + "ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
