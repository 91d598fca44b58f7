"""The outcome of `sluice bench`, for programs and for people."""

from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from rich.table import Table

from cli.bench.measurement import Measured, Row
from cli.bench.recommendation import Recommendation, recommend
from cli.output import out, safe_text
from shared.cpus import cpu_model, usable_cpus


class Report(Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    model: str
    """The path of the file."""
    model_bytes: int
    quantization: str
    cpu: str
    cpus: int
    """Those that may be used."""
    gpu_layers: int
    n_ctx: int
    """Tokens of context of each slot."""
    prompt_tokens: int
    """Length of the prompts, of all jobs of a setting together."""
    load: float
    """Processes that ran or waited for a CPU in the minute before the start, on average. Others
    make all figures too low."""
    warning: str | None
    """Why llama.cpp is slower here than it could be, if it is."""
    settings: list[Row]
    recommendation: Recommendation

    @property
    def title(self) -> str:
        """The model."""
        size = f"{self.model_bytes / 1e6:,.0f} MB"
        return f"{Path(self.model).name} ({self.quantization}, {size})"

    @property
    def machine(self) -> str:
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"{self.cpu}, {cpus}" + (" and a GPU" if self.gpu_layers else "")


def make_report(model: Path, measured: Measured, load: float) -> Report:
    """``load`` is the load average before the measurement."""
    return Report(
        model=str(model),
        model_bytes=model.stat().st_size,
        quantization=measured.ready.quantization,
        cpu=cpu_model(),
        cpus=usable_cpus(),
        gpu_layers=measured.ready.gpu_layers,
        n_ctx=measured.ready.n_ctx,
        prompt_tokens=measured.prompt_tokens,
        load=load,
        warning=measured.ready.warning,
        settings=measured.rows,
        recommendation=recommend(measured.rows),
    )


def print_report(report: Report) -> None:
    out.print(safe_text(f"{report.title} on {report.machine}"))
    out.print()
    out.print(_table(report.settings))
    out.print()
    for line in report.recommendation.text:
        out.print(safe_text(f"- {line}"))
    for problem in _problems(report):
        out.print(safe_text(f"- {problem}", "yellow"))


def _table(rows: list[Row]) -> Table:
    table = Table("tokens per second", box=None, pad_edge=False)
    for heading in ("prompts", "answers", "from", "to", "each"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (
            row.prompt_tokens_per_s,
            row.tokens_per_s,
            *(row.tokens_per_s_range or (None, None)),
            row.tokens_per_s_each,
        )
        table.add_row(row.setting, *("-" if one is None else f"{one:.1f}" for one in figures))
    return table


def _problems(report: Report) -> Iterator[str]:
    for row in report.settings:
        if row.not_measured is not None:
            yield f"{row.setting}: not measured: {row.not_measured}"
    if report.load > report.cpus / 4:
        yield (
            f"The load average was {report.load:.1f} before the start: other programs use the "
            "CPUs, so all figures are too low. Repeat it on an idle machine."
        )
    if report.warning is not None:
        yield report.warning
