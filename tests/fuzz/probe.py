"""``python -m tests.fuzz.probe PIDS``: asks every gateway for its health, as a load balancer would,
and says how long each answer took.

A machine that many share makes everybody wait. So two more things are measured at the same moment:
how long the gateway's main thread waited for a CPU, and how long a server that does nothing took to
answer. What the gateway took beyond the longer of these is its own.
"""

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

EVERY_S = 0.2
LIMIT_S = 1.0
PATIENCE_S = 30.0


def main() -> None:
    pids = Path(sys.argv[1])
    with _control() as control:
        print(json.dumps({"event": "probe_ready"}), flush=True)
        while True:
            began = time.monotonic()
            for url, pid in json.loads(pids.read_text()).items():
                print(json.dumps(_measure(url, pid, control)), flush=True)
            time.sleep(max(0.0, EVERY_S - (time.monotonic() - began)))


def _measure(url: str, pid: int, control: str) -> dict[str, object]:
    """One answer: seconds in all, of which ``own_s`` are the gateway's."""
    control_before_s, _ = _ask(control)
    waited_before_s = _waited_s(pid)
    took_s, status = _ask(url)
    waited_s = _waited_s(pid) - waited_before_s
    control_s = max(control_before_s, _ask(control)[0])
    return {
        "event": "probed",
        "at": time.time(),
        "url": url,
        "pid": pid,
        "status": status,
        "took_s": round(took_s, 4),
        "cpu_wait_s": round(waited_s, 4),
        "control_s": round(control_s, 4),
        "own_s": round(max(0.0, took_s - max(waited_s, control_s)), 4),
    }


def _ask(url: str) -> tuple[float, int]:
    """Seconds, and the status of ``/healthz``; 0 if there was none."""
    where = urlsplit(url)
    began = time.monotonic()
    status = 0
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=PATIENCE_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    return time.monotonic() - began, status


def _waited_s(pid: int) -> float:
    """How long the process's main thread has been ready to run without a CPU, since it began."""
    try:
        nanoseconds = int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0  # it has died
    return nanoseconds / 1e9


@contextlib.contextmanager
def _control() -> Iterator[str]:
    """The URL of a server that does nothing, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    serving = multiprocessing.Process(target=_serve, args=(theirs,), daemon=True)
    serving.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        serving.terminate()


def _serve(port: "multiprocessing.connection.Connection") -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
