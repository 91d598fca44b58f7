"""The client of a peer: a process that obeys one order a line and prints what it measured."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Until stdin ends: read ``{"do": name, …}`` and print what ``commands[name](…)`` returns."""
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(commands[order.pop("do")](**order)), flush=True)
