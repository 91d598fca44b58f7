"""Draws the figures of `sluice bench` as bars, into an SVG or a PNG file."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from msgspec import Struct

from cli.bench.measurement import Row
from cli.exit_status import EXIT_FAILED, EXIT_USAGE, CommandError

WIDTH, MARGIN, NAME_WIDTH, VALUE_WIDTH, BAR, LINE = 800, 20, 240, 60, 16, 26
TEXT_SIZE, TITLE_SIZE = 13, 15
BLACK, GREY, LIGHT, DARK, GREEN = "#222222", "#767676", "#9ecae1", "#2171b5", "#74a57f"


class Box(Struct, frozen=True):
    x: float
    y: float
    width: float
    height: float
    colour: str


class Label(Struct, frozen=True):
    """A line of text; ``x`` is its beginning or its end, ``y`` its middle."""

    x: float
    y: float
    text: str
    side: Literal["start", "end"] = "start"
    colour: str = BLACK
    size: int = TEXT_SIZE


def check_file(file: Path) -> None:
    """Raises: CommandError: no chart can be written to ``file``."""
    if file.suffix not in (".svg", ".png"):
        raise CommandError(f"--plot {file}: give a file that ends in .svg or .png", EXIT_USAGE)
    if file.suffix == ".png":
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise CommandError(
                f"--plot {file}: for PNG install Pillow (pip install -e '.[bench]'), or give a "
                "file that ends in .svg",
                EXIT_USAGE,
            ) from None
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CommandError(f"--plot {file}: it cannot be written", EXIT_USAGE)


def draw(file: Path, title: str, subtitle: str, rows: list[Row]) -> None:
    """Write a chart of ``rows`` to ``file``. Raises: CommandError: it cannot be written."""
    shapes = list(_shapes(title, subtitle, rows))
    height = max(shape.y for shape in shapes) + LINE
    try:
        if file.suffix == ".svg":
            _write_svg(file, shapes, height)
        else:
            _write_png(file, shapes, height)
    except OSError as error:
        why = error.strerror or error
        raise CommandError(f"--plot {file}: it cannot be written: {why}", EXIT_FAILED) from None


def _shapes(title: str, subtitle: str, rows: list[Row]) -> Iterator[Box | Label]:
    yield Label(MARGIN, MARGIN, title, size=TITLE_SIZE)
    yield Label(MARGIN, MARGIN + LINE, subtitle)
    top = MARGIN + 2.5 * LINE
    answers = [(row, row.tokens_per_s, row.tokens_per_s_each) for row in rows]
    yield from _panel(top, "answers, tokens/s: all jobs, dark: each job", answers, LIGHT)
    top += (len(rows) + 2) * LINE
    prompts = [(row, row.prompt_tokens_per_s, None) for row in rows]
    yield from _panel(top, "prompts, tokens/s: all jobs", prompts, GREEN)


def _panel(
    top: float, heading: str, bars: Sequence[tuple[Row, float | None, float | None]], colour: str
) -> Iterator[Box | Label]:
    """A bar for each row: its length, and that of the dark part."""
    yield Label(MARGIN, top, heading, colour=GREY)
    left = MARGIN + NAME_WIDTH
    longest = max((length for _, length, _ in bars if length), default=1.0)
    scale = (WIDTH - MARGIN - VALUE_WIDTH - left) / longest
    for number, (row, length, part) in enumerate(bars, start=1):
        y = top + number * LINE
        yield Label(left - 8, y, row.setting, "end")
        if length is None:
            yield Label(left, y, "not measured", colour=GREY)
            continue
        yield Box(left, y - BAR / 2, length * scale, BAR, colour)
        if part is not None:
            yield Box(left, y - BAR / 2, part * scale, BAR, DARK)
        yield Label(left + length * scale + 6, y, f"{length:.0f}")


def _write_svg(file: Path, shapes: list[Box | Label], height: float) -> None:
    svg = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height:g}",
            "width": f"{WIDTH}",
            "height": f"{height:g}",
            "font-family": "sans-serif",
        },
    )
    ElementTree.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    for shape in shapes:
        place = {"x": f"{shape.x:g}", "y": f"{shape.y:g}", "fill": shape.colour}
        if isinstance(shape, Box):
            size = {"width": f"{shape.width:g}", "height": f"{shape.height:g}"}
            ElementTree.SubElement(svg, "rect", {**place, **size})
        else:
            style = {
                "font-size": f"{shape.size}",
                "text-anchor": shape.side,
                "dominant-baseline": "central",
            }
            ElementTree.SubElement(svg, "text", {**place, **style}).text = shape.text
    ElementTree.ElementTree(svg).write(file, encoding="utf-8", xml_declaration=True)


def _write_png(file: Path, shapes: list[Box | Label], height: float) -> None:
    """At twice the size, for sharp text."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (2 * WIDTH, round(2 * height)), "white")
    drawing = ImageDraw.Draw(image)
    for shape in shapes:
        x, y = 2 * shape.x, 2 * shape.y
        if isinstance(shape, Box):
            corner = (x + 2 * shape.width, y + 2 * shape.height)
            drawing.rectangle(((x, y), corner), shape.colour)
        else:
            anchor = "lm" if shape.side == "start" else "rm"
            font = ImageFont.load_default(2 * shape.size)
            drawing.text((x, y), shape.text, shape.colour, font, anchor)
    image.save(file)
