"""``sluice``: the command line."""

import asyncio
import errno
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer
from platformdirs import user_data_path

from cli.client import Client
from cli.commands import dead, topology
from cli.doctor.examination import examine
from cli.exit_status import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    CommandError,
)
from cli.interrupts import interrupted_afterwards, interrupted_by_signals
from cli.options import (
    DEFAULT_NATS_URL,
    DEFAULT_URL,
    Json,
    MaxTokens,
    Model,
    NatsUrl,
    PriorityOption,
    Raw,
    Replicas,
    Seed,
    System,
    Temperature,
    TimeoutS,
    Url,
    submission,
)
from cli.output import (
    complain,
    discard_output,
    discard_stdout,
    err,
    out,
    print_changes,
    print_findings,
    print_inferers,
    print_json,
    print_queue,
    print_status,
    print_text,
    print_tokens,
    timings_line,
)
from cli.top import frame, take_snapshot, watch
from cli.up.scale import scale_of
from cli.up.stack import UpOptions, up_until_stopped
from cli.waiting import waiting
from shared import __version__
from shared.config import BrokerSettings, load
from shared.errors import SettingsError
from shared.logs import configure_logs
from shared.wire.api import ConcurrencyRequest, JobStatus

UNKNOWN_JOB = "interrupted before the gateway answered: the job may run, see sluice queue"

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a full or broken disk under stdout says. A reader that is gone is dealt with by Click."""

TOP_TIMEOUT_S = 3.0
"""A live view that waits longer shows what is no longer true."""

DEFAULT_DATA = user_data_path("sluice")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LLM inference through a NATS work queue: one request at a time through each worker.",
)
app.add_typer(dead.app, name="dead")
app.add_typer(topology.app, name="topology")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _version(
    version: Annotated[
        bool,
        # Eager: before it is missed that there is no command.
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command()
def up(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A GGUF file, or the name of a bundled one.")
    ] = "smollm2",
    inferers: Annotated[int | None, typer.Option(min=0, help="Inferers; 1 by default.")] = None,
    least: Annotated[
        int | None, typer.Option("--min", min=0, help="Inferers to keep while nothing waits.")
    ] = None,
    most: Annotated[
        int | None, typer.Option("--max", min=0, help="Inferers to start when jobs wait.")
    ] = None,
    idle_s: Annotated[
        float, typer.Option(help="Stop an inferer above --min after so many idle seconds.")
    ] = 60,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, help="Jobs at once in each inferer.")
    ] = 1,
    host: Annotated[str, typer.Option(help="Where the gateway and NATS listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP; 0 takes a free one.")] = 5001,
    nats_port: Annotated[
        int, typer.Option(min=0, max=65535, help="NATS; 0 takes a free one.")
    ] = 4222,
    data: Annotated[
        Path, typer.Option(help="Folder for queue and results; it survives restarts.")
    ] = DEFAULT_DATA,
    as_json: Json = False,
) -> None:
    """Run the whole stack on this machine until Ctrl-C: NATS, the gateway and inferers."""
    options = UpOptions(
        model=model,
        scale=scale_of(inferers, least, most, idle_s),
        concurrency=concurrency,
        host=host,
        port=port,
        nats_port=nats_port,
        data=data,
    )

    def announce(http_url: str, nats_url: str) -> None:
        try:
            say_ready(http_url, nats_url)
        except OSError:  # the stack serves all the same
            discard_stdout()

    def say_ready(http_url: str, nats_url: str) -> None:
        if as_json:
            print_json({"ready": True, "http": http_url, "nats": nats_url})
        else:
            print(f"ready {http_url} {nats_url}", flush=True)

    asyncio.run(up_until_stopped(options, announce))


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    system: System = None,
    raw: Raw = False,
    timeout_s: TimeoutS = None,
    priority: PriorityOption = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Ask, and print the answer as it comes. Ctrl-C cancels the job."""
    body = submission(
        _text(prompt),
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        system=system,
        raw=raw,
        timeout_s=timeout_s,
        priority=priority,
    )
    with Client(url) as client, interrupted_by_signals():
        job_id = None
        try:
            with interrupted_afterwards():
                job_id = client.submit(body).id
            status = _follow(client, job_id, show=not as_json)
        except (KeyboardInterrupt, BrokenPipeError) as stopped:
            if isinstance(stopped, BrokenPipeError):
                discard_output()
            _cancel_interrupted(client, job_id)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print_json(status)
    elif err.is_terminal and status.error is None:
        err.print(timings_line(status), style="dim")
    _end(status)


