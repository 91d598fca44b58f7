"""What the programs in Python share: what they ask for, and how they report what they got.

A program is run in the environment of its client. It takes `Served` as JSON and the names of its
functions to call, and prints one JSON object: for each what it returned, or how it failed.
"""

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field

QUESTION = "Say hello to my cat."
"""SmolLM2's answer ends by itself, after 35 tokens."""
ABOUT_A_PERSON = "A person called Ada, 36 years old."
ABOUT_THE_WEATHER = "What is the weather in Oslo?"
TEXTS = ["a cat", "a dog", "rain in the north"]
MAX_TOKENS = 200


class Served(NamedTuple):
    """The base URL of OpenAI's API and the names of the models there."""

    url: str
    model: str
    """Answers in words."""
    caller: str
    """Calls tools by itself."""
    embedder: str
    api: str = "chat"
    """The API to use where a client has several."""


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


called: list[str] = []
"""The cities that the tool was called with."""


def get_weather(city: Literal["Oslo", "Bergen"]) -> str:
    """The weather in a city, now."""
    called.append(city)
    return f"rain in {city}"


def run(*cases: Callable[[Served], Any]) -> None:
    """Call those that the command line names."""
    served = Served(**json.loads(sys.argv[1]))
    named = {case.__name__: case for case in cases}
    print(json.dumps({name: _outcome(named[name], served) for name in sys.argv[2:]}))


def _outcome(case: Callable[[Served], Any], served: Served) -> dict[str, Any]:
    called.clear()
    try:
        got = case(served)
        if inspect.iscoroutine(got):
            got = asyncio.run(got)
    except Exception:
        return {"error": traceback.format_exc()}
    if isinstance(got, BaseModel):
        got = {"type": type(got).__name__, "value": got.model_dump()}
    return {"got": got, "called": list(called)}
