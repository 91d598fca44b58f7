"""One GGUF model in llama.cpp: loading, tokens to bytes, text to tokens, chat to prompt."""

import ctypes
import re
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from services.inferer.engine.adapters import load_adapters
from services.inferer.engine.chat import Chat, ChatPrompt
from services.inferer.engine.control_tokens import ControlToken, ControlTokens, Prompt
from services.inferer.engine.grammar import Vocabulary
from services.inferer.engine.library import gpus, load_backends
from services.inferer.engine.native_log import first_problem, forget_problems, keep_problems
from services.inferer.engine.sampling_defaults import read_sampling_defaults
from services.inferer.settings import SplitMode
from shared.answers.marks import format_of, marks
from shared.errors import InvalidRequest, ModelError, PromptTooLong, SettingsError
from shared.logs import logger
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.requests import ModelRequest, Task

LARGEST_DEFAULT_CONTEXT = 4096
ORIGINAL_CONTEXT = "rope.scaling.original_context_length"
PIECE_BYTES = 256
LONGEST_TEXT = 1_000_000
"""Characters. Tokenizing so many, all of one kind, took 305 MiB of stack and 480 MiB in all."""
CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
"""What llama.cpp finds in a text only if it is to parse control tokens."""
USER_DEFINED = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
CONTROL_TEXT = re.compile(r"<\|.+\|>", re.DOTALL)
"""Of a control token, whatever its attributes are. Others that are user-defined, such as runs of
spaces and ``<think>``, occur in texts."""
LEFT_STRIP, RIGHT_STRIP = llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP, llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP
NO_POOLING = ("", "0", "-1")
"""A GGUF's ``pooling_type`` if the model generates text: missing, none, unspecified."""
POOLS_MEAN, POOLS_FIRST, POOLS_LAST, RANKS = "1", "2", "3", "4"
TASK_OF_POOLING: dict[str, Task] = {
    **dict.fromkeys((POOLS_MEAN, POOLS_FIRST, POOLS_LAST), "embed"),
    RANKS: "rerank",
}
LOSSLESS_VOCABULARIES = (
    llama_cpp.LLAMA_VOCAB_TYPE_SPM,
    llama_cpp.LLAMA_VOCAB_TYPE_BPE,
)
SPLIT_MODES: dict[SplitMode, int] = {
    "layer": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "row": llama_cpp.LLAMA_SPLIT_MODE_ROW,
    "none": llama_cpp.LLAMA_SPLIT_MODE_NONE,
}
ALL_LAYERS = -1
NO_GPU = (
    "llama.cpp finds no GPU; compile it for the one that this machine has, as docs/how-to/gpu.md "
    "says"
)

log = logger()


