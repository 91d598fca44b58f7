"""`examples/median_prices`: the answers of its program are those of the table."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.support.processes import PATIENCE_S, ROOT, Stack, clean_environment, free_port

EXAMPLE = ROOT / "examples/median_prices"
MEDIAN_QUESTION = "What is the median price of three-room flats in the north?"
COUNT_QUESTION = "How many two-room flats are there in the west?"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        stack.start_gateway()
        stack.start_inferer(smollm2, INFERER_ALIAS="smollm2")
        stack.wait_until_served("smollm2")
        # There is an estimate as soon as a job has run.
        stack.wait_for_end(stack.submit(prompt="A house", max_tokens=4))
        yield stack


def sales(side: str, rooms: str) -> list[int]:
    """The prices of these flats, read here from the table."""
    with (EXAMPLE / "prices.csv").open() as file:
        return [
            int(row["price"])
            for row in csv.DictReader(file)
            if (row["side"], row["rooms"]) == (side, rooms)
        ]


def ask(url: str, *questions: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "ask.py"), *questions],
        env={**clean_environment(), "SLUICE_URL": url},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )


def test_both_questions_are_answered_right(served: Stack) -> None:
    """They are asked at the same moment; the one that waits is shown its place and time."""
    asked = ask(served.url)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    lines = [line.split("  ") for line in asked.stdout.splitlines()]
    answers = {question: shown for question, shown, *query in lines if query}
    assert answers == {
        MEDIAN_QUESTION: f"{median(sales('north', '3')):,.0f}",
        COUNT_QUESTION: str(len(sales("west", "2"))),
    }
    shown = [line[1] for line in lines if len(line) == 2]
    assert any(line.startswith("next to run, done in about ") for line in shown), asked.stdout


def test_a_question_in_other_words(served: Stack) -> None:
    """And of another statistic."""
    question = "Cheapest four-room flat in the south"
    asked = ask(served.url, question)
    assert f"{question}  {min(sales('south', '4')):,}  " in asked.stdout, asked.stderr


def test_without_a_gateway_it_says_so() -> None:
    asked = ask(f"http://127.0.0.1:{free_port()}", "anything")
    assert asked.returncode == 1
    assert asked.stderr.startswith("no answer from http://127.0.0.1:")
    assert len(asked.stderr.splitlines()) == 1


def test_the_table_is_what_its_script_writes(tmp_path: Path) -> None:
    """Whoever changes one of them runs `make_prices.py`."""
    script = tmp_path / "make_prices.py"
    script.write_text((EXAMPLE / "make_prices.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True)
    assert (tmp_path / "prices.csv").read_text() == (EXAMPLE / "prices.csv").read_text()
