"""Types of fields that several messages have. Times are RFC 3339 strings of fixed width
(`shared/timestamps.py`), durations milliseconds."""

from typing import Annotated

from msgspec import Meta, Raw

from shared.timestamps import parse_timestamp

Count = Annotated[int, Meta(ge=0, le=2**53)]
"""Integers that a double represents exactly."""
AtLeastOne = Annotated[int, Meta(ge=1, le=2**53)]
SmallInt = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Milliseconds = Annotated[float, Meta(ge=-1e12, le=1e12)]
"""Sluice writes no negative ones, but other software can publish them."""
TokensPerS = Annotated[float, Meta(ge=0, le=1e12)]
JobId = Annotated[str, Meta(min_length=1, max_length=256)]
InfererId = Annotated[str, Meta(min_length=1, max_length=256)]
"""A part of subjects, whose length the broker bounds."""
Metadata = Annotated[
    Raw,
    Meta(
        description="Any object, 16 kB at most. It is returned with the status of the job.",
        extra_json_schema={"type": "object"},
    ),
]
"""Passed on as bytes and never decoded: 4 MB of ``[[],[],…]`` would become 100 MB of objects."""


NO_METADATA = Raw(b"null")


def check_times(*times: str | None) -> None:
    """Raises: ValueError: one that is given is not a time."""
    for text in times:
        if text is not None:
            parse_timestamp(text)
