"""Plain sentences for values of options that cannot be used; typer prints those of pydantic."""

from typing import Any

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """All commands."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _sentence(error)
            raise


def _sentence(error: typer.BadParameter) -> str:
    from pydantic import ValidationError  # slow to import, and only needed here

    if not isinstance(error.__cause__, ValidationError):
        return error.message
    problem = error.__cause__.errors()[0]
    given, bounds = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "int_parsing":
            return f"{given!r} is not a whole number"
        case "int_parsing_size":
            return "the number is too large"
        case "float_parsing":
            return f"{given!r} is not a number"
        case "greater_than_equal":
            return f"{given} is too small; give at least {bounds['ge']}"
        case "less_than_equal":
            return f"{given} is too large; give at most {bounds['le']}"
        case "value_error":
            return str(bounds["error"]).removesuffix(".")
    return error.message
