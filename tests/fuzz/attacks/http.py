"""HTTP that no client would send."""

from urllib.parse import quote

from hypothesis import strategies as st

from shared.job_ids import new_job_id
from tests.fuzz.attacks.attack import attack
from tests.fuzz.inputs.heads import conversations
from tests.fuzz.target import Fault, Target
from tests.support.wire import exchange, statuses

SILENCE_S = 0.3

ROUTES = (
    *(
        ("GET", "/status/{}"),
        ("GET", "/jobs/{}/events"),
        ("DELETE", "/jobs/{}"),
        ("GET", "/dead/{}"),
    ),
    *(("POST", "/dead/{}/retry"), ("DELETE", "/dead/{}"), ("GET", "/v1/models/{}"), ("GET", "/{}")),
    *(("GET", "/dead?limit={}"), ("GET", "/dead?before={}"), ("GET", "/queue?{}"), ("PUT", "/{}")),
)
NAMES = ("Prefer", "Idempotency-Key", "Last-Event-ID", "X-Request-Id", "Content-Type", "Origin")


@attack(conversations(), count=30)
def bytes_over_http(target: Target, pieces: list[bytes]) -> None:
    """Whatever comes is answered or hung up on, and never with a crash."""
    answer = exchange(target.url, pieces, SILENCE_S)
    if 500 in statuses(answer):
        raise Fault("HTTP 500", answer[:1_000].decode("latin-1"))


@attack(
    st.tuples(
        st.sampled_from(ROUTES),
        st.one_of(st.text(max_size=40), st.integers().map(str), st.builds(new_job_id)),
        st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=60), max_size=3),
        st.booleans(),
    ),
    count=30,
)
def routes(target: Target, case: tuple[tuple[str, str], str, dict[str, bytes], bool]) -> None:
    """Odd ids, parameters and headers on every route."""
    (method, path), part, headers, quoted = case
    try:
        written = quote(part, safe="").encode() if quoted else part.encode("latin-1")
    except UnicodeEncodeError:
        written = quote(part).encode()
    lines = [f"{name}: ".encode() + value for name, value in headers.items()]
    first = method.encode() + b" " + path.encode().replace(b"{}", written) + b" HTTP/1.1"
    sent = b"\r\n".join([first, b"Host: 127.0.0.1", b"Connection: close", *lines, b"", b""])
    answer = exchange(target.url, [sent], SILENCE_S)
    if 500 in statuses(answer):
        raise Fault("HTTP 500", answer[:1_000].decode("latin-1"))