class Model:
    """A loaded model. Its methods may be called from any thread; they do not run inference."""

    def __init__(
        self,
        path: Path,
        gpu_layers: int,
        *,
        split_mode: SplitMode = "layer",
        main_gpu: int = 0,
        extra_buffers: bool = True,
        chat: bool = True,
        adapters: Path | None = None,
    ) -> None:
        """Load the file at ``path``; ``gpu_layers`` of -1 means all, if there is a GPU. How
        several GPUs share them: see `InfererSettings`.

        Without ``extra_buffers`` llama.cpp leaves the weights as they are in the file, and does not
        use AMX or other code that needs them rearranged. Without ``chat`` the chat template is not
        loaded, which takes a separate process. ``adapters`` is a folder of LoRA adapters.

        Raises:
            ModelError: llama.cpp cannot load the model, or it is of no kind that is supported.
            SettingsError: this machine does not have that GPU, or an adapter cannot be used.
        """
        keep_problems()
        load_backends()
        llama_cpp.llama_backend_init()
        _require_gpus(gpus(), gpu_layers, split_mode, main_gpu)
        started = time.perf_counter()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        parameters.split_mode = SPLIT_MODES[split_mode]
        parameters.main_gpu = main_gpu
        parameters.use_extra_bufts = extra_buffers
        forget_problems()
        self.handle = llama_cpp.llama_model_load_from_file(bytes(path), parameters)
        if not self.handle:
            reason = first_problem()
            raise ModelError(f"llama.cpp cannot load the model {path}: {reason}")
        if not llama_cpp.llama_model_has_decoder(self.handle) or llama_cpp.llama_model_has_encoder(
            self.handle
        ):
            raise ModelError(
                f"the model {path} has an encoder and a decoder, which is not supported; choose "
                "one with a decoder only, or one for embeddings"
            )
        self.path = path
        self.gpu_layers = self._layers_on_gpus(gpu_layers)
        self.vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self._pooled = self._pooled_task()
        self.trained_context = int(llama_cpp.llama_model_n_ctx_train(self.handle))
        self.sampling_defaults = read_sampling_defaults(self._metadata)
        self.adapters = self._load_adapters(adapters) if adapters else {}
        """llama.cpp's handles by name."""
        self._bos_token = self._text_of(llama_cpp.llama_vocab_bos(self.vocab))
        self.vocabulary = Vocabulary(self)
        self.suppressed = self._suppressed_tokens()
        """The tokens that must never be generated, as the GGUF says."""
        self.chat = self._load_chat() if chat and self.generates_text else None
        self._pieces: dict[int, bytes | None] = {}
        self._control_ids: dict[str, int | None] = {}
        self.load_ms = (time.perf_counter() - started) * 1000

    def close(self) -> None:
        if self.chat is not None:
            self.chat.close()
        self.vocabulary.close()
        llama_cpp.llama_model_free(self.handle)

    def _pooled_task(self) -> Task | None:
        """What it does if it makes one output of each input; None if it generates text.

        Raises:
            ModelError: it does neither, or has no tokenizer.
        """
        if llama_cpp.llama_vocab_type(self.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise ModelError(
                f"the model {self.path} has no tokenizer; convert it again, together with the "
                "tokenizer's files"
            )
        pooling = self._architecture_field("pooling_type")
        if pooling in TASK_OF_POOLING:
            return TASK_OF_POOLING[pooling]
        if not self._is_causal:
            raise ModelError(
                f"the model {self.path} does not generate text from left to right (diffusion "
                "models do not), and does not say how it makes one embedding of those of all "
                "tokens (pooling_type); choose one that does"
            )
        if pooling not in NO_POOLING:
            raise ModelError(
                f"the model {self.path} has a pooling_type that Sluice does not know, {pooling}; "
                "choose another one"
            )
        return None

    @property
    def tasks(self) -> list[Task]:
        """What it can do."""
        if self._pooled is not None:
            return [self._pooled]
        return ["chat", "complete"] if self.chat else ["complete"]

    @property
    def generates_text(self) -> bool:
        return self._pooled is None

    @property
    def dimensions(self) -> int:
        """Of its embeddings; 0 if it computes none."""
        return self.output_width if self._pooled == "embed" else 0

    @property
    def output_width(self) -> int:
        """How many numbers it makes of an input, if it makes one output of each."""
        if self._pooled == "rerank":
            return int(llama_cpp.llama_model_n_cls_out(self.handle))
        return int(llama_cpp.llama_model_n_embd_out(self.handle))

    @property
    def can_compute_in_parts(self) -> bool:
        """Whether an input may be computed in several batches: a token sees only those before it,
        and the output is that of the last one."""
        pools = self._architecture_field("pooling_type")
        pools_last = pools == POOLS_LAST or (
            pools == RANKS and self._architecture_field("classifier.pooling_type") != POOLS_MEAN
        )
        return pools_last and self._is_causal

    @property
    def _is_causal(self) -> bool:
        return self._architecture_field("attention.causal") != "false"

    def _architecture_field(self, key: str) -> str:
        return self._metadata(f"{self._metadata('general.architecture')}.{key}")

    @property
    def quantization(self) -> str:
        """The type of most of its weights, as llama.cpp names it: ``Q4_1``, ``Q4_K - Medium``."""
        buffer = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self.handle, buffer, len(buffer))
        architecture_size_type = buffer.value.decode("utf-8", "replace").split(" ", 2)
        return architecture_size_type[-1].removeprefix("(guessed) ")

    @property
    def is_recurrent(self) -> bool:
        """Whether part of its memory cannot be truncated: Mamba, RWKV, hybrids such as LFM2."""
        return bool(
            llama_cpp.llama_model_is_recurrent(self.handle)
            or llama_cpp.llama_model_is_hybrid(self.handle)
        )

    def _layers_on_gpus(self, wanted: int) -> int:
        """llama.cpp counts the output as one more layer."""
        if gpus() == 0:
            return 0
        most = int(llama_cpp.llama_model_n_layer(self.handle)) + 1
        return most if wanted == ALL_LAYERS else min(wanted, most)

    @property
    def window(self) -> int:
        """The size of its sliding window in tokens; 0 if it has none. llama.cpp may store other
        tokens in place of those that have left it."""
        return int(llama_cpp.llama_model_n_swa(self.handle))

    @property
    def has_original_context(self) -> bool:
        """Whether it computes differently beyond the context that it was originally trained for."""
        return bool(self._architecture_field(ORIGINAL_CONTEXT))

    def _metadata(self, key: str) -> str:
        """A field of the GGUF as text; empty if it is missing."""
        buffer = ctypes.create_string_buffer(128)
        length = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else ""

    def _suppressed_tokens(self) -> frozenset[int]:
        """Raises: ModelError: those are all tokens."""
        count = ctypes.c_int32()
        tokens = llama_cpp.llama_vocab_get_suppress_tokens(self.vocab, ctypes.byref(count))
        found = frozenset(tokens[: count.value])
        if len(found) == self.vocabulary.size:
            raise ModelError(
                f"the model {self.path} suppresses all its tokens (tokenizer.ggml.suppress_tokens);"
                " convert it again"
            )
        return found

    def longest_token_bytes(self) -> int:
        """The length of the longest token; 0 for tokenizers that may drop part of a text."""
        if llama_cpp.llama_vocab_type(self.vocab) not in LOSSLESS_VOCABULARIES:
            return 0
        return max(
            len(llama_cpp.llama_vocab_get_text(self.vocab, token) or b"")
            for token in range(self.vocabulary.size)
        )

    def context_size(self, n_ctx: int) -> int:
        """Tokens of context for a job: ``n_ctx``, or if 0 what the model was trained for, at most
        4096."""
        return n_ctx or min(self.trained_context, LARGEST_DEFAULT_CONTEXT)

    def piece(self, token: int) -> bytes | None:
        """The bytes that ``token`` adds to a text, empty for control tokens; None if it ends it."""
        try:
            return self._pieces[token]
        except KeyError:
            ends = llama_cpp.llama_vocab_is_eog(self.vocab, token)
            piece = self._pieces[token] = None if ends else self.read_piece(token)
            return piece

    def tokenize_prompt(self, prompt: Prompt) -> list[int]:
        """Raises: PromptTooLong: see `tokenize`."""
        _require_short(sum(len(piece.text) for piece in prompt.pieces))
        if len(prompt.pieces) == 1:
            (only,) = prompt.pieces
            return self.tokenize(only.text, prompt.add_special, only.has_control)
        tokens: list[int] = []
        if prompt.add_special and llama_cpp.llama_vocab_get_add_bos(self.vocab):
            tokens.append(int(llama_cpp.llama_vocab_bos(self.vocab)))
        for text, has_control in prompt.pieces:
            tokens += self.tokenize(text, add_special=False, parse_special=has_control)
        return tokens

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Tokens of ``text``. With ``parse_special``, it may contain the model's control tokens.

        ``add_special`` adds the tokens that the model expects at the beginning.

        Raises:
            PromptTooLong: the text has more than `LONGEST_TEXT` characters.
        """
        _require_short(len(text))
        data = text.encode("utf-8")
        capacity = len(data) + 8
        tokens = (llama_cpp.llama_token * capacity)()
        count = llama_cpp.llama_tokenize(
            self.vocab, data, len(data), tokens, capacity, add_special, parse_special
        )
        if count < 0:
            raise ModelError("llama.cpp cannot tokenize the prompt")
        return list(tokens[:count])

    def chat_prompt(
        self, request: ModelRequest, cancelled: threading.Event | None = None
    ) -> ChatPrompt:
        """The prompt that the model's template renders from a conversation. Takes up to `RENDER_S`
        seconds.

        Raises:
            InvalidRequest: the model has no template, or its template refuses the conversation.
            Cancelled: ``cancelled`` was set.
        """
        if self.chat is None:
            raise InvalidRequest(
                "this model has no chat template in its GGUF; send `prompt` instead of `messages`",
                "messages",
            )
        _require_short(sum(map(len, request.prompt_texts)))
        written = self.chat.prompt(request, cancelled or threading.Event())
        prompt = written.prompt
        begin = prompt.pieces[0].text if prompt.pieces else ""
        has_bos = self._bos_token != "" and begin.startswith(self._bos_token)
        return written._replace(prompt=prompt._replace(add_special=not has_bos))

    def answer_format(self, request: ModelRequest) -> AnswerFormat:
        """How the answer to ``request`` is written."""
        return format_of(request, self.chat.format if self.chat else PLAIN)

    def shown_tokens(self, format: AnswerFormat) -> dict[int, bytes]:
        """The control tokens that separate the parts of such an answer, with their text, which
        `piece` leaves out."""
        tokens = {mark: self.control_token(mark) for mark in marks(format)}
        return {token: mark.encode() for mark, token in tokens.items() if token is not None}

    def control_token(self, text: str) -> int | None:
        """The token that is written ``text``, if it is one that adds nothing to an answer."""
        if text not in self._control_ids:
            found = self.tokenize(text, add_special=False)
            is_one = len(found) == 1 and self.read_piece(found[0]) == b""
            self._control_ids[text] = found[0] if is_one else None
        return self._control_ids[text]

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """Its control tokens. The first use takes some tenths of a second."""
        found: dict[str, ControlToken] = {}
        for token in range(self.vocabulary.size):
            attributes = llama_cpp.llama_vocab_get_attr(self.vocab, token)
            if not attributes & (CONTROL | USER_DEFINED):
                continue
            text = self._text_of(token)
            # gpt-oss: llama.cpp changes some of its control tokens, to show them in answers.
            is_always_found = not attributes & CONTROL
            if not is_always_found or CONTROL_TEXT.fullmatch(text):
                found[text] = ControlToken(
                    bool(attributes & LEFT_STRIP), bool(attributes & RIGHT_STRIP), is_always_found
                )
        return ControlTokens(found)

    def _load_adapters(self, folder: Path) -> dict[str, Any]:
        """Raises: SettingsError: the model takes none, or one of them cannot be used."""
        if not self.generates_text:
            raise SettingsError(
                f"INFERER_ADAPTERS={folder}: adapters work only with models that generate text; "
                "unset it for this one"
            )
        return load_adapters(self.handle, folder)

    def _load_chat(self) -> Chat | None:
        template = llama_cpp.llama_model_chat_template(self.handle, None)
        if not template:
            return None
        try:
            return Chat(
                template.decode("utf-8"),
                self._bos_token,
                self._text_of(llama_cpp.llama_vocab_eos(self.vocab)),
                self.control_tokens,
            )
        except (OSError, ValueError, InvalidRequest, ModelError) as error:
            log.warning("chat_template_unusable", error=str(error))
            return None

    def _text_of(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace")

    def read_piece(self, token: int, capacity: int = PIECE_BYTES) -> bytes:
        """The bytes of ``token``'s text, empty for control tokens."""
        buffer = ctypes.create_string_buffer(capacity)
        length = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, capacity, 0, False)
        return self.read_piece(token, -length) if length < 0 else buffer.raw[:length]


