"""Scale to zero and back: how long a job waits for its first token when no inferer runs, beside how
long the inferer takes to start. The real model; `sluice up --min 0 --max 1`, each round from none.

    .venv/bin/python -m benchmarks.cold_start
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.measuring import arguments, describe_machine
from shared.model_files import locate
from shared.timestamps import milliseconds_between
from tests.support.processes import eventually, server_sent_events
from tests.support.up import Up

ROUNDS, ALLOWED_S = 7, 1.0
BODY = {"prompt": "The history of the lighthouse began", "max_tokens": 8, "seed": 1}


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"cold start: {describe_machine()}")
    added = []
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        options = ("--min", "0", "--max", "1", "--idle-s", "1")
        up = Up(Path(folder), locate("smollm2"), *options, INFERER_THREADS="").wait_until_ready()
        try:
            for number in range(1, ROUNDS + 1):
                first_token_s = _first_token_s(up)
                started = up.events("child_started")[-1]["timestamp"]
                ready = up.events("inferer_ready")[-1]["timestamp"]
                start_s = milliseconds_between(started, ready) / 1000
                added.append(first_token_s - start_s)
                print(
                    f"  first token after {first_token_s:.2f} s, inferer started in {start_s:.2f} s"
                )
                _wait_until_retired(up, number)
        finally:
            up.end()
    most = max(added)
    print(f"  added: median {median(added):.2f} s, at most {most:.2f} s (allowed: {ALLOWED_S})")
    return 0 if most <= ALLOWED_S else 1


def _wait_until_retired(up: Up, times: int) -> None:
    eventually(lambda: len(up.events("inferer_scaled_down")) == times, "it has left")


def _first_token_s(up: Up) -> float:
    """From before the submit to the first token at a reader."""
    began = time.perf_counter()
    job_id = up.submit(**BODY)
    with up.http.stream("GET", f"/jobs/{job_id}/events") as events:
        for event in server_sent_events(events):
            if event["event"] == "tokens":
                return time.perf_counter() - began
    raise RuntimeError("no token came")


if __name__ == "__main__":
    sys.exit(main())
