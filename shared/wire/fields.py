"""Types of fields that several messages have. Times are RFC 3339 strings of fixed width
(`shared/timestamps.py`), durations milliseconds."""

from typing import Annotated

from msgspec import Meta, Raw

from shared.timestamps import parse_timestamp

Count = Annotated[int, Meta(ge=0, le=2**53)]
"""What a double holds exactly."""
SmallInt = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Milliseconds = Annotated[float, Meta(ge=-1e12, le=1e12)]
"""Some are the difference of two hosts' clocks, and may be negative."""
TokensPerS = Annotated[float, Meta(ge=0, le=1e12)]
JobId = Annotated[str, Meta(min_length=1, max_length=256)]
InfererId = Annotated[str, Meta(min_length=1, max_length=256)]
"""A part of subjects, whose length the broker bounds."""
Metadata = Annotated[
    Raw,
    Meta(
        description="An object of the caller's own, of 16 kB at most.",
        extra_json_schema={"type": "object"},
    ),
]
"""It travels as bytes, and nothing of ours reads it: 4 MB of ``[[],[],…]`` would be 100 MB of
objects wherever they were decoded."""


NO_METADATA = Raw(b"null")


def check_times(*times: str | None) -> None:
    """Raises: ValueError: one that is given is not a time."""
    for text in times:
        if text is not None:
            parse_timestamp(text)