def _require_short(characters: int) -> None:
    """Raises: PromptTooLong: a prompt has too many characters."""
    if characters > LONGEST_TEXT:
        raise PromptTooLong(
            f"the prompt has {characters} characters, more than {LONGEST_TEXT}; send less"
        )


def _require_gpus(count: int, layers: int, split_mode: SplitMode, main_gpu: int) -> None:
    """llama.cpp itself ignores layers for a GPU that it does not have.

    Raises:
        SettingsError: the settings need other GPUs than the ``count`` that there are.
    """
    if count == 0:
        if layers > 0:
            raise SettingsError(f"INFERER_GPU_LAYERS={layers}: {NO_GPU}, or set 0")
        if main_gpu > 0 or split_mode != "layer":
            name, value = ("MAIN_GPU", main_gpu) if main_gpu else ("SPLIT_MODE", split_mode)
            raise SettingsError(f"INFERER_{name}={value}: {NO_GPU}, or do not set it")
    elif main_gpu >= count:
        raise SettingsError(
            f"INFERER_MAIN_GPU={main_gpu}: llama.cpp finds {count} GPUs; choose 0 to {count - 1}"
        )
    elif main_gpu > 0 and split_mode != "none":
        raise SettingsError(
            f"INFERER_MAIN_GPU={main_gpu} has no effect with INFERER_SPLIT_MODE={split_mode}; set "
            "INFERER_SPLIT_MODE=none"
        )