@app.command()
def submit(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    system: System = None,
    raw: Raw = False,
    timeout_s: TimeoutS = None,
    priority: PriorityOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Put a job on the queue and print its id. It goes on when this command ends."""
    body = submission(
        _text(prompt),
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        system=system,
        raw=raw,
        timeout_s=timeout_s,
        priority=priority,
    )
    with Client(url) as client, interrupted_by_signals():
        accepted = None
        try:
            with interrupted_afterwards():
                accepted = client.submit(body)
            if not wait:
                print_json(accepted) if as_json else print_text(accepted.id)
                return
            complain(f"submitted {accepted.id}")
            status = _follow(client, accepted.id, show=False)
        except KeyboardInterrupt:
            if accepted is None:
                complain(UNKNOWN_JOB)
            else:
                complain(f"the job goes on: sluice status {accepted.id}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    print_json(status) if as_json else print_status(status)
    _end(status, told=True)


@app.command()
def status(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show the state of a job, and its result."""
    with Client(url) as client:
        found = client.status(job_id)
    print_json(found) if as_json else print_status(found)
    _end(found, told=True)


@app.command()
def cancel(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Cancel a job, whether it waits or runs."""
    with Client(url) as client:
        cancelled = client.cancel(job_id)
    print_json(cancelled) if as_json else print_status(cancelled)


@app.command()
def queue(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """The queue of each model."""
    with Client(url) as client:
        report = client.queue()
    print_json(report) if as_json else print_queue(report.models)


@app.command()
def inferers(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """The live inferers and what they do."""
    with Client(url) as client:
        report = client.inferers()
    print_json(report) if as_json else print_inferers(report.inferers)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once, and exit.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Watch queues, inferers and running jobs until Ctrl-C. Prints once if stdout is not a
    terminal."""
    with Client(url, timeout_s=TOP_TIMEOUT_S) as client, interrupted_by_signals():
        if as_json:
            print_json(take_snapshot(client))
        elif once or not sys.stdout.isatty() or out.is_dumb_terminal:
            out.print(frame(take_snapshot(client)))
        else:
            with suppress(KeyboardInterrupt):
                watch(client)


@app.command()
def concurrency(
    slots: Annotated[int, typer.Argument(min=0, max=64, help="Jobs at once; 0 takes no jobs.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Only inferers of this model.")
    ] = None,
    inferer: Annotated[str | None, typer.Option("--inferer", help="Only this inferer.")] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Set how many jobs an inferer runs at once, without a restart. Running jobs are not touched.

    It lasts until the inferer is restarted, which then uses INFERER_CONCURRENCY again."""
    wanted = ConcurrencyRequest(concurrency=slots, model=model, inferer=inferer)
    with Client(url) as client:
        report = client.set_concurrency(wanted)
    print_json(report) if as_json else print_changes(report.inferers)
    if any(change.refused for change in report.inferers):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def doctor(
    url: Url = DEFAULT_URL,
    nats_url: NatsUrl = DEFAULT_NATS_URL,
    replicas: Replicas = 1,
    as_json: Json = False,
) -> None:
    """Say why jobs are slow or stuck, and what to do. Exit status 1 when something is wrong."""
    # What the connection has to say is among the findings.
    configure_logs("sluice", stream=sys.stderr, level=logging.CRITICAL)
    try:
        settings = load(BrokerSettings, "NATS", {"NATS_URL": nats_url})
    except SettingsError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    findings = asyncio.run(examine(settings, url.rstrip("/"), replicas))
    print_json({"findings": findings}) if as_json else print_findings(findings)
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def _text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"stdin is not UTF-8: {error.reason} at byte {error.start}", EXIT_USAGE
        ) from None


def _follow(client: Client, job_id: str, *, show: bool) -> JobStatus:
    """Follow a job to its end; ``show`` prints its tokens as they come."""
    with waiting(client, job_id) as shown:
        tokens = 0
        for event in client.follow(job_id):
            if event.event == "retrying" and show:
                print_tokens("\n")
            elif event.event == "tokens" and show:
                tokens += 1
                shown.hide()
                print_tokens(event.json()["text"])
            elif event.event == "result":
                if tokens:
                    print_tokens("\n")
                return msgspec.json.decode(event.data, type=JobStatus)
            elif event.event == "error":
                raise CommandError(event.json()["message"], EXIT_FAILED)
    raise CommandError(f"the events of {job_id} ended without a result", EXIT_UNREACHABLE)


def _cancel_interrupted(client: Client, job_id: str | None) -> None:
    """Cancel the job of a command that was interrupted, and say so. A further interrupt ends that,
    too."""
    if job_id is None:
        complain(UNKNOWN_JOB)
        return
    cancelled = False
    with suppress(KeyboardInterrupt), interrupted_afterwards():
        client.cancel(job_id)
        cancelled = True
    complain(f"\ncancelled {job_id}" if cancelled else f"\nnot cancelled: sluice cancel {job_id}")


def _end(status: JobStatus, *, told: bool = False) -> None:
    """Exit status 1 for a job that ended without an answer."""
    if status.error is None:
        return
    if not told:
        complain(f"{status.state}: {status.error.code}: {status.error.message}")
    raise typer.Exit(EXIT_FAILED)


def run() -> NoReturn:
    """The console script: every error ends in one line and its exit status."""
    try:
        app()
    except CommandError as error:
        complain(f"sluice: {error}")
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        discard_stdout()
        complain(f"sluice: the output cannot be written: {error.strerror}")
        sys.exit(EXIT_FAILED)
    sys.exit(0)


if __name__ == "__main__":
    run()
