"""The threads that prepare requests, without a model."""

import threading
import time

import pytest

from services.inferer.engine import preparation
from services.inferer.engine.preparation import STACK_BYTES, Preparation

PATIENCE_S = 60.0


def test_each_piece_of_work_has_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its thread was replaced: the watchdog would take several for one that hangs."""
    monkeypatch.setattr(preparation, "MAX_WORK_S", 0)
    threads = Preparation(1)
    numbers = []
    for _ in range(3):
        done = threading.Event()

        def work(done: threading.Event = done) -> None:
            numbers.append(threads.in_progress[0])
            done.set()

        threads.submit(work)
        assert done.wait(PATIENCE_S)
    assert len({*numbers}) == 3


def test_threads_that_start_at_once_all_have_the_deep_stack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The size is a setting of the process, and each start sets it and sets it back."""
    sizes: list[int] = []
    start = threading.Thread.start

    def slow_start(thread: threading.Thread) -> None:
        if threading.current_thread() in starting:
            time.sleep(0.02)
            sizes.append(threading.stack_size())
        start(thread)

    with preparation._stack_size_lock:  # a thread of another test may be about to start one
        before = threading.stack_size()
    threads = Preparation(0)
    starting = [threading.Thread(target=threads._start, args=(number,)) for number in range(8)]
    monkeypatch.setattr(threading.Thread, "start", slow_start)
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join(PATIENCE_S)
    assert sizes == [STACK_BYTES] * 8
    assert threading.stack_size() == before
