"""The official JSON Schema test suite: each schema is enforced or refused by name, and soon.

`make .venv/json-schema-test-suite/.ready` fetches it, as `make test` does.
"""

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy
import pytest
from llguidance import LLMatcher

from shared.schemas.compiler import compile_schema
from shared.schemas.trial import tokenizer_of_bytes
from shared.schemas.trials import SchemaTrials
from shared.schemas.validator import answer_error, read_json, validator_of
from tests.support.processes import ROOT

SUITE = ROOT / ".venv/json-schema-test-suite/tests"
TRIAL_S = 2.0

DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
LEAST = {"draft4": 190, "draft6": 270, "draft7": 300, "draft2019-09": 420, "draft2020-12": 430}
"""Schemas that the suite has."""
LEAST_ENFORCED = 0.5
"""Of them; the rest is refused."""

ANSWERS = 3
"""Random ones under each schema."""
MAX_BYTES = 300
LIKELY = b'""}]0a'

END = 256
TOKENIZER = tokenizer_of_bytes()


class Case(NamedTuple):
    name: str
    schema: dict[str, Any]
    tests: list[dict[str, Any]]


def cases(draft: str) -> Iterator[Case]:
    files = sorted((SUITE / draft).rglob("*.json"))
    assert files, f"{SUITE} is missing: run `make .venv/json-schema-test-suite/.ready`"
    for file in files:
        for group in json.loads(file.read_text()):
            schema = group["schema"]
            if isinstance(schema, dict):  # a request has no other
                schema = {"$schema": DRAFTS[draft], **schema}
                yield Case(f"{file.name}: {group['description']}", schema, group["tests"])


@pytest.mark.parametrize("draft", DRAFTS)
def test_no_answer_under_a_schema_is_invalid(draft: str) -> None:
    """A schema that is accepted forbids everything that the suite calls invalid, and every random
    answer under it is valid. One that is not is refused within two seconds, with a reason."""
    trials = SchemaTrials(TRIAL_S)
    rng = random.Random(draft)
    enforced = refused = 0
    for case in cases(draft):
        reason = trials.error(case.schema)
        if reason is not None:
            assert names_its_cause(reason), (case.name, reason)
            refused += 1
            continue
        enforced += 1
        validator = validator_of(read_json(json.dumps(case.schema)))
        for test in case.tests:
            text = json.dumps(test["data"], ensure_ascii=False)
            if not test["valid"] or answer_error(validator, text) is not None:
                assert not allows(case.schema, text), (case, text)
        for _ in range(ANSWERS):
            answer = random_answer(case.schema, rng)
            if answer is not None:
                error = answer_error(validator, answer)
                assert error is None or "out of range" in error, (case, answer, error)
    trials.close()
    assert enforced + refused >= LEAST[draft]
    assert enforced / (enforced + refused) >= LEAST_ENFORCED


def names_its_cause(reason: str) -> bool:
    """Whether it names a keyword, says that no answer is valid, or quotes what is wrong."""
    causes = ("`", "Unimplemented keys: ", "Unknown format: ", "Unsatisfiable", "regex", "'")
    return any(cause in reason for cause in causes)


def allows(schema: dict[str, Any], text: str) -> bool:
    """Whether an answer under ``schema`` may be ``text``."""
    matcher = compile_schema(schema, TOKENIZER)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def random_answer(schema: dict[str, Any], rng: random.Random) -> str | None:
    """An answer of random bytes; None if it becomes too long."""
    matcher = compile_schema(schema, TOKENIZER)
    answer = bytearray()
    while len(answer) < MAX_BYTES:
        allowed = allowed_tokens(matcher)
        if not allowed or (END in allowed and rng.random() < 0.3):
            return answer.decode()
        allowed = [token for token in allowed if token != END] or allowed
        likely = [token for token in LIKELY if token in allowed]
        token = rng.choice(likely if likely and rng.random() < 0.6 else allowed)
        if token == END:
            return answer.decode()
        matcher.consume_token(token)
        answer.append(token)
    return None


def allowed_tokens(matcher: LLMatcher) -> list[int]:
    if matcher.is_stopped():
        return []
    mask = numpy.frombuffer(matcher.compute_bitmask(), dtype=numpy.uint8)
    found: list[int] = numpy.flatnonzero(numpy.unpackbits(mask, bitorder="little")).tolist()
    return found
