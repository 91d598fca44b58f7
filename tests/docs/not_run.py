"""The blocks of the documentation that no test runs, and why: the only list of them."""

NOT_RUN = {
    ("docs/reference/command-line.md", ""): "how to write each command; test_reference.py",
    ("", "make demo"): "a minute with a real model; test_crash.py and test_proxy.py run it",
    ("", "make test"): "runs this test",
    ("", "docker compose"): "needs Docker; test_deployment.py reads compose.yaml",
    ("", "sluice bench"): "measures for minutes; test_bench.py runs it",
    ("docs/how-to/gpu.md", ""): "needs a GPU, and compiles for minutes",
    ("docs/compiling.md", ""): "compiles llama.cpp for minutes",
    ("docs/how-to/clients.md", ""): "needs their environments; tests/clients runs the same",
    ("docs/benchmarks/README.md", ""): "measures for many minutes, with Redis",
    ("examples/median_prices/README.md", "celery"): "needs Redis and Celery",
    ("examples/median_prices/README.md", "cd examples"): "a step on the way to the former",
    ("docs/troubleshooting.md", "sluice inferers"): "the bar of a job halfway; test_cli.py",
    ("docs/troubleshooting.md", "nats stream report"): "a broker that is full; test_storage.py",
}
"""By the page (``""``: any) and a part of the command (``""``: all of the page)."""


def why_not_run(page: str, command: str) -> tuple[str, str] | None:
    """The key of the first entry for ``command``; None if it is to be run."""
    for where, part in NOT_RUN:
        if where in ("", page) and part in command:
            return where, part
    return None
