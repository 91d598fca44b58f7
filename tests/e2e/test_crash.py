"""A job that kills its inferer: it ends by name, and the jobs beside it complete."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Process, Stack, eventually
from tests.shim import POISON, POISONED, TOKENIZER_POISON, write_shim

ATTEMPTS = 3


@pytest.fixture(scope="module")
def poisoned_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shim(tmp_path_factory.mktemp("shim"), POISONED)


class Fleet(Stack):
    """Two inferers with two slots each, started again whenever one dies."""

    def __init__(self, folder: Path, model: Path, library: Path) -> None:
        super().__init__(folder)
        self._model, self._library = model, library
        self.deaths: list[Process] = []
        self.start_gateway()
        self.live = [self._start_again(number) for number in (0, 1)]
        self.wait_until_served("tiny", inferers=2)

    def _start_again(self, number: int) -> Process:
        return self.start_inferer(
            self._model,
            INFERER_ID=f"inferer-{number}",
            INFERER_CONCURRENCY="2",
            LLAMA_CPP_LIB_PATH=str(self._library),
        )

    def wait_for_end(self, job_id: str) -> dict[str, object]:
        def look() -> dict[str, object] | None:
            for number, inferer in enumerate(self.live):
                if inferer.popen.poll() is not None:
                    self.deaths.append(inferer)
                    self.inferers.remove(inferer)
                    self.live[number] = self._start_again(number)
            found = self.status(job_id)
            return found if found["finished_at"] else None

        return eventually(look, f"{job_id} ends", patience_s=150)


@pytest.fixture
def fleet(tmp_path: Path, tiny_model: Path, poisoned_library: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, tiny_model, poisoned_library) as running:
        yield running


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("poison", "doing"),
    [
        (f"a {POISON} here", "computing its prompt"),
        (f"a {TOKENIZER_POISON} here", "tokenizing its prompt"),
    ],
)
def test_the_culprit_ends_by_name_and_the_innocent_complete(
    fleet: Fleet, poison: str, doing: str
) -> None:
    """A poisoned job beside three innocent ones, two slots and two inferers: the innocent
    complete with at most one more attempt, the inferers die at most as often as the poisoned job
    may start, and its failure says of what, and in the middle of what."""
    innocent = [fleet.submit(prompt="go on", max_tokens=3000, seed=seed) for seed in (1, 2, 3)]
    for job_id in innocent:
        fleet.wait_for_state(job_id, "STARTED")
    poisoned = fleet.submit(prompt=poison, max_tokens=5)
    for job_id in innocent:
        ended = fleet.wait_for_end(job_id)
        assert (ended["state"], ended["error"]) == ("SUCCESS", None)
        assert ended["attempts"] in (1, 2)
    lost = fleet.wait_for_end(poisoned)
    assert (lost["state"], lost["attempts"]) == ("FAILURE", ATTEMPTS)
    assert lost["error"] == {
        "code": "worker_lost",
        "message": "attempt 3 of 3 ended with its inferer: signal 11 (SIGSEGV) while "
        f"{doing}, running alone",
    }
    assert len(fleet.deaths) <= ATTEMPTS
