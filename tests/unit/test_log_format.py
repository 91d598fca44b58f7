"""The plain logs of `sluice up`: which lines of its parts a person sees, and how."""

import json

import pytest

from cli.up.log_format import render_event, render_output


def rendered(**event: object) -> str:
    return render_event(None, "", {"service": "up", "timestamp": "t", "level": "info", **event})


def test_a_start_and_a_death_are_short_sentences() -> None:
    assert rendered(event="child_started", child="nats", pid=7) == "nats: started (process 7)"
    died = {"cause": "signal 9 (SIGKILL)", "exit_status": -9, "last_output": "", "pause_s": 0.2}
    assert rendered(event="child_died", child="inferer-1", level="warning", **died) == (
        "inferer-1: ended with signal 9 (SIGKILL); restarting in 0.2 s"
    )
    assert rendered(event="stopping") == "up: stopping"


def test_fields_and_the_severity_of_other_events_are_shown() -> None:
    line = rendered(event="disk_full", level="error", folder="/data", free_bytes=5)
    assert line == "up: error: disk full (folder=/data, free_bytes=5)"


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"event": "gateway_ready", "level": "info"}),
        "[7] 2026/11/26 05:00:00.000000 [INF] Starting nats-server",
    ],
)
def test_information_of_a_child_is_omitted(line: str) -> None:
    assert render_output("nats", line) is None


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            json.dumps(
                {"event": "cpus_overlap", "level": "warning", "service": "inferer", "others": "b"}
            ),
            "x: warning: cpus overlap (others=b)",
        ),
        (
            json.dumps(
                {
                    "event": "task_failed",
                    "level": "error",
                    "exception": [{"exc_type": "ValueError", "exc_value": "no", "frames": []}],
                }
            ),
            "x: error: task failed (exception=ValueError: no)",
        ),
        ("[7] 2026/11/26 05:00:00.000000 [FTL] no room", "x: error: no room"),
        ("Fatal Python error: Segmentation fault", "x: Fatal Python error: Segmentation fault"),
        ('{"event": 5}', 'x: {"event": 5}'),
        ("\x1b[2J", "x: \\x1b[2J"),
    ],
)
def test_problems_and_other_output_are_shown(line: str, shown: str) -> None:
    assert render_output("x", line) == shown
