"""A tiny model that calls a tool when it is asked something, and answers when it has the result."""

from pathlib import Path

import gguf
import numpy

from shared.model_files import locate
from tests.support.families import FAMILIES, FIRST_UNUSED, TEMPLATE, TOKENS, TYPES
from tests.support.gguf_fields import read_fields
from tests.support.tiny_model import CONTEXT, copy_tokenizer

ANSWER = "rain"
WIDTH, HEADS = 64, 2
CERTAINTY = 4.0
"""Of what comes next, times `WIDTH`, in logits; of other tokens, about 0."""
END = "<|im_end|>"
ASKED, TOLD = "<|asked|>", "<|told|>"
"""What its prompts end with: a question, or a tool's result."""
NEXT = {ASKED: "<tool_call>", "</tool_call>": END, TOLD: ANSWER, ANSWER: END}
"""What it writes after each token; a grammar decides in between."""


def write_caller(path: Path) -> Path:
    """Qwen's syntax. The weights of its layer are 0, so only the last token counts for the next."""
    family = FAMILIES["qwen"]
    template = family.template.partition("{% if add_generation_prompt %}")[0] + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        f"{{% if messages[-1].role == 'tool' %}}{TOLD}{{% else %}}{ASKED}{{% endif %}}{{% endif %}}"
    )
    fields = read_fields(locate("smollm2"))
    vocabulary, types = list(fields[TOKENS].value), list(fields[TYPES].value)
    new = [(text, gguf.TokenType.CONTROL) for text in (ASKED, TOLD)]
    new += [(text, gguf.TokenType.USER_DEFINED) for text in family.shown]
    for at, (text, kind) in enumerate(new, FIRST_UNUSED):
        vocabulary[at], types[at] = text, kind

    random = numpy.random.default_rng(7)
    embeddings = random.choice([-1.0, 1.0], (len(vocabulary), WIDTH)).astype(numpy.float32)
    output = numpy.zeros_like(embeddings)
    for last, following in NEXT.items():
        output[vocabulary.index(following)] += CERTAINTY * embeddings[vocabulary.index(last)]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("caller")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    copy_tokenizer(writer, chat=True)
    for name, value in ((TOKENS, vocabulary), (TYPES, types), (TEMPLATE, template)):
        writer.kv_data[0][name].value = value
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output.weight", output)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(WIDTH, dtype=numpy.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        zeros = numpy.zeros((WIDTH, WIDTH), dtype=numpy.float32)
        writer.add_tensor(f"blk.0.{name}.weight", zeros)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
