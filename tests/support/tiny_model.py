"""A real GGUF that loads and runs in milliseconds: random weights, a real tokenizer."""

from pathlib import Path

import gguf
import numpy

from shared.model_files import locate

WIDTH, LAYERS, HEADS, HIDDEN, CONTEXT = 32, 2, 4, 64, 8192


def write_tiny_model(
    path: Path,
    *,
    chat: bool = True,
    seed: int = 7,
    template: str | None = None,
    pre_tokenizer: str | None = None,
    longrope_from: int | None = None,
) -> Path:
    """Write a two-layer llama with the bundled model's tokenizer, and its template if ``chat``;
    with ``template`` in its place, where there is one; ``pre_tokenizer`` is how llama.cpp splits
    words before it tokenizes them; in a context of more than ``longrope_from`` tokens it computes
    with other factors."""
    random = numpy.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    vocabulary = copy_tokenizer(writer, chat, template)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape) * 0.3
        writer.add_tensor(name, values.astype(numpy.float16))

    if longrope_from is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(longrope_from)
        for which, factor in (("long", 8), ("short", 1)):
            factors = numpy.full(WIDTH // HEADS // 2, factor, dtype=numpy.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, numpy.ones(WIDTH, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, WIDTH)
    add_norm("output_norm.weight")
    for layer in range(LAYERS):
        add_norm(f"blk.{layer}.attn_norm.weight")
        add_norm(f"blk.{layer}.ffn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN)
    if pre_tokenizer is not None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = pre_tokenizer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy_tokenizer(writer: gguf.GGUFWriter, chat: bool, template: str | None = None) -> int:
    """Copy every tokenizer field of the bundled model; the size of its vocabulary."""
    source = gguf.GGUFReader(locate("smollm2"))
    size = 0
    for name, field in source.fields.items():
        if not name.startswith("tokenizer."):
            continue
        if name == "tokenizer.chat_template" and not chat:
            continue
        value, kinds = field.contents(), field.types
        if name == "tokenizer.chat_template" and template is not None:
            value = template
        if name == "tokenizer.ggml.tokens":
            size = len(value)
        element = kinds[1] if len(kinds) > 1 else None
        writer.add_key_value(name, value, kinds[0], sub_type=element)
    return size
