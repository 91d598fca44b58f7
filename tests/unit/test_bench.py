"""The rules by which `sluice bench` recommends settings, and its charts."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from cli.bench.chart import WIDTH, draw
from cli.bench.measurement import AS_Q4_0, HALVES, SHARED, Row
from cli.bench.recommendation import recommend


def row(setting: str, jobs: int, answers: float | None, prompts: float = 100.0) -> Row:
    measured = answers is not None
    return Row(
        setting=setting,
        jobs=jobs,
        processes=1,
        prompt_tokens_per_s=prompts if measured else None,
        tokens_per_s=answers,
        tokens_per_s_each=answers / jobs if answers is not None else None,
        not_measured=None if measured else "no memory",
    )


def slots(*answers: float | None) -> list[Row]:
    """Rows of 1, 2, 4 and 8 slots."""
    names = ("1 slot", "2 slots", "4 slots", "8 slots")
    return [
        row(name, 2**number, speed)
        for number, (name, speed) in enumerate(zip(names, answers, strict=True))
    ]


@pytest.mark.parametrize(
    ("answers", "recommended"),
    [
        ((100, 160, 220, 270), 8),
        ((100, 160, 220, 230), 4),
        ((100, 109, 220, 270), 1),
        ((100, 160, None, None), 2),
        ((100, 160, 170, 400), 2),
    ],
)
def test_slots_are_recommended_as_long_as_each_step_gives_ten_percent(
    answers: tuple[float | None, ...], recommended: int
) -> None:
    """A step that is not worth it, or was not measured, ends it."""
    found = recommend(slots(*answers))
    assert (found.slots, found.throughput_slots) == (1, recommended)
    assert f"INFERER_CONCURRENCY={recommended})" in found.text[1]


@pytest.mark.parametrize(
    ("speed", "verdict"), [(180.0, "use them (sluice up --inferers 2)"), (170.0, "use slots")]
)
def test_separate_processes_must_beat_slots(speed: float, verdict: str) -> None:
    """By ten percent, compared with as many jobs at once in one process."""
    found = recommend([*slots(100, 160, 170, 170), row(HALVES, 2, speed)])
    assert found.halves_to_two_slots == pytest.approx(speed / 160)
    assert verdict in found.text[2]


def test_processes_on_the_same_cpus_are_advised_against_if_slots_are_faster() -> None:
    """With the measured ratio."""
    found = recommend([*slots(100, 160, 170, 170), row(SHARED, 2, 40)])
    assert found.shared_to_two_slots == pytest.approx(0.25)
    assert "0.25 times the tokens of 2 slots: do not run them" in found.text[2]
    assert recommend([*slots(100, 160, 170, 170), row(SHARED, 2, 165)]).text[2:] == []


@pytest.mark.parametrize(
    ("prompts", "answers", "verdict"),
    [
        (250, 110, "look for a Q4_0 file"),
        (110, 130, "look for a Q4_0 file"),
        (120, 120, "stay with this file"),
    ],
)
def test_another_quantization_must_be_much_faster(
    prompts: float, answers: float, verdict: str
) -> None:
    """In prompts or in answers."""
    found = recommend([*slots(100, 160, 170, 170), row(AS_Q4_0, 1, answers, prompts)])
    assert (found.q4_0_prompt, found.q4_0_answer) == (prompts / 100, answers / 100)
    assert verdict in found.text[2]


def test_a_quantization_that_was_not_measured_has_its_reason() -> None:
    """And no ratio."""
    found = recommend([*slots(100, 160, 170, 170), row(AS_Q4_0, 1, None)])
    assert found.q4_0_prompt is None
    assert "was not measured: no memory" in found.text[2]


TITLE = 'a <model> & "its" file'
ROWS = slots(100, 160.4, 0.0, None)


def test_an_svg_chart_is_well_formed_and_has_all_figures(tmp_path: Path) -> None:
    """Also with characters that XML escapes, and with rows that have no figures; the bars are as
    long as the figures say."""
    file = tmp_path / "chart.svg"
    draw(file, TITLE, "a machine", ROWS)
    svg = ElementTree.parse(file).getroot()
    texts = [element.text for element in svg.findall("{*}text")]
    assert texts[0] == TITLE
    assert texts.count("8 slots") == texts.count("not measured") == 2
    for figure in ("100", "160", "0"):
        assert figure in texts
    bars = [float(bar.attrib["width"]) for bar in svg.findall("{*}rect") if "y" in bar.attrib]
    totals, parts = bars[0:6:2], bars[1:6:2]
    assert [total / totals[0] for total in totals] == pytest.approx([1, 1.604, 0], abs=1e-3)
    assert [part / totals[0] for part in parts] == pytest.approx([1, 0.802, 0], abs=1e-3)


def test_a_png_chart_is_an_image(tmp_path: Path) -> None:
    """Of the same shapes, at twice the size."""
    file = tmp_path / "chart.png"
    draw(file, TITLE, "a machine", ROWS)
    with Image.open(file) as image:
        image.load()
        assert (image.format, image.width) == ("PNG", 2 * WIDTH)
        assert len(image.getcolors() or []) > 4
