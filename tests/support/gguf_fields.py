"""The fields of a GGUF file. The reader of the package `gguf` takes seconds for a vocabulary."""

import struct
from pathlib import Path
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

NUMBERS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
LONGEST_HEAD_BYTES = 16 * 1024 * 1024


def read_fields(path: Path) -> dict[str, GGUFValue]:
    """All fields by their names, as the package's writer takes them."""
    with path.open("rb") as file:
        head = _Head(file.read(LONGEST_HEAD_BYTES))
    magic, _version, _tensors, fields = head.unpack("<4sIQQ")
    assert magic == b"GGUF"
    return dict(head.field() for _ in range(fields))


class _Head:
    """The beginning of a file, and how far it is read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def unpack(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(format, self._data, self._at)
        self._at += struct.calcsize(format)
        return values

    def field(self) -> tuple[str, GGUFValue]:
        name = self._value(GGUFValueType.STRING)
        kind = self._kind()
        if kind is not GGUFValueType.ARRAY:
            return name, GGUFValue(self._value(kind), kind)
        element = self._kind()
        (count,) = self.unpack("<Q")
        return name, GGUFValue([self._value(element) for _ in range(count)], kind, element)

    def _kind(self) -> GGUFValueType:
        return GGUFValueType(*self.unpack("<I"))

    def _value(self, kind: GGUFValueType) -> Any:
        if kind is not GGUFValueType.STRING:
            return self.unpack(NUMBERS[kind])[0]
        (length,) = self.unpack("<Q")
        return self.unpack(f"<{length}s")[0].decode()
