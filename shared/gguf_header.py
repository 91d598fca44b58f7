"""What the header of a GGUF file says of the model, and whether the file is whole.
It is read within bounds, since any file may be given."""

import math
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

TENSOR_TYPES = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    9: (32, 40),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
    40: (64, 36),
    41: (128, 18),
}
"""Numbers of a block, and its bytes, for llama.cpp's types of tensors."""

MAX_DIMENSIONS = 4
ALIGNMENT = 32
"""Of the tensors in the file, unless it says another (`general.alignment`)."""

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


class Damaged(NotReadable):
    """What is wrong with the file."""

    def __init__(self, why: str | None = None) -> None:
        super().__init__("damaged" if why is None else f"damaged: {why}")


def read_header(
    path: Path, time_limit_s: float = TIME_LIMIT_S, size_bytes: int | None = None
) -> Header:
    """The header of the file; given up after ``time_limit_s``. If ``path`` is only the beginning of
    the file, ``size_bytes`` is the size of the whole.

    Raises:
        Damaged: it cannot be a whole GGUF file.
        NotReadable: it is not a GGUF file, or cannot be opened.
    """
    try:
        if not path.is_file():
            raise NotReadable("not a file")
        with path.open("rb", BUFFER_BYTES) as file:
            whole_bytes = path.stat().st_size if size_bytes is None else size_bytes
            return _Reader(file, whole_bytes, time_limit_s).header()
    except OSError as error:
        raise NotReadable(error.strerror or "cannot be read") from None


class _Reader:
    def __init__(self, file: BinaryIO, size_bytes: int, time_limit_s: float) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._bytes_left = MAX_HEADER_BYTES
        self._give_up_at = time.monotonic() + time_limit_s

    def header(self) -> Header:
        if self._read(len(MAGIC)) != MAGIC:
            raise NotReadable("not a GGUF file")
        if self._number("I") not in VERSIONS:
            raise NotReadable("unknown version of GGUF")
        tensors, fields = self._number("Q"), self._number("Q")
        if fields > MAX_FIELDS:
            raise Damaged
        known: dict[str, int | str | None] = {}
        for _ in range(fields):
            name = self._text()
            known[name] = self._value()
        self._check_tensors(tensors, known.get("general.alignment"))
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

    def _check_tensors(self, count: int, alignment: int | str | None) -> None:
        """Raises: Damaged: the file ends before its last tensor."""
        end = 0
        for _ in range(count):
            self._text()
            dimensions = self._number("I")
            if dimensions > MAX_DIMENSIONS:
                raise Damaged
            numbers = math.prod(self._number("Q") for _ in range(dimensions))
            # A type that is not known yet has a size that is not known.
            block, block_bytes = TENSOR_TYPES.get(self._number("I"), (1, 0))
            end = max(end, self._number("Q") + numbers // block * block_bytes)
        unit = alignment if isinstance(alignment, int) and alignment > 0 else ALIGNMENT
        start = -(-self._file.tell() // unit) * unit
        if count and start + end > self._size_bytes:
            raise Damaged("it ends before its last tensor; download it again")

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
            raise Damaged
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
            raise Damaged("it ends in the middle of its header; download it again")
        return data


def _format(kind: int) -> str:
    try:
        return NUMBERS[kind]
    except KeyError:
        raise Damaged from None
