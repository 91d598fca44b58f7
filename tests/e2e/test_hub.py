"""Models by their names on the Hugging Face hub, read from a stand-in through the hub's library."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from shared.hub.download import Downloaded
from tests.support.hub import Hub, hub_environment
from tests.support.processes import PATIENCE_S, ROOT, eventually, free_port
from tests.support.tiny_model import write_tiny_model

CHUNK = 10 * 1024 * 1024
"""The library writes so many bytes at a time; what it has received beyond is lost."""
HALF = CHUNK + CHUNK // 2


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model of more than two chunks."""
    path = write_tiny_model(tmp_path_factory.mktemp("hub") / "large.gguf", width=256)
    data = path.read_bytes()
    assert len(data) > 2 * CHUNK
    return data


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def start(url: str, cache: Path, model: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "shared.hub.download", model],
        cwd=ROOT,
        env=hub_environment(cache, url, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(url: str, cache: Path, model: str, **environment: str) -> Downloaded:
    """What the process that downloads answers; it prints nothing else."""
    process = start(url, cache, model, **environment)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    return msgspec.json.decode(output, type=Downloaded)


def refused(url: str, cache: Path, model: str, **environment: str) -> str:
    """Why; one line."""
    downloaded = fetch(url, cache, model, **environment)
    assert downloaded.path == ""
    assert "\n" not in downloaded.error
    return downloaded.error


def test_a_file_is_downloaded_into_the_librarys_cache(
    hub: Hub, contents: bytes, tmp_path: Path
) -> None:
    """Its own tools find it there; a second call asks the hub nothing."""
    hub.add("o/r", **{"sub/m.gguf": contents})
    path = Path(fetch(hub.url, tmp_path, "hf:o/r/sub/m.gguf").path)
    assert path.read_bytes() == contents
    found = subprocess.check_output(
        [
            *(sys.executable, "-c"),
            "from huggingface_hub import hf_hub_download;"
            "print(hf_hub_download('o/r', 'sub/m.gguf', local_files_only=True))",
        ],
        env=hub_environment(tmp_path, hub.url),
        text=True,
    )
    assert Path(found.strip()) == path
    asked = len(hub.requests)
    assert fetch(hub.url, tmp_path, "hf:o/r/sub/m.gguf").path == str(path)
    assert len(hub.requests) == asked
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_broken_connection_is_resumed(hub: Hub, contents: bytes, tmp_path: Path) -> None:
    """The second request asks for what follows the part that was written, and gets no more."""
    hub.add("o/r", **{"m.gguf": contents})
    hub.break_after = HALF
    assert Path(fetch(hub.url, tmp_path, "hf:o/r").path).read_bytes() == contents
    first, second = hub.bodies()
    assert (first.range, second.range) == ("", f"bytes={CHUNK}-")
    assert second.sent == len(contents) - CHUNK


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_download_whose_process_died_is_continued(
    hub: Hub, contents: bytes, tmp_path: Path, how: str
) -> None:
    """The next process sends a Range, and the part that the first one had is not sent again."""
    hub.add("o/r", **{"m.gguf": contents})
    hub.hang_after = HALF
    first = start(hub.url, tmp_path, "hf:o/r")
    assert hub.hangs.wait(PATIENCE_S)
    eventually(lambda: received(tmp_path) == CHUNK, "a chunk is written")
    getattr(first, how)()
    first.communicate(timeout=PATIENCE_S)
    assert Path(fetch(hub.url, tmp_path, "hf:o/r").path).read_bytes() == contents
    _, second = hub.bodies()
    assert second.range == f"bytes={CHUNK}-"
    assert second.sent == len(contents) - CHUNK
    assert not list(tmp_path.rglob("*.incomplete"))


def received(cache: Path) -> int:
    """Bytes of the file that is being downloaded."""
    return sum(file.stat().st_size for file in cache.rglob("*.incomplete"))


@pytest.mark.parametrize("kept", [1000, 40_000_000])
def test_a_damaged_part_is_not_used(hub: Hub, contents: bytes, tmp_path: Path, kept: int) -> None:
    """What an earlier process left is not the beginning of the file: it is deleted, with one line,
    and the next call downloads it whole. More than the file has bytes is not continued at all."""
    hub.add("o/r", **{"m.gguf": contents})
    etag = fetch_etag(hub, tmp_path)
    blobs = tmp_path / "hub" / "models--o--r" / "blobs"
    (blobs / etag).unlink()
    (blobs / f"{etag}.sluice.incomplete").write_bytes(bytes(kept))
    (snapshot,) = (tmp_path / "hub" / "models--o--r" / "snapshots").iterdir()
    (snapshot / "m.gguf").unlink()
    if kept < len(contents):
        assert "was damaged and has been deleted; start again" in refused(
            hub.url, tmp_path, "hf:o/r"
        )
    assert Path(fetch(hub.url, tmp_path, "hf:o/r").path).read_bytes() == contents


def fetch_etag(hub: Hub, cache: Path) -> str:
    """Download it once; its ETag."""
    return Path(fetch(hub.url, cache, "hf:o/r").path).resolve().name


def test_two_processes_download_a_file_once(hub: Hub, contents: bytes, tmp_path: Path) -> None:
    """The second one waits for the first."""
    hub.add("o/r", **{"m.gguf": contents})
    processes = [start(hub.url, tmp_path, "hf:o/r") for _ in range(2)]
    outputs = {process.communicate(timeout=PATIENCE_S)[0] for process in processes}
    (output,) = outputs
    assert msgspec.json.decode(output, type=Downloaded).error == ""
    assert sum(one.sent for one in hub.bodies()) == len(contents)


def test_all_parts_of_a_split_model_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    """By quantization, or by the name of any part; one that misses a part is not listed. If a
    part is missing in the cache, the model is not taken from there."""
    parts = {f"q/m-Q8_0-0000{number}-of-00003.gguf": b"GGUF%d" % number for number in (1, 2, 3)}
    hub.add("o/r", **parts, **{"m-Q4_0-00001-of-00002.gguf": b"GGUF"})
    first = Path(fetch(hub.url, tmp_path, "hf:o/r:q8_0").path)
    assert first.name == "m-Q8_0-00001-of-00003.gguf"
    assert sorted(file.name for file in first.parent.iterdir()) == [
        name.removeprefix("q/") for name in parts
    ]
    second = first.with_name("m-Q8_0-00002-of-00003.gguf")
    second.unlink()
    assert fetch(hub.url, tmp_path, "hf:o/r/q/m-Q8_0-00003-of-00003.gguf").path == str(first)
    assert second.read_bytes() == b"GGUF2"
    error = refused(hub.url, tmp_path, "hf:o/r:Q4_0")
    assert error == (
        "o/r has nothing that matches hf:o/r:Q4_0; it has hf:o/r/q/m-Q8_0-00001-of-00003.gguf"
    )


def test_several_matches_or_none_list_what_there_is(hub: Hub, tmp_path: Path) -> None:
    """With the names to give instead, on one line, whatever the files are called; a projector is
    not a model."""
    names = ["a-Q4_K_M.gguf", "b-q4_k_m.gguf", "b-Q4_K_S.gguf", "mmproj-Q8_0.gguf", "x\n\x1b.gguf"]
    hub.add("o/r", **dict.fromkeys(names, b"GGUF"))
    hub.add("o/none", **{"model.safetensors": b""})
    assert refused(hub.url, tmp_path, "hf:o/r:Q4_K_M") == (
        "o/r has 2 models that match hf:o/r:Q4_K_M; give one of hf:o/r/a-Q4_K_M.gguf, "
        "hf:o/r/b-q4_k_m.gguf"
    )
    assert "has 4 models that match hf:o/r; give one of" in refused(hub.url, tmp_path, "hf:o/r")
    for model in ("hf:o/r:Q4_K", "hf:o/r:Q8_0", "hf:o/r/c.gguf"):
        error = refused(hub.url, tmp_path, model)
        assert error.startswith(f"o/r has nothing that matches {model}; it has hf:o/r/a-Q4_K_M.g")
    assert "\x1b" not in error
    assert "has no GGUF file" in refused(hub.url, tmp_path, "hf:o/none")


def test_what_is_cached_needs_no_network(hub: Hub, contents: bytes, tmp_path: Path) -> None:
    """Without a hub, and with HF_HUB_OFFLINE, by each form of its name; what is not there is
    refused in one line that says what to do, and what is there of the same repository."""
    hub.add("o/r", **{"m-Q4_0.gguf": contents, "m-Q8_0.gguf": contents[:100]})
    path = fetch(hub.url, tmp_path, "hf:o/r:Q4_0").path
    nowhere = f"http://127.0.0.1:{free_port()}"
    for model in ("hf:o/r/m-Q4_0.gguf", "hf:o/r:Q4_0", "hf:o/r"):
        assert fetch(nowhere, tmp_path, model).path == path
        assert fetch(hub.url, tmp_path, model, HF_HUB_OFFLINE="1").path == path
    here = "or give the path of a GGUF file; on this machine there is hf:o/r/m-Q4_0.gguf"
    error = refused(nowhere, tmp_path, "hf:o/r:Q8_0")
    assert error.startswith(
        "the model hf:o/r:Q8_0 is not on this machine, and cannot be downloaded"
    )
    assert f"{nowhere} (ConnectError: " in error
    assert error.endswith(here)
    error = refused(hub.url, tmp_path, "hf:o/r:Q8_0", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set: unset it" in error
    assert error.endswith(here)


def test_a_file_of_an_earlier_revision_stays(hub: Hub, tmp_path: Path) -> None:
    """The repository has changed, and another file of it was downloaded since: the first one is
    still found without network. Of a file in both revisions the later is taken."""
    hub.add("o/r", **{"a-Q4_0.gguf": b"GGUF1", "b-Q8_0.gguf": b"GGUF1"})
    first = fetch(hub.url, tmp_path, "hf:o/r:Q4_0").path
    fetch(hub.url, tmp_path, "hf:o/r:Q8_0")
    hub.add("o/r", **{"a-Q4_0.gguf": b"GGUF2", "b-Q8_0.gguf": b"GGUF2", "c.gguf": b"GGUF"})
    assert fetch(hub.url, tmp_path, "hf:o/r/c.gguf").path
    (new,) = (path for path in tmp_path.rglob("c.gguf"))
    (new.parent / "b-Q8_0.gguf").write_bytes(b"GGUF2")
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert fetch(nowhere, tmp_path, "hf:o/r:Q4_0").path == first
    assert Path(fetch(nowhere, tmp_path, "hf:o/r:Q8_0").path) == new.parent / "b-Q8_0.gguf"


def test_a_private_repository_needs_the_token(hub: Hub, contents: bytes, tmp_path: Path) -> None:
    """Without it the line says so; with it the token goes to the hub, and not to the other host
    that has the contents."""
    hub.add("o/r", **{"m.gguf": contents})
    hub.token = "hf_secret"
    error = refused(hub.url, tmp_path, "hf:o/r")
    assert "o/r does not exist" in error
    assert "or set HF_TOKEN" in error
    assert fetch(hub.url, tmp_path, "hf:o/r", HF_TOKEN="hf_secret").path
    assert [one.authorization for one in hub.bodies()] == [""]


def test_what_is_not_a_hub_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """A proxy that answers with a page, as those of hotels do; a repository that is not there; a
    name that the hub would not accept."""
    hub.page = b"<html>please log in</html>"
    assert f"cannot be downloaded from {hub.url} (JSONDecodeError" in refused(
        hub.url, tmp_path, "hf:o/r"
    )
    hub.page = None
    assert "o/r does not exist" in refused(hub.url, tmp_path, "hf:o/r")
    assert "Cannot have -- or .. in repo_id" in refused(hub.url, tmp_path, "hf:o--x/r")
    assert "is not a name on the Hugging Face hub" in refused(hub.url, tmp_path, "hf:r")


def test_a_full_or_missing_disk_is_one_line(hub: Hub, contents: bytes, tmp_path: Path) -> None:
    """The folder is named, and the setting for another one."""
    hub.add("o/r", **{"m.gguf": contents})
    (tmp_path / "file").write_text("")
    error = refused(hub.url, tmp_path / "file", "hf:o/r")
    assert f"{tmp_path / 'file'}" in error
    assert "Not a directory; HF_HOME names another folder" in error


def test_without_the_library_the_line_says_what_to_install(tmp_path: Path) -> None:
    """And paths and bundled models need no library."""
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from shared.model_files import locate\n"
        "from shared.errors import ModelError\n"
        "print(locate('smollm2').name)\n"
        "try: locate('hf:o/r')\n"
        "except ModelError as error: print(error)\n"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    bundled, error = printed.splitlines()
    assert bundled.endswith(".gguf")
    assert error.endswith("pip install huggingface_hub")


def test_the_library_is_only_imported_for_such_a_name() -> None:
    """It takes a third of a second, and memory in every inferer."""
    code = (
        "import sys, services.inferer.serve, cli.main\n"
        "from shared.model_files import locate\n"
        "locate('smollm2')\n"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
