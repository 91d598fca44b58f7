"""What `sluice models` reads of a GGUF file: any file may be there."""

import os
import struct
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import gguf_header as header
from shared.gguf_header import FILE_TYPES, Damaged, Header, NotReadable, read_header

U32, STRING, ARRAY, U64, U8 = 4, 8, 9, 10, 0


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def head(*fields: bytes, count: int | None = None, version: int = 3) -> bytes:
    number = len(fields) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, 0, number) + b"".join(fields)


ARCHITECTURE = field(b"general.architecture", STRING, text(b"llama"))
TEXTS = field(b"a", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"b") + text(b""))
CONTEXT = field(b"llama.context_length", U32, struct.pack("<I", 4096))


def test_the_models_of_the_tests_are_read(tiny_model: Path, tiny_base_model: Path) -> None:
    """As the converters write them; these do not say their quantization."""
    assert read_header(tiny_model) == Header(n_ctx=8192, chat=True)
    assert read_header(tiny_base_model) == Header(n_ctx=8192, chat=False)


def test_file_types_are_those_of_llama_cpp() -> None:
    """By its own names."""
    known = {
        kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in gguf.LlamaFileType
    }
    assert known.pop(header.GUESSED) == "GUESSED"
    assert known == FILE_TYPES


def test_tensor_types_are_those_of_llama_cpp() -> None:
    """By their numbers, with their sizes."""
    known = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert known == header.TENSOR_TYPES


def test_a_file_that_ends_before_its_last_tensor_is_damaged(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The last byte of the last tensor is needed; the padding after it is not."""
    whole = tiny_model.read_bytes()
    last = max(gguf.GGUFReader(tiny_model).tensors, key=lambda tensor: tensor.data_offset)
    end = int(last.data_offset + last.n_bytes)
    file = tmp_path / "m.gguf"
    file.write_bytes(whole[:end])
    assert read_header(file) == read_header(tiny_model)
    for size in (end - 1, len(whole) * 4 // 5):
        file.write_bytes(whole[:size])
        with pytest.raises(Damaged, match="ends before its last tensor"):
            read_header(file)
    assert read_header(file, size_bytes=len(whole)) == read_header(tiny_model)


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ([ARCHITECTURE, CONTEXT], Header(n_ctx=4096)),
        ([CONTEXT, ARCHITECTURE], Header(n_ctx=4096)),
        ([CONTEXT], Header()),
        ([field(b"general.file_type", U32, struct.pack("<I", 15))], Header("model", "Q4_K_M")),
        ([field(b"general.file_type", U32, struct.pack("<I", 1024 + 1))], Header("model", "F16")),
        ([field(b"general.file_type", U32, struct.pack("<I", 999))], Header()),
        ([field(b"general.file_type", STRING, text(b"15"))], Header()),
        ([field(b"tokenizer.chat_template", STRING, text(b"x" * 100_000))], Header(chat=True)),
        ([field(b"general.type", STRING, text(b"adapter"))], Header("adapter")),
        ([field(b"general.architecture", STRING, text(b"clip"))], Header("mmproj")),
        ([TEXTS, ARCHITECTURE, CONTEXT], Header(n_ctx=4096)),
    ],
)  # fmt: skip
def test_fields_are_read(tmp_path: Path, fields: list[bytes], meant: Header) -> None:
    """In any order; of another type than expected they are not used."""
    file = tmp_path / "m.gguf"
    file.write_bytes(head(*fields))
    assert read_header(file) == meant


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a GGUF file|in the middle"),
        (b"PK\x03\x04", "not a GGUF file"),
        (b"GGUF", "in the middle"),
        (head(version=1), "version"),
        (head(version=0x03000000), "version"),
        (head(ARCHITECTURE)[:-1], "in the middle"),
        (head(count=2**63), "damaged"),
        (head(count=2**16), "in the middle"),
        (head(text(b"x" * 70_000)), "damaged"),
        (head(struct.pack("<Q", 2**63)), "damaged"),
        (head(field(b"a", 77, b"")), "damaged"),
        (head(field(b"a", STRING, struct.pack("<Q", 2**63))), "in the middle|too long"),
        (head(field(b"a", ARRAY, struct.pack("<IQ", U64, 2**63))), "in the middle|too long"),
        (head(field(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1))), "damaged"),
        (head(field(b"a", ARRAY, struct.pack("<IQ", STRING, 2**63)), bytes(1000)), "in the middle"),
    ],
)  # fmt: skip
def test_a_damaged_header_has_a_reason(tmp_path: Path, content: bytes, why: str) -> None:
    """And no exception of another kind, and no memory for what it promises."""
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(NotReadable, match=why):
        read_header(file)


def test_a_header_of_terabytes_is_given_up(tmp_path: Path) -> None:
    """After a bound of bytes, also if they are there; strings without a byte, after a time."""
    file = tmp_path / "m.gguf"
    for kind in (U8, STRING):
        file.write_bytes(head(field(b"a", ARRAY, struct.pack("<IQ", kind, 2**40))))
        os.truncate(file, 2**40)  # the rest takes no room on the disk, and reads as zeros
        with pytest.raises(NotReadable, match="too long"):
            read_header(file, time_limit_s=1.0)


def test_what_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would never be read to its end."""
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(NotReadable, match="not a file"):
        read_header(tmp_path / "m.gguf")
    with pytest.raises(NotReadable, match="not a file"):
        read_header(tmp_path / "missing.gguf")


@given(cut=st.integers(0, 400), at=st.integers(0, 399), byte=st.integers(0, 255))
def test_any_bytes_are_a_header_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, byte: int
) -> None:
    """Nothing else is raised, whatever is changed."""
    content = bytearray(head(ARCHITECTURE, CONTEXT, *[field(b"a", STRING, text(b"b"))] * 12))
    content[at % len(content)] = byte
    file = tmp_path_factory.getbasetemp() / "changed.gguf"
    file.write_bytes(content[:cut] if cut < 300 else content)
    with suppress(NotReadable):
        read_header(file)
