"""Chat templates as models bring them: an inferer of its own for each."""

import sys
from pathlib import Path

from hypothesis import strategies as st

from shared.process.lifecycle import EXIT_CONFIGURATION
from tests.fuzz.attacks.attack import attack
from tests.fuzz.inputs.texts import texts
from tests.fuzz.target import Fault, Target
from tests.support.processes import Process, eventually
from tests.support.tiny_model import write_tiny_model

ALIAS = "odd"

PIECES = (
    *("{{ messages[0]['content'] }}", "{% for m in messages %}", "{% endfor %}", "{{ m.role }}"),
    *("{{ bos_token }}", "{{ eos_token }}", "{% if add_generation_prompt %}", "{% endif %}"),
    *(
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ nobody.nothing }}",
        "{{ messages | tojson }}",
    ),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ self }}", "{# x #}"),
    *("{% set a = 'x' * 99999 %}{{ a * 99999 }}", "{% for a in range(10 ** 9) %}{% endfor %}"),
    *("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ strftime_now('%Y') }}", "{{ tools }}"),
    *("{%- generation %}", "{% include 'x' %}", "{{ (1, 2)[messages] }}", "{{ 10 ** 10 ** 8 }}"),
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    free = st.one_of(st.sampled_from(PIECES), st.sampled_from(PIECES), texts(200))
    return "".join(draw(st.lists(free, max_size=5)))


@attack(templates(), count=2)
def template(target: Target, text: str) -> None:
    """The inferer refuses the model in one line, or its jobs end; the job of a template that never
    ends does so by its deadline."""
    folder = target.site.folder / f"odd-{target.cases}"
    folder.mkdir()
    metadata = {"tokenizer.chat_template": text}
    model = write_tiny_model(folder / f"{ALIAS}.gguf", metadata=metadata)
    inferer = _start(target, model, folder)
    try:
        if not _is_ready(inferer):
            return
        body = {
            "model": ALIAS,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 3,
            "timeout_s": 10,
        }
        job_id = target.submit(body, f"template {text!r}")
        if job_id is not None:
            target.end_of(job_id)
        if inferer.popen.poll() is not None:
            raise Fault("an inferer died of a template", inferer.output()[-1500:])
    finally:
        if inferer.popen.poll() is None:
            inferer.terminate()
        (folder / f"{ALIAS}.gguf").unlink()


def _start(target: Target, model: Path, folder: Path) -> Process:
    return Process(
        [sys.executable, "-m", "services.inferer"],
        folder / "inferer.log",
        {
            "NATS_URL": target.site.node.url,
            "INFERER_MODEL": str(model),
            "INFERER_ID": ALIAS,
            "INFERER_THREADS": "1",
            "INFERER_GRACE_S": "0.5",
        },
    )


def _is_ready(inferer: Process) -> bool:
    """Raises: Fault: it has ended otherwise than with one line that says why."""

    def has_started() -> bool:
        return bool(inferer.events("inferer_ready")) or inferer.popen.poll() is not None

    eventually(has_started, "the inferer is ready, or has ended")
    if inferer.events("inferer_ready"):
        return True
    if inferer.wait() != EXIT_CONFIGURATION or "Traceback" in inferer.output():
        raise Fault("an inferer died of a template", inferer.output()[-1500:])
    return False
