"""What to make of the figures of `sluice bench`, by rules that it prints with them."""

from collections.abc import Sequence

from msgspec import Struct

from cli.bench.measurement import AS_Q4_0, HALVES, SHARED, SLOTS, Row

WORTH_IT = 1.10
"""Twice the slots, or separate processes, must give this many times the tokens."""
MUCH_FASTER = 1.25
"""Another quantization is worth a look if it gives this many times the tokens."""


class Recommendation(Struct, frozen=True, kw_only=True):
    """Ratios are of tokens per second, and null if something was not measured."""

    slots: int = 1
    """For interactive use."""
    throughput_slots: int
    """For the highest throughput."""
    halves_to_two_slots: float | None
    """Two processes with half of the CPUs each, to one with two slots."""
    shared_to_two_slots: float | None
    """Two processes on the same CPUs, to one with two slots."""
    q4_0_prompt: float | None
    """This model as Q4_0, to the file as it is."""
    q4_0_answer: float | None
    text: list[str]


def recommend(rows: Sequence[Row]) -> Recommendation:
    """``rows`` begin with one slot, which was measured."""
    by_setting = {row.setting: row for row in rows}
    one = rows[0]
    best = _throughput(rows)
    two = next((row for row in rows if row.jobs == 2), None)
    halves = _ratio(by_setting.get(HALVES), two)
    shared = _ratio(by_setting.get(SHARED), two)
    q4_0 = by_setting.get(AS_Q4_0)
    q4_0_prompt, q4_0_answer = _ratio(q4_0, one, of_prompts=True), _ratio(q4_0, one)
    sentences = [
        f"Interactive use: 1 slot (INFERER_CONCURRENCY=1), {one.tokens_per_s:.0f} tokens/s; with "
        "INFERER_CONCURRENCY=auto, more than one job runs only while others wait.",
        f"Highest throughput: {best.setting} (INFERER_CONCURRENCY={best.jobs}), "
        f"{best.tokens_per_s:.0f} tokens/s, {best.tokens_per_s_each:.0f} for each answer. Rule: "
        "twice as many slots must give 10 % more.",
    ]
    if halves is not None:
        verdict = "use them (sluice up --inferers 2)" if halves >= WORTH_IT else "use slots"
        sentences.append(
            f"Two processes with half of the CPUs each give {halves:.2f} times the tokens of 2 "
            f"slots: {verdict}. Rule: they must give 10 % more."
        )
    if shared is not None and shared < 1:
        sentences.append(
            f"Two processes on the same CPUs give {shared:.2f} times the tokens of 2 slots: do "
            "not run them."
        )
    if q4_0 is not None:
        sentences.append(_about_q4_0(q4_0, q4_0_prompt, q4_0_answer))
    return Recommendation(
        throughput_slots=best.jobs,
        halves_to_two_slots=halves,
        shared_to_two_slots=shared,
        q4_0_prompt=q4_0_prompt,
        q4_0_answer=q4_0_answer,
        text=sentences,
    )


def _throughput(rows: Sequence[Row]) -> Row:
    """More slots, as long as each step is worth it."""
    best, *others = rows[: len(SLOTS)]
    for row in others:
        gain = _ratio(row, best)
        if gain is None or gain < WORTH_IT:
            break
        best = row
    return best


def _about_q4_0(row: Row, prompt: float | None, answer: float | None) -> str:
    if prompt is None or answer is None:
        return f"Q4_0, the fastest quantization on most CPUs, was not measured: {row.not_measured}."
    much = max(prompt, answer) >= MUCH_FASTER
    return (
        f"As Q4_0 this model computes prompts {prompt:.2f} and answers {answer:.2f} times as fast: "
        + ("look for a Q4_0 file of it" if much else "stay with this file")
        + ". Rule: one of them at least 1.25 times; see docs/how-to/choose-a-model.md."
    )


def _ratio(row: Row | None, other: Row | None, of_prompts: bool = False) -> float | None:
    if row is None or other is None:
        return None
    ours, theirs = (
        (row.prompt_tokens_per_s, other.prompt_tokens_per_s)
        if of_prompts
        else (row.tokens_per_s, other.tokens_per_s)
    )
    return ours / theirs if ours is not None and theirs else None
