"""A stand-in for the Hugging Face hub: the part of its HTTP interface that models are read with."""

import json
import threading
from contextlib import suppress
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from msgspec import Struct

from tests.support.processes import clean_environment

BLOCK_BYTES = 256 * 1024


class HubRequest(Struct):
    """A request that was received, and how many bytes of a body were sent for it."""

    method: str
    path: str
    range: str
    authorization: str
    sent: int = 0


class Hub:
    """Repositories with files. As on the real hub, a file is on another host, to which the token
    must not be sent, and its ETag is its SHA-256."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.token: str | None = None
        """Required for everything, if there is one."""
        self.requests: list[HubRequest] = []
        self.page: bytes | None = None
        """What everything is answered with, if it is not a hub."""
        self.break_after: int | None = None
        """The next body ends after so many bytes: the connection is closed."""
        self.hang_after: int | None = None
        """The next body pauses after so many bytes, until the hub ends."""
        self.hangs = threading.Event()
        """A body pauses."""
        self._ended = threading.Event()
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.files_url = f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo: str, **files: bytes) -> None:
        self.repositories[repo] = files

    def commit(self, repo: str) -> str:
        """Changes with the files."""
        files = self.repositories[repo]
        contents = [(name, sha256(data).digest()) for name, data in files.items()]
        return sha1(repr(contents).encode()).hexdigest()

    def bodies(self) -> list[HubRequest]:
        """The requests for contents of files."""
        return [one for one in self.requests if one.method == "GET" and "/contents/" in one.path]

    def wait_for_end(self) -> None:
        self._ended.wait()


def hub_environment(cache: Path, url: str, **more: str) -> dict[str, str]:
    """For a process that uses the hub at ``url`` and nothing else."""
    ours = {
        name: value
        for name, value in clean_environment().items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    return {
        **ours,
        "HF_HOME": str(cache),
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.served
        noted = HubRequest(
            self.command,
            self.path,
            self.headers.get("Range", ""),
            self.headers.get("Authorization", ""),
        )
        hub.requests.append(noted)
        path = self.path.partition("?")[0]
        if hub.page is not None:
            return self._send(200, {"Content-Type": "text/html"}, hub.page)
        if path.startswith("/contents/"):
            return self._send_contents(noted, path.removeprefix("/contents/"))
        if hub.token is not None and noted.authorization != f"Bearer {hub.token}":
            return self._send(401, {"X-Error-Message": "Invalid username or password."})
        if path.startswith("/api/models/"):
            return self._send_listing(path.removeprefix("/api/models/"))
        repo, _, rest = path[1:].partition("/resolve/")
        return self._redirect(repo, rest.partition("/")[2])

    def _send_listing(self, repo: str) -> None:
        files = self.served.repositories.get(repo)
        if files is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        body = {
            "_id": "1",
            "id": repo,
            "sha": self.served.commit(repo),
            "siblings": [{"rfilename": name} for name in files],
        }
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _redirect(self, repo: str, file: str) -> None:
        data = self.served.repositories.get(repo, {}).get(file)
        if data is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        etag = sha256(data).hexdigest()
        return self._send(
            302,
            {
                "Location": f"{self.served.files_url}/contents/{etag}",
                "X-Repo-Commit": self.served.commit(repo),
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(len(data)),
            },
        )

    def _send_contents(self, noted: HubRequest, etag: str) -> None:
        hub = self.served
        data = next(
            data
            for files in hub.repositories.values()
            for data in files.values()
            if sha256(data).hexdigest() == etag
        )
        start = int(noted.range.removeprefix("bytes=").rstrip("-") or 0)
        headers = {"ETag": f'"{etag}"', "Content-Length": str(len(data) - start)}
        if noted.range:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(206 if noted.range else 200, headers)
        broken, hub.break_after = hub.break_after, None
        hanging, hub.hang_after = hub.hang_after, None
        with suppress(ConnectionError):
            for at in range(start, len(data), BLOCK_BYTES):
                if broken is not None and noted.sent >= broken:
                    self.close_connection = True
                    return
                if hanging is not None and noted.sent >= hanging:
                    hub.hangs.set()
                    hub.wait_for_end()
                    self.close_connection = True
                    return
                block = data[at : at + BLOCK_BYTES]
                self.wfile.write(block)
                noted.sent += len(block)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
