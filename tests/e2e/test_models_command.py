"""`sluice models`: what can be given to `--model` on this machine."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.model_files import locate
from tests.support.hub import hub_environment
from tests.support.processes import PATIENCE_S, scripts
from tests.support.terminal import ESCAPE, terminal
from tests.support.tiny_model import write_tiny_model

COMMIT = "a" * 40


def run(
    *arguments: str, cwd: Path, cache: Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(scripts() / "sluice"), "models", *arguments],
        cwd=cwd,
        env=hub_environment(cache, "http://127.0.0.1:9", **environment),
        capture_output=True,
        text=True,
        timeout=60,
    )


def listed(*arguments: str, cwd: Path, cache: Path) -> dict[str, dict[str, Any]]:
    """The models by their names."""
    ended = run("--json", *arguments, cwd=cwd, cache=cache)
    assert (ended.returncode, ended.stderr) == (0, "")
    return {model["name"]: model for model in json.loads(ended.stdout)["models"]}


def cache_file(cache: Path, repo: str, name: str, target: Path) -> None:
    """As the hub's library stores it."""
    folder = cache / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    link = folder / "snapshots" / COMMIT / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def test_every_name_can_be_given_to_model(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundled ones, the cache of the hub and files in the folder, also if it is the current one;
    each with what its header says. The parts of a split model are one."""
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    folder.mkdir()
    write_tiny_model(folder / "own.gguf", chat=False, metadata={"general.file_type": 7})
    parts = [folder / f"split-0000{number}-of-00002.gguf" for number in (1, 2)]
    parts[0].symlink_to(tiny_model)
    parts[1].write_bytes(b"GGUF" + bytes(96))
    cache_file(cache, "o/r", "sub/tiny-F16.gguf", tiny_model)
    found = listed(cwd=folder, cache=cache)
    assert list(found) == [
        *("smollm2", "gemma3-270m", "hf:o/r/sub/tiny-F16.gguf", "own.gguf"),
        "split-00001-of-00002.gguf",
    ]
    said = {name: (one["quantization"], one["n_ctx"], one["chat"]) for name, one in found.items()}
    assert said == {
        "smollm2": ("Q4_1", 8192, True),
        "gemma3-270m": ("Q4_K_M", 32768, False),
        "hf:o/r/sub/tiny-F16.gguf": (None, 8192, True),
        "own.gguf": ("Q8_0", 8192, False),
        "split-00001-of-00002.gguf": (None, 8192, True),
    }
    assert found["split-00001-of-00002.gguf"]["size_bytes"] == tiny_model.stat().st_size + 100
    assert found["gemma3-270m"]["size_bytes"] == locate("gemma3-270m").stat().st_size
    for cwd, names in ((folder, found), (tmp_path, listed(str(folder), cwd=tmp_path, cache=cache))):
        monkeypatch.chdir(cwd)
        assert all(locate(name).is_file() for name in names if not name.startswith("hf:"))


def test_what_is_no_model_is_listed_as_such(tmp_path: Path) -> None:
    """With the reason, and without a traceback, also for a name that is not text; a cache that is
    damaged hides nothing else, and a pipe is not opened."""
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    folder.mkdir()
    (folder / "page.gguf").write_text("<html>")
    (folder / "unreadable\udcff.gguf").write_text("")
    (folder / "readme.md").write_text("")
    os.mkfifo(folder / "pipe.gguf")
    (folder / "sub.gguf").mkdir()
    cache_file(cache, "o/dead", "m.gguf", tmp_path / "gone")
    for name, ref in (("models--o--ref", b"\xff" * 40), ("models--o--up", b"../../../etc")):
        (cache / "hub" / name / "refs").mkdir(parents=True)
        (cache / "hub" / name / "refs" / "main").write_bytes(ref)
    (cache / "hub" / "models--o--file").write_text("")
    found = listed(str(folder), cwd=tmp_path, cache=cache)
    found.pop("smollm2")
    found.pop("gemma3-270m")
    assert {name.rpartition("/")[2]: one["problem"] for name, one in found.items()} == {
        "page.gguf": "not a GGUF file",
        "pipe.gguf": "not a file",
        "sub.gguf": "not a file",
        "unreadable\ufffd.gguf": (
            "damaged: it ends in the middle of its header; download it again"
        ),
    }
    ended = run(str(folder), cwd=tmp_path, cache=cache)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "page.gguf" in ended.stdout
    assert "not a GGUF file" in ended.stdout


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Used wrongly."""
    ended = run("missing", cwd=tmp_path, cache=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "sluice: the folder missing cannot be read: No such file or directory\n"
    )


def test_a_table_on_a_terminal(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line per model, below it the folders; control characters of names do nothing."""
    (tmp_path / "a\x1b[31m.gguf").symlink_to(tiny_model)
    for name, value in hub_environment(tmp_path / "cache", "http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    with terminal("models", str(tmp_path)) as shown:
        assert shown.process.wait(PATIENCE_S) == 0
        text = ESCAPE.sub("", shown.output)
    assert "quantization" in text
    assert "\x1b[31m" not in shown.output
    assert "searched: bundled models" in text
