"""Which jobs `sluice doctor` reports as hung."""

from cli.doctor.inferers import hung
from shared.broker.inferers import Live
from shared.timestamps import timestamp
from shared.wire.inferers import RunningJob
from tests.support.inferer_entries import inferer_entry


def live(heartbeat_at: str, tokens: int, prompt_tokens_left: int | None) -> Live:
    job = RunningJob(
        id="job",
        attempt=1,
        started_at=timestamp(),
        completion_tokens=tokens,
        max_tokens=9,
        prompt_tokens_left=prompt_tokens_left,
    )
    return Live(inferer_entry(jobs=[job]), heartbeat_at)


def test_a_job_hangs_if_neither_its_prompt_nor_its_answer_gets_on() -> None:
    before = live("2026-01-01T00:00:00Z", 0, 5000)
    later = "2026-01-01T00:00:03Z"
    assert not list(hung([before], [live(later, 0, 4000)], 3))
    assert not list(hung([before], [live(later, 1, 0)], 3))
    (finding,) = hung([before], [live(later, 0, 5000)], 3)
    assert "no progress on job for 3 s, 0 tokens so far" in finding.found


def test_of_inferers_of_an_earlier_version_only_answers_count() -> None:
    before = live("2026-01-01T00:00:00Z", 4, None)
    later = "2026-01-01T00:00:03Z"
    assert not list(hung([before], [live(later, 5, None)], 3))
    (finding,) = hung([before], [live(later, 4, None)], 3)
    assert "4 tokens so far" in finding.found
