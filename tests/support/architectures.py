"""GGUFs of other architectures: tiny, with random weights."""

from pathlib import Path

import gguf
import numpy

from tests.support.tiny_model import copy_tokenizer

WIDTH, STATES, RANK, KERNEL, LAYERS = 32, 8, 4, 4, 2
HEADS, HIDDEN, HYBRID_LAYERS = 4, 64, 4
WINDOW, WINDOW_LAYERS = 64, 6


def write_mamba(path: Path, *, width: int = WIDTH, states: int = STATES) -> Path:
    """A state-space model: no attention, so no heads. Each layer keeps 2 ``width`` times
    ``states`` numbers."""
    inner = 2 * width
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(states)
    writer.add_ssm_time_step_rank(RANK)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int, kind: type = numpy.float16) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(kind))

    def fill(name: str, value: float, *shape: int) -> None:
        writer.add_tensor(name, numpy.full(shape, value, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, width)
    fill("output_norm.weight", 1, width)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        fill(block + "attn_norm.weight", 1, width)
        add(block + "ssm_in.weight", 2 * inner, width)
        add(block + "ssm_conv1d.weight", inner, KERNEL, kind=numpy.float32)
        fill(block + "ssm_conv1d.bias", 0, inner)
        add(block + "ssm_x.weight", RANK + 2 * states, inner)
        add(block + "ssm_dt.weight", inner, RANK)
        fill(block + "ssm_dt.bias", 0, inner)
        fill(block + "ssm_a", -1, inner, states)
        fill(block + "ssm_d", 1, inner)
        add(block + "ssm_out.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_rwkv(path: Path) -> Path:
    """RWKV 6: no attention either, and matrices as state."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "rwkv6")
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(WIDTH // HEADS)
    writer.add_time_mix_extra_dim(RANK)
    writer.add_time_decay_extra_dim(RANK)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int, kind: type = numpy.float16) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(kind))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(WIDTH, dtype=numpy.float32))
        writer.add_tensor(f"{name}.bias", numpy.zeros(WIDTH, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, WIDTH)
    add("output.weight", vocabulary, WIDTH)
    add_norm("token_embd_norm")
    add_norm("output_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            add_norm(block + name)
        add(block + "time_mix_w1.weight", 5 * RANK, WIDTH)
        add(block + "time_mix_w2.weight", 5, WIDTH, RANK)
        add(block + "time_mix_lerp_fused.weight", 5, 1, 1, WIDTH, kind=numpy.float32)
        for name in ("time_mix_lerp_x", "channel_mix_lerp_k", "channel_mix_lerp_r"):
            add(f"{block}{name}.weight", 1, 1, WIDTH, kind=numpy.float32)
        add(block + "time_mix_first.weight", HEADS, WIDTH // HEADS, kind=numpy.float32)
        add(block + "time_mix_decay.weight", WIDTH, kind=numpy.float32)
        add(block + "time_mix_decay_w1.weight", RANK, WIDTH)
        add(block + "time_mix_decay_w2.weight", WIDTH, RANK)
        for name in ("key", "value", "receptance", "gate", "output"):
            add(f"{block}time_mix_{name}.weight", WIDTH, WIDTH)
        add(block + "channel_mix_key.weight", HIDDEN, WIDTH)
        add(block + "channel_mix_value.weight", WIDTH, HIDDEN)
        add(block + "channel_mix_receptance.weight", WIDTH, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_hybrid(path: Path, *, width: int = WIDTH) -> Path:
    """LFM2: convolutions, whose state cannot be rewound, and attention in turn."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(HYBRID_LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, HEADS] * (HYBRID_LAYERS // 2))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_shortconv_l_cache(3)
    writer.add_rope_dimension_count(width // HEADS)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int, kind: type = numpy.float16) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(kind))

    def add_norm(name: str, size: int = width) -> None:
        writer.add_tensor(name, numpy.ones(size, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, width)
    add_norm("token_embd_norm.weight")
    for layer in range(HYBRID_LAYERS):
        block = f"blk.{layer}."
        add_norm(block + "attn_norm.weight")
        add_norm(block + "ffn_norm.weight")
        add(block + "ffn_gate.weight", HIDDEN, width)
        add(block + "ffn_up.weight", HIDDEN, width)
        add(block + "ffn_down.weight", width, HIDDEN)
        if layer % 2:
            add_norm(block + "attn_q_norm.weight", width // HEADS)
            add_norm(block + "attn_k_norm.weight", width // HEADS)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                add(f"{block}{name}.weight", width, width)
        else:
            add(block + "shortconv.conv.weight", width, 3, kind=numpy.float32)
            add(block + "shortconv.in_proj.weight", 3 * width, width)
            add(block + "shortconv.out_proj.weight", width, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_windowed(path: Path, *, width: int = WIDTH, original_context: int | None = None) -> Path:
    """Gemma 3: five layers see the last `WINDOW` tokens, the sixth sees all. With
    ``original_context`` each sequence has memory of its own."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "gemma3")
    head = width // HEADS
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(WINDOW_LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(WINDOW)
    if original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(original_context)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(numpy.float16))

    def add_norm(name: str, size: int = width) -> None:
        writer.add_tensor(name, numpy.ones(size, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, width)
    add_norm("output_norm.weight")
    for layer in range(WINDOW_LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add_norm(f"{block}{name}.weight")
        for name in ("attn_q_norm", "attn_k_norm"):
            add_norm(f"{block}{name}.weight", head)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}{name}.weight", width, width)
        add(block + "ffn_gate.weight", HIDDEN, width)
        add(block + "ffn_up.weight", HIDDEN, width)
        add(block + "ffn_down.weight", width, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
