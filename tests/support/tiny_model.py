"""A real GGUF that loads and runs in milliseconds: random weights, a real tokenizer."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import gguf
import numpy
from gguf.gguf_writer import GGUFValue

from shared.model_files import locate
from tests.support.gguf_fields import read_fields

UINT32 = gguf.GGUFValueType.UINT32
WIDTH, LAYERS, HEADS, HIDDEN, CONTEXT = 32, 2, 4, 64, 8192


def write_tiny_model(
    path: Path,
    *,
    chat: bool = True,
    seed: int = 7,
    width: int = WIDTH,
    tokenizer: bool = True,
    metadata: Mapping[str, object] | None = None,
    longrope_from: int | None = None,
    tensors_per_part: int = 0,
) -> Path:
    """Write a two-layer llama with the bundled model's tokenizer, unless ``tokenizer`` is false,
    and its template if ``chat``. Each of its 4 heads has a fourth of ``width``. ``metadata`` adds
    fields or replaces their values. In a context of more than ``longrope_from`` tokens it computes
    with other factors. With ``tensors_per_part``, it is split into parts beside ``path``."""
    random = numpy.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_part)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // HEADS)
    vocabulary = copy_tokenizer(writer, chat)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape) * 0.3
        writer.add_tensor(name, values.astype(numpy.float16))

    if longrope_from is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(longrope_from)
        for which, factor in (("long", 8), ("short", 1)):
            factors = numpy.full(width // HEADS // 2, factor, dtype=numpy.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, numpy.ones(width, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, width)
    add_norm("output_norm.weight")
    for layer in range(LAYERS):
        add_norm(f"blk.{layer}.attn_norm.weight")
        add_norm(f"blk.{layer}.ffn_norm.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", width, width)
        add(f"blk.{layer}.ffn_gate.weight", HIDDEN, width)
        add(f"blk.{layer}.ffn_up.weight", HIDDEN, width)
        add(f"blk.{layer}.ffn_down.weight", width, HIDDEN)
    fields = writer.kv_data[0]
    if not tokenizer:
        for name in _tokenizer_fields():
            fields.pop(name, None)
    for name, value in (metadata or {}).items():
        usual = UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        kind = fields[name].type if name in fields else usual
        fields[name] = GGUFValue(value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy_tokenizer(writer: gguf.GGUFWriter, chat: bool) -> int:
    """Copy every tokenizer field of the bundled model; the size of its vocabulary."""
    fields = _tokenizer_fields()
    for name, field in fields.items():
        if chat or name != "tokenizer.chat_template":
            writer.add_key_value(name, field.value, field.type, sub_type=field.sub_type)
    return len(fields["tokenizer.ggml.tokens"].value)


@cache
def _tokenizer_fields() -> dict[str, GGUFValue]:
    """Those of the bundled model."""
    fields = read_fields(locate("smollm2"))
    return {name: field for name, field in fields.items() if name.startswith("tokenizer.")}
