"""A broker whose users have rights: everything for gateways, one model for an inferer."""

import re
from pathlib import Path

from shared.model_names import token_of
from shared.wire import subjects
from tests.support.processes import CONFIGURATION

STREAMS_READ = {
    subjects.REQUESTS: "infer.schedule.{model}.>",
    subjects.STATES: "infer.*.{model}.*",
    subjects.RESULTS: "infer.results.{model}.*",
    subjects.DEAD: "infer.dead.{model}.*",
    f"KV_{subjects.INFERERS}": "$KV.INFERERS.{model}.*",
}
"""What an inferer reads, by single subjects."""


def inferer_permissions(model: str) -> tuple[list[str], list[str]]:
    """The subjects that an inferer of ``model`` publishes to, and those that it subscribes to."""
    token = token_of(model)
    consumers = [subjects.consumer(model, priority) for priority in subjects.PRIORITIES]
    publish = [
        *(
            f"infer.{kind}.{token}.*"
            for kind in ("results", "states", "deaths", "dead", "retry", "handover")
        ),
        f"infer.events.{token}.*.*",
        subjects.inferer(model, "*"),
        *(
            f"$JS.API.DIRECT.GET.{stream}.{read.format(model=token)}"
            for stream, read in STREAMS_READ.items()
        ),
        *(f"$JS.API.CONSUMER.INFO.REQUESTS.{name}" for name in consumers),
        *(f"$JS.API.CONSUMER.MSG.NEXT.REQUESTS.{name}" for name in consumers),
        *(f"$JS.ACK.REQUESTS.{name}.>" for name in consumers),
        "$SYS.REQ.USER.INFO",
        "_INBOX.>",  # where callers wait for their results
    ]
    subscribe = [
        "_INBOX.>",
        subjects.cancels(model),
        subjects.handover(model, "*"),
        subjects.control(model, "*"),
        subjects.overlap(model, "*"),
    ]
    return publish, subscribe


def write_configuration(folder: Path, model: str) -> Path:
    """The broker's configuration with two users, ``gateway`` and ``inferer``; their passwords are
    their names."""
    publish, subscribe = inferer_permissions(model)
    users = f"""[
      {{ user: gateway, password: gateway }}
      {{ user: inferer, password: inferer, permissions: {{
        publish: {{ allow: {_listed(publish)} }}
        subscribe: {{ allow: {_listed(subscribe)} }}
      }} }}
    ]"""
    text = CONFIGURATION.read_text()
    text = text.replace("[{ nkey: $anybody }]", users)
    text = re.sub(r"^(no_auth_user|anybody): .*", "", text, flags=re.MULTILINE)
    path = folder / "rights.conf"
    path.write_text(text)
    return path


def _listed(names: list[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"
