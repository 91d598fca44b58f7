"""Queries for lists of jobs, as they come in a URL."""

from collections.abc import Iterable
from typing import Any

import msgspec

from services.gateway.validation.wording import invalid_body
from shared.errors import InvalidRequest
from shared.wire.listing import JobQuery

METADATA = "metadata."
NAMES = [name for name in JobQuery.__struct_fields__ if name != "metadata"]


def parse_query(parameters: Iterable[tuple[str, str]]) -> JobQuery:
    """The query in the parameters of a URL: states are separated by commas, and members of metadata
    are ``metadata.<name>``.

    Raises:
        InvalidRequest: with the name of the invalid parameter.
    """
    given: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name, value in parameters:
        if name.startswith(METADATA):
            into, member = metadata, name.removeprefix(METADATA)
        elif name in NAMES:
            into, member = given, name
        else:
            raise InvalidRequest(
                f"{name[:80]} is not a parameter of this list; give {', '.join(NAMES)} or "
                f"{METADATA}<name>",
                name[:80],
            )
        if member in into:
            raise InvalidRequest(f"{name[:80]} is given twice", name[:80])
        into[member] = value
    if "state" in given:
        given["state"] = given["state"].split(",")
    if metadata:
        given["metadata"] = metadata
    try:
        query = msgspec.convert(given, JobQuery, strict=False)
        for name in given:
            if getattr(query, name) is None:
                # "null", which would be no filter. As text it is no value either: that says which.
                msgspec.convert({name: given[name]}, JobQuery)
        return query
    except msgspec.ValidationError as error:
        invalid = invalid_body(error, JobQuery)
        if (param := invalid.param or "").startswith("state"):  # one of several
            raise InvalidRequest(invalid.message.replace(param, "state", 1), "state") from None
        raise invalid from None
