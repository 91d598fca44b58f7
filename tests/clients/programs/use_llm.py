"""`llm`, the command."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ABOUT_A_PERSON, ABOUT_THE_WEATHER, MAX_TOKENS, QUESTION, Served, called, run

MODEL = """
- model_id: {name}
  model_name: {name}
  api_base: {url}
  supports_schema: true
  supports_tools: true
  responses: {responses}
"""
GET_WEATHER = '''
import typing

def get_weather(city: typing.Literal["Oslo", "Bergen"]) -> str:
    """The weather in a city, now."""
    return f"rain in {city}"
'''
CALL = re.compile(r"Tool call: get_weather\((.*)\)")


def ask(served: Served, model: str, question: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        responses = json.dumps(served.api == "responses")
        models = "".join(
            MODEL.format(name=name, url=served.url, responses=responses)
            for name in (served.model, served.caller)
        )
        Path(folder, "extra-openai-models.yaml").write_text(models)
        command = [str(Path(sys.executable).parent / "llm"), question, "-m", model, *options]
        ended = subprocess.run(
            [*command, "-o", "temperature", "0", "-o", "max_tokens", str(MAX_TOKENS)],
            env=os.environ | {"LLM_USER_PATH": folder},
            capture_output=True,
            text=True,
        )
    if ended.returncode != 0:
        raise RuntimeError(ended.stderr)
    called.extend(ast.literal_eval(arguments)["city"] for arguments in CALL.findall(ended.stderr))
    return ended.stdout.removesuffix("\n")


def plain(served: Served) -> str:
    return ask(served, served.model, QUESTION, "--no-stream")


def stream(served: Served) -> list[str]:
    """In characters: a pipe does not show the parts."""
    return list(ask(served, served.model, QUESTION))


def structured(served: Served) -> dict[str, object]:
    answer = ask(served, served.model, ABOUT_A_PERSON, "--schema", "name, age int")
    return {"type": "Person", "value": json.loads(answer)}


def tools(served: Served) -> str:
    options = ("--functions", GET_WEATHER, "--tools-debug")
    return ask(served, served.caller, ABOUT_THE_WEATHER, *options)


run(plain, stream, structured, tools)
