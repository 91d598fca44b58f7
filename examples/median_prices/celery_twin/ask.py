"""Answers questions about prices, all of which are asked at the same time, with Celery and Redis:

python -m celery_twin.ask "median price of three-room flats in the north"
"""

import sys
import time

from prices import answer
from questions import QUESTIONS, prompt

from celery_twin.tasks import query

POLL_S = 0.5


def main(questions: list[str]) -> None:
    waiting = {question: query.delay(prompt(question)) for question in questions}
    shown: dict[str, str] = {}
    while waiting:
        for question, task in list(waiting.items()):
            state = task.state
            if task.ready():
                found = task.get()  # raises what the task raised
                print(f"{question}  {answer(found):,.0f}  {found}", flush=True)
                del waiting[question]
            elif state != shown.get(question):
                shown[question] = state
                print(f"{question}  {state}", flush=True)
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1:] or QUESTIONS)
