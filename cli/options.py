"""Options shared by several commands."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cli.exit_status import EXIT_USAGE, CommandError
from shared.wire.requests import Priority

Url = Annotated[
    str, typer.Option("--url", envvar="SLUICE_URL", help="The gateway.", show_default=True)
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The id, or its beginning.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Required if several models are served.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", help="Maximum number of tokens; default: until the context is full."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", help="Sampling temperature, 0 to 2; 0 always picks the most likely token."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Sample from the most likely tokens with this total probability."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends the answer. Can be given several times."),
]
Schema = Annotated[
    Path | None,
    typer.Option("--schema", help="File with a JSON Schema that the answer must match."),
]
Adapter = Annotated[str | None, typer.Option("--adapter", help="Name of the LoRA adapter to use.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed for sampling; the same seed usually gives the same answer."),
]
Answers = Annotated[
    int | None,
    typer.Option("-n", help="How many answers, up to 8; the prompt is computed once."),
]
System = Annotated[str | None, typer.Option("--system", help="A system message.")]
Raw = Annotated[bool, typer.Option("--raw", help="Send the text without the chat template.")]
PriorityOption = Annotated[
    Priority | None, typer.Option("--priority", help="high jobs run first, low ones last.")
]
TimeoutS = Annotated[
    float | None, typer.Option("--timeout-s", help="Seconds until the job expires.")
]

NatsUrl = Annotated[str, typer.Option("--nats-url", envvar="NATS_URL", help="The broker.")]
Replicas = Annotated[int, typer.Option(min=1, max=5, help="3 or 5 on a cluster.")]

MODEL_HELP = (
    "A GGUF file, the name of a bundled one, or one on the Hugging Face hub: "
    "hf:owner/repo/file.gguf, hf:owner/repo:Q4_K_M. See: sluice models."
)
DEFAULT_NATS_URL = "nats://127.0.0.1:4222"
DEFAULT_URL = "http://127.0.0.1:5001"


def submission(
    text: str,
    *,
    model: str | None,
    adapter: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    n: int | None,
    stop: list[str] | None,
    schema: Path | None,
    system: str | None,
    raw: bool,
    timeout_s: float | None,
    priority: Priority | None,
) -> dict[str, Any]:
    """The body for ``POST /jobs``, without the options that were not given.

    Raises:
        CommandError: options that exclude each other, an empty prompt, or a schema that cannot be
            read.
    """
    if not text:
        raise CommandError("the prompt is empty", EXIT_USAGE)
    if raw and system:
        raise CommandError(
            "--raw sends the text without the chat template, so --system cannot be used with it",
            EXIT_USAGE,
        )
    options = {
        "model": model,
        "adapter": adapter,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "n": n,
        "stop": stop or None,
        "response_format": None if schema is None else _response_format(schema),
        "timeout_s": timeout_s,
        "priority": priority,
    }
    body: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if raw:
        body["prompt"] = text
    else:
        messages = [{"role": "system", "content": system}] if system else []
        body["messages"] = [*messages, {"role": "user", "content": text}]
    return body


def _response_format(path: Path) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise CommandError(f"--schema {path}: {error.strerror}", EXIT_USAGE) from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--schema {path} is not JSON: {error}", EXIT_USAGE) from None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
