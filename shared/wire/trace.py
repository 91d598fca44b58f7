"""W3C trace context: passed on unchanged from a request to all that is stored of its job."""

from collections.abc import Mapping

from shared.wire.subjects import HEADER_TRACEPARENT, HEADER_TRACESTATE

LONGEST = {HEADER_TRACEPARENT: 128, HEADER_TRACESTATE: 1024}
"""Characters. The standard asks for 55 in a ``traceparent``, more in later versions, and for at
least 512 in a ``tracestate``."""

Trace = Mapping[str, str]
"""The headers that a job's messages carry; empty where the request had none."""

NO_TRACE: Trace = {}


def trace_of(headers: Mapping[str, str] | None) -> dict[str, str]:
    """What ``headers`` say of the trace, whatever the case of their names. A ``tracestate`` without
    a ``traceparent`` means nothing, and what cannot be a header of a message is left out."""
    given = {name.lower(): value for name, value in (headers or {}).items()}
    trace = {
        name: value
        for name, longest in LONGEST.items()
        if (value := given.get(name))
        and len(value) <= longest
        and value.isascii()
        and value.isprintable()
    }
    return trace if HEADER_TRACEPARENT in trace else {}
