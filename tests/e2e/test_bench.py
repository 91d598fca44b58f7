"""`sluice bench` as people and scripts run it, on the tiny model. How fast that is, nothing here
asks."""

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import llama_cpp
import pytest

from cli.bench.measurement import AS_Q4_0, HALVES, SHARED
from shared.cpus import usable_cpus
from tests.support.processes import (
    PATIENCE_S,
    Process,
    clean_environment,
    eventually,
    scripts,
)
from tests.support.shim import DIES_AT_LOAD, HANGS_AT_DECODE, write_shim
from tests.support.terminal import ESCAPE, terminal

FAILED, USAGE, INTERRUPTED = 1, 2, 130
SEVERAL_PROCESSES_S = 5 * PATIENCE_S
SETTINGS = {"1 slot": 1, "2 slots": 2, "4 slots": 4, "8 slots": 8, SHARED: 2, AS_Q4_0: 1}
"""Each with its jobs at once."""
if usable_cpus() > 1:
    SETTINGS[HALVES] = 2

CONTEXT = llama_cpp.llama_context_params
NO_MEMORY_FOR_EIGHT_SLOTS = rf"""
typedef struct {{ char bytes[{llama_cpp.ctypes.sizeof(CONTEXT)}]; }} context_parameters;
typedef void *create(void *, context_parameters);

void *llama_init_from_model(void *model, context_parameters parameters) {{
    uint32_t slots;
    memcpy(&slots, parameters.bytes + {CONTEXT.n_seq_max.offset}, sizeof slots);
    return slots < 8 ? ((create *) real("llama_init_from_model"))(model, parameters) : 0;
}}
"""
DIES_IN_WARM_UP = r"""
#include <fcntl.h>

typedef int32_t decode(void *, llama_batch);

int32_t llama_decode(void *context, llama_batch batch) {
    if (batch.n_tokens == 32) /* as the warm-up, and nothing in the self-test */
        die(SIGSEGV);
    return ((decode *) real("llama_decode"))(context, batch);
}
"""


HANGS_IN_WARM_UP = DIES_IN_WARM_UP.replace(
    "die(SIGSEGV);", '{ close(creat("FILE", 0600)); hang(); }'
)


