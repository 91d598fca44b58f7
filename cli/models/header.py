"""What the header of a GGUF file says of the model, read within bounds: any file may be given."""

import struct
import time
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""Those of vocabularies with 262,144 tokens take up to 20 MB."""
MAX_FIELDS = 65_536
TIME_LIMIT_S = 5.0
MAX_NAME_BYTES = 64 * 1024
"""Of a field, or of a text that is kept."""

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BUFFER_BYTES = 1024 * 1024

STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Types of values, as `struct` writes them."""

FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
}
"""llama.cpp's numbers for the type of most weights (`general.file_type`)."""

GUESSED = 1024
"""Added to a file type that the converter did not know for sure."""

MODEL = "model"
MAX_KIND_CHARS = 32
PROJECTOR_ARCHITECTURE = "clip"


class Header(Struct, frozen=True):
    kind: str = MODEL
    """``model``, or what else the file holds: ``adapter``, ``mmproj`` (a projector for images)."""
    quantization: str | None = None
    """The type of most weights; None if the file does not say."""
    n_ctx: int | None = None
    """Tokens of context that the model was trained for; None if the file does not say."""
    chat: bool = False
    """Whether it has a chat template."""


class NotReadable(Exception):
    """Why the header cannot be read."""


def read_header(path: Path, time_limit_s: float = TIME_LIMIT_S) -> Header:
    """The header of the file, or of the beginning of one; given up after ``time_limit_s``.

    Raises:
        NotReadable: it is not a GGUF file, damaged, or cannot be opened.
    """
    try:
        if not path.is_file():
            raise NotReadable("not a file")
        with path.open("rb", BUFFER_BYTES) as file:
            return _Reader(file, time_limit_s).header()
    except OSError as error:
        raise NotReadable(error.strerror or "cannot be read") from None


class _Reader:
    def __init__(self, file: BinaryIO, time_limit_s: float) -> None:
        self._file = file
        self._bytes_left = MAX_HEADER_BYTES
        self._give_up_at = time.monotonic() + time_limit_s

    def header(self) -> Header:
        if self._read(len(MAGIC)) != MAGIC:
            raise NotReadable("not a GGUF file")
        if self._number("I") not in VERSIONS:
            raise NotReadable("unknown version of GGUF")
        _tensors, fields = self._number("Q"), self._number("Q")
        if fields > MAX_FIELDS:
            raise NotReadable("damaged")
        known: dict[str, int | str | None] = {}
        for _ in range(fields):
            name = self._text()
            known[name] = self._value()
        file_type = known.get("general.file_type")
        architecture = known.get("general.architecture")
        usual = "mmproj" if architecture == PROJECTOR_ARCHITECTURE else MODEL
        n_ctx = known.get(f"{architecture}.context_length")
        return Header(
            str(known.get("general.type") or usual)[:MAX_KIND_CHARS],
            FILE_TYPES.get(file_type % GUESSED) if isinstance(file_type, int) else None,
            n_ctx if isinstance(n_ctx, int) else None,
            "tokenizer.chat_template" in known,
        )

    def _value(self) -> int | str | None:
        """A whole number or a short text; None for all else."""
        kind = self._number("I")
        if kind == STRING:
            length = self._number("Q")
            if length <= MAX_NAME_BYTES:
                return self._read(length).decode("utf-8", "replace")
            self._skip(length)
            return None
        if kind == ARRAY:
            self._skip_array()
            return None
        value = self._number(_format(kind))
        return value if type(value) is int else None

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if kind != STRING:
            self._skip(count * struct.calcsize(f"<{_format(kind)}"))
        else:
            for _ in range(count):
                self._skip(self._number("Q"))

    def _text(self) -> str:
        length = self._number("Q")
        if length > MAX_NAME_BYTES:
            raise NotReadable("damaged")
        return self._read(length).decode("utf-8", "replace")

    def _number(self, format: str) -> int:
        """Or another type that ``format`` stands for."""
        size = struct.calcsize(f"<{format}")
        value: int = struct.unpack(f"<{format}", self._read(size))[0]
        return value

    def _skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._read(min(count, BUFFER_BYTES)))

    def _read(self, count: int) -> bytes:
        self._bytes_left -= count
        if self._bytes_left < 0 or time.monotonic() > self._give_up_at:
            raise NotReadable("the header is too long")
        data = self._file.read(count)
        if len(data) < count:
            raise NotReadable("damaged: it ends in the middle of its header")
        return data


def _format(kind: int) -> str:
    try:
        return NUMBERS[kind]
    except KeyError:
        raise NotReadable("damaged") from None
