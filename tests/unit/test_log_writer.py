"""The thread that writes log lines: order, what it drops, and that it never holds anybody up."""

import fcntl
import os
import resource
import signal
import threading
import time
from pathlib import Path

from shared.log_writer import LogWriter


def notice(lines: int) -> str:
    return f"dropped {lines}"


def small_pipe() -> tuple[int, int]:
    """A pipe that holds 4096 bytes."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return reader, writer


def read_lines(reader: int, until: str) -> list[str]:
    """All lines up to the one that is ``until``."""
    data = b""
    while not data.endswith(f"{until}\n".encode()):
        data += os.read(reader, 65536)
    return data.decode().splitlines()


def test_lines_keep_their_order(tmp_path: Path) -> None:
    """Each thread's lines stand in its order, whole, none missing, once all are drained."""
    with (tmp_path / "log").open("wb") as file:
        log = LogWriter(file.fileno(), notice)

        def write(name: str) -> None:
            for number in range(2000):
                log.write(f"{name} {number}\n")

        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log.drain(60)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4000
    for name in "ab":
        own = [line for line in lines if line.startswith(name)]
        assert own == [f"{name} {number}" for number in range(2000)]


def test_a_pipe_that_nobody_reads_blocks_no_writer() -> None:
    """Writing returns all the same and memory is bounded; the newest lines are kept, and where
    lines are missing a line says how many."""
    reader, writer = small_pipe()
    log = LogWriter(writer, notice, max_buffered_bytes=10_000)
    count = 10_000
    for number in range(count):
        log.write(f"line {number:09}\n")
    expected = 0
    lines = read_lines(reader, f"line {count - 1:09}")
    for kind, figure in (line.split() for line in lines):
        if kind == "dropped":
            expected += int(figure)
        else:
            assert int(figure) == expected
            expected += 1
    assert expected == count
    assert len(lines) < count / 2


def test_draining_a_pipe_that_nobody_reads_ends() -> None:
    """After its patience; the thread is a daemon, so the process can end."""
    _, writer = small_pipe()
    log = LogWriter(writer, notice)
    log.write("x" * 10_000 + "\n")
    began = time.monotonic()
    log.drain(0.2)
    assert time.monotonic() - began < 30


def test_a_reader_that_comes_back_gets_the_number_of_missed_lines(tmp_path: Path) -> None:
    """Lines for which there was no reader are counted; the next reader gets the number at once."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    first = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(first, True)
    writer = os.open(fifo, os.O_WRONLY)
    log = LogWriter(writer, notice)
    log.write("one\n")
    assert read_lines(first, "one") == ["one"]
    os.close(first)
    for _ in range(3):
        log.write("lost\n")
    log.drain(60)
    second = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(second, True)
    log.write("two\n")
    assert read_lines(second, "two") == ["dropped 3", "two"]


def test_a_non_blocking_file_loses_no_line() -> None:
    """A terminal or pipe is shared, and so is this property: nothing is lost."""
    reader, writer = small_pipe()
    os.set_blocking(writer, False)
    log = LogWriter(writer, notice)
    for number in range(2000):
        log.write(f"line {number}\n")
    assert read_lines(reader, "line 1999") == [f"line {number}" for number in range(2000)]


def test_lines_are_written_again_after_a_full_disk(tmp_path: Path) -> None:
    """A line that was cut off does not run into the next one."""
    path = tmp_path / "log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with path.open("wb") as file:
            log = LogWriter(file.fileno(), notice)
            resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
            log.write("one\n")
            log.write("lost\n")  # two bytes of it fit
            log.drain(60)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            log.write("two\n")
            log.drain(60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text().splitlines() == ["one", "lo", "dropped 1", "two"]


def test_a_character_that_cannot_be_encoded_is_escaped(tmp_path: Path) -> None:
    """Half of a surrogate pair is written as its escape."""
    with (tmp_path / "log").open("wb") as file:
        log = LogWriter(file.fileno(), notice)
        log.write("\ud800\n")
        log.drain(60)
    assert (tmp_path / "log").read_text() == "\\ud800\n"