def bench(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`sluice bench`, run to its end."""
    return subprocess.run(
        [scripts() / "sluice", "bench", *arguments],
        env={**clean_environment(), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SEVERAL_PROCESSES_S,
    )


@pytest.mark.timeout(2 * SEVERAL_PROCESSES_S)
def test_json_is_consistent_and_a_setting_without_memory_is_left_out(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Every setting has a row; the figures agree with each other, and the recommendation with
    them; where a context does not fit, its row says so and the others are measured."""
    library = write_shim(tmp_path / "library", NO_MEMORY_FOR_EIGHT_SLOTS)
    ended = bench(
        *("--model", str(tiny_model), "--seconds", "3", "--json"),
        LLAMA_CPP_LIB_PATH=str(library),
        INFERER_N_CTX="512",
        INFERER_CONCURRENCY="3",
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    report = json.loads(ended.stdout)
    assert (report["model"], report["quantization"]) == (str(tiny_model), "F16")
    assert report["n_ctx"] == 512
    rows: dict[str, dict[str, Any]] = {row["setting"]: row for row in report["settings"]}
    assert {name: row["jobs"] for name, row in rows.items()} == SETTINGS
    without_memory = rows.pop("8 slots")
    assert "no memory for 8 contexts of 512 tokens" in without_memory["not_measured"]
    assert without_memory["tokens_per_s"] is None
    for row in rows.values():
        lowest, highest = row["tokens_per_s_range"]
        assert 0 < lowest <= row["tokens_per_s"] <= highest
        assert row["tokens_per_s_each"] == pytest.approx(row["tokens_per_s"] / row["jobs"])
        assert row["prompt_tokens_per_s"] > 0
        assert row["rounds"] >= 1
    assert [rows[name]["processes"] for name in ("2 slots", SHARED)] == [1, 2]
    assert rows["1 slot"]["threads"] == rows[SHARED]["threads"] == usable_cpus()
    if HALVES in rows:
        assert rows[HALVES]["threads"] == (usable_cpus() + 1) // 2

    recommended = report["recommendation"]
    assert recommended["throughput_slots"] in (1, 2, 4)
    assert f"(INFERER_CONCURRENCY={recommended['throughput_slots']})" in recommended["text"][1]
    ratio = rows[AS_Q4_0]["tokens_per_s"] / rows["1 slot"]["tokens_per_s"]
    assert recommended["q4_0_answer"] == pytest.approx(ratio)


@pytest.mark.timeout(2 * SEVERAL_PROCESSES_S)
def test_the_table_on_a_terminal_and_the_chart_have_the_same_figures(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Each row of the table fits the 80 columns of the terminal, and its figures are in the SVG;
    the progress leaves no trace in the table."""
    chart = tmp_path / "chart.svg"
    options = ("--model", str(tiny_model), "--seconds", "3", "--plot", str(chart))
    with terminal("bench", *options) as shown:

        def has_ended() -> bool:
            assert "Traceback" not in shown.output
            return shown.process.poll() is not None

        eventually(has_ended, "it has ended", SEVERAL_PROCESSES_S)
        lines = ESCAPE.sub("", shown.output).replace("\r", "\n").splitlines()
        assert shown.process.returncode == 0, lines
    labels = [text.text or "" for text in ElementTree.parse(chart).iter() if text.text]
    assert labels[0].startswith("tiny.gguf (F16, ")
    for setting, jobs in SETTINGS.items():
        pattern = re.escape(setting) + r" +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) *"
        (row,) = [found for line in lines if (found := re.fullmatch(pattern, line))]
        assert len(row[0].rstrip()) <= 80
        prompts, answers, lowest, highest, each = map(float, row.groups())
        assert lowest <= answers <= highest
        assert each == pytest.approx(answers / jobs, abs=0.1)
        after = labels[labels.index(setting) :]
        assert float(after[1]) == pytest.approx(answers, abs=1)
        again = after[after.index(setting, 1) :]
        assert float(again[1]) == pytest.approx(prompts, abs=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "nonesuch"), "the model nonesuch does not exist; give the path of a GGUF"),
        (("--plot", "chart.pdf"), "--plot chart.pdf: give a file that ends in .svg or .png"),
        (("--plot", "/no/such/folder/chart.svg"), "chart.svg: it cannot be written"),
        (("--seconds", "0.5"), "--seconds 0.5: give a number from 1 to 3600"),
        (("--seconds", "nan"), "--seconds nan: give a number from 1 to 3600"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    """On stderr, at once, with the exit status for wrong use."""
    ended = bench(*arguments)
    assert (ended.returncode, ended.stdout) == (USAGE, "")
    assert said in ended.stderr
    assert ended.stderr.startswith("sluice: ")
    assert ended.stderr.count("\n") == 1


def test_a_wrong_setting_of_the_inferer_is_one_sentence(tiny_model: Path) -> None:
    """The one that an inferer would print."""
    ended = bench("--model", str(tiny_model), INFERER_N_CTX="many")
    assert (ended.returncode, ended.stdout) == (USAGE, "")
    assert ended.stderr.startswith("sluice: INFERER_N_CTX='many': ")
    assert ended.stderr.count("\n") == 1


def test_a_png_without_pillow_says_what_to_install(tmp_path: Path) -> None:
    """Before anything is measured."""
    (tmp_path / "PIL.py").write_text("raise ImportError('not installed')\n")
    ended = bench("--plot", str(tmp_path / "chart.png"), PYTHONPATH=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (USAGE, "")
    assert "for PNG install Pillow (pip install -e '.[bench]')" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        (
            DIES_IN_WARM_UP,
            FAILED,
            "the process that measured 1 slot died of signal 11 (SIGSEGV)",
        ),
        (DIES_AT_LOAD, USAGE, "llama.cpp died of signal 4 (SIGILL) while it loaded the model"),
    ],
    ids=["in the measurement", "in the self-test"],
)
def test_a_model_that_dies_is_one_sentence(
    tiny_model: Path, tmp_path: Path, source: str, status: int, said: str
) -> None:
    """With the signal, and where to read on."""
    library = write_shim(tmp_path / "library", source)
    ended = bench("--model", str(tiny_model), "--seconds", "7", LLAMA_CPP_LIB_PATH=str(library))
    assert (ended.returncode, ended.stdout) == (status, "")
    assert said in ended.stderr
    assert "docs/" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.timeout(2 * SEVERAL_PROCESSES_S)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_ends_the_measuring_process(
    tiny_model: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Also one that never returns from llama.cpp; nothing is left but the exit status."""
    hangs = tmp_path / "it hangs"
    source = HANGS_IN_WARM_UP.replace("FILE", str(hangs))
    library = write_shim(tmp_path / "library", source)
    running = _start(tiny_model, tmp_path, library)
    try:
        eventually(hangs.exists, "it hangs", SEVERAL_PROCESSES_S)
        _, *others = running.family()
        assert len(others) == 1
        running.popen.send_signal(how)
        assert running.wait() == (-how if how is signal.SIGKILL else INTERRUPTED)
        eventually(lambda: not any(map(_exists, others)), "all processes have ended")
        assert running.output() == ""
    finally:
        running.end()


def test_an_interrupt_ends_the_self_test(tiny_model: Path, tmp_path: Path) -> None:
    """A self-test that hangs does not stay behind."""
    running = _start(tiny_model, tmp_path, write_shim(tmp_path / "library", HANGS_AT_DECODE))
    try:
        family = eventually(
            lambda: found if len(found := running.family()) == 3 else None, "a self-test runs"
        )
        running.popen.send_signal(signal.SIGINT)
        assert running.wait() == INTERRUPTED
        eventually(lambda: not any(map(_exists, family[1:])), "all processes have ended")
    finally:
        running.end()


def _start(model: Path, folder: Path, library: Path) -> Process:
    """`sluice bench`, which goes on."""
    command = [str(scripts() / "sluice"), "bench", "--model", str(model)]
    return Process(command, folder / "log", {"LLAMA_CPP_LIB_PATH": str(library)})


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
