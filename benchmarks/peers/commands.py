"""The client of a peer: a process that executes one command per line and prints the result."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Until stdin ends: read ``{"do": name, …}`` and print what ``commands[name](…)`` returns."""
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("do")](**command)), flush=True)
