"""GGUFs of models that make one output of each input: tiny, with random weights."""

from pathlib import Path

import gguf
import numpy

from tests.support.tiny_model import copy_tokenizer

WIDTH, LAYERS, HEADS, HIDDEN = 32, 2, 4, 64
CONTEXT = 512
SCALE = 0.05
RANK_TEMPLATE = "<|im_start|>Find: {query}\nText: {document}<|im_end|>"


class _Writer:
    """A file and its tensors; weights are random, norms 1, biases 0."""

    def __init__(self, path: Path, architecture: str, pooling: gguf.PoolingType) -> None:
        self.random = numpy.random.default_rng(7)
        self.file = gguf.GGUFWriter(path, architecture)
        self.file.add_context_length(CONTEXT)
        self.file.add_embedding_length(WIDTH)
        self.file.add_block_count(LAYERS)
        self.file.add_feed_forward_length(HIDDEN)
        self.file.add_head_count(HEADS)
        self.file.add_head_count_kv(HEADS)
        self.file.add_pooling_type(pooling)
        self.vocabulary = copy_tokenizer(self.file, chat=False)

    def add(self, name: str, *shape: int, scale: float = SCALE) -> None:
        values = self.random.standard_normal(shape) * scale
        self.file.add_tensor(f"{name}.weight", values.astype(numpy.float32))

    def add_layer(self, name: str, *shape: int) -> None:
        self.add(name, *shape)
        self.file.add_tensor(f"{name}.bias", numpy.zeros(shape[0], dtype=numpy.float32))

    def add_norm(self, name: str, size: int = WIDTH, *, bias: bool = True) -> None:
        self.file.add_tensor(f"{name}.weight", numpy.ones(size, dtype=numpy.float32))
        if bias:
            self.file.add_tensor(f"{name}.bias", numpy.zeros(size, dtype=numpy.float32))

    def close(self) -> None:
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()


def write_bert(path: Path, pooling: gguf.PoolingType, *, causal: bool = False) -> Path:
    """A model that sees all tokens of an input of up to `CONTEXT` at once, and makes one embedding
    of them; or a score, by a head of its own, if it pools to rank. ``causal``: it says that it does
    not."""
    writer = _Writer(path, "bert", pooling)
    writer.file.add_layer_norm_eps(1e-5)
    writer.file.add_causal_attention(causal)
    writer.file.add_uint32("tokenizer.ggml.token_type_count", 2)
    writer.add("token_embd", writer.vocabulary, WIDTH)
    writer.add("token_types", 2, WIDTH)
    writer.add("position_embd", CONTEXT, WIDTH)
    writer.add_norm("token_embd_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_layer(block + name, WIDTH, WIDTH)
        for name in ("attn_output_norm", "layer_output_norm"):
            writer.add_norm(block + name)
        writer.add_layer(block + "ffn_up", HIDDEN, WIDTH)
        writer.add_layer(block + "ffn_down", WIDTH, HIDDEN)
    if pooling is gguf.PoolingType.RANK:
        writer.add_layer("cls", WIDTH, WIDTH)
        writer.add_layer("cls.output", 1, WIDTH)
    writer.close()
    return path


def write_qwen3_reranker(path: Path) -> Path:
    """A decoder that says yes or no to a query with a document, which it gets in
    `RANK_TEMPLATE`."""
    writer = _Writer(path, "qwen3", gguf.PoolingType.RANK)
    head = WIDTH // HEADS
    writer.file.add_layer_norm_rms_eps(1e-6)
    writer.file.add_key_length(head)
    writer.file.add_value_length(head)
    writer.file.add_rope_dimension_count(head)
    writer.file.add_classifier_output_labels(["yes", "no"])
    writer.file.add_string("tokenizer.chat_template.rerank", RANK_TEMPLATE)
    writer.add("token_embd", writer.vocabulary, WIDTH)
    writer.add_norm("output_norm", bias=False)
    writer.add("cls.output", 2, WIDTH, scale=1)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            writer.add_norm(block + name, bias=False)
        for name in ("attn_q_norm", "attn_k_norm"):
            writer.add_norm(block + name, head, bias=False)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add(block + name, WIDTH, WIDTH)
        writer.add(block + "ffn_gate", HIDDEN, WIDTH)
        writer.add(block + "ffn_up", HIDDEN, WIDTH)
        writer.add(block + "ffn_down", WIDTH, HIDDEN)
    writer.close()
    return path
