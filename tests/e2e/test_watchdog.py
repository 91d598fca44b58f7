"""An inferer whose compute thread hangs: in a library that does not come back."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.process.exit_status import EXIT_STALLED
from shared.process.lifecycle import EXIT_CONFIGURATION
from tests.support.processes import Stack
from tests.support.shim import HANGING, POISON, TOKENIZER_POISON, write_shim

STALL_S = 2


@pytest.fixture(scope="module")
def hanging_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shim(tmp_path_factory.mktemp("shim"), HANGING)


@pytest.fixture
def stack(tmp_path: Path, tiny_model: Path, hanging_library: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as running:
        running.start_gateway()
        start(running, tiny_model, hanging_library)
        running.wait_until_served("tiny")
        yield running


def start(stack: Stack, model: Path, library: Path) -> None:
    stack.start_inferer(
        model,
        INFERER_ID="same",
        INFERER_STALL_S=str(STALL_S),
        INFERER_MAX_ATTEMPTS="1",
        LLAMA_CPP_LIB_PATH=str(library),
    )


@pytest.mark.parametrize(
    ("poison", "where"), [(POISON, "in _step"), (TOKENIZER_POISON, "in tokenize")]
)
def test_a_hung_thread_ends_the_process(
    stack: Stack, tiny_model: Path, hanging_library: Path, poison: str, where: str
) -> None:
    """It says so and exits; the next one finds that the job has been started as often as it may,
    and serves others."""
    job_id = stack.submit(prompt=f"a {poison} here", max_tokens=4)
    (hung,) = stack.inferers
    assert hung.wait() == EXIT_STALLED != EXIT_CONFIGURATION
    assert hung.events("compute_stalled")
    assert where in hung.output()  # where it hung
    start(stack, tiny_model, hanging_library)
    lost = stack.wait_for_end(job_id)
    assert (lost["state"], lost["error"]["code"], lost["attempts"]) == ("FAILURE", "worker_lost", 1)
    assert stack.wait_for_end(stack.submit(prompt="hello", max_tokens=4))["state"] == "SUCCESS"
    letters = stack.http.get("/dead").json()["letters"]
    assert [(letter["id"], letter["code"]) for letter in letters] == [(job_id, "worker_lost")]


def test_a_process_that_was_stopped_for_a_while_is_not_taken_for_hung(stack: Stack) -> None:
    """SIGSTOP for longer than a stall may take, then SIGCONT: the job goes on to its end."""
    job_id = stack.submit(prompt="go on", max_tokens=2500)
    stack.wait_for_state(job_id, "STARTED")
    (inferer,) = stack.inferers
    inferer.freeze()
    time.sleep(2 * STALL_S)
    inferer.thaw()
    assert stack.wait_for_end(job_id)["state"] == "SUCCESS"
    assert inferer.popen.poll() is None
