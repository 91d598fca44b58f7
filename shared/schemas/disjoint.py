"""Whether schemas exclude each other, so that `oneOf` can be enforced as `anyOf`."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

Resolve = Callable[[str], Any]
"""The schema that a reference names; raises LookupError if it is not found."""

TYPES = frozenset({"null", "boolean", "integer", "fraction", "string", "array", "object"})
"""Those of JSON Schema, except that a number is an integer or a fraction, and never both."""

MAX_DEPTH = 16
"""Of references, `allOf` and properties that are followed."""


@dataclass
class _Facts:
    """What is known of every value that is valid under a schema."""

    types: frozenset[str] = TYPES
    values: frozenset[str] | None = None
    """All possible values, in a normal form; None if they are not listed."""
    properties: dict[str, list[Any]] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    names: set[str] | None = None
    """All possible names of properties; None if there may be others."""
    choices: list[list[Any]] = field(default_factory=list)
    """At least one schema of each is valid."""


class Disjointness:
    """Compares the schemas of one document."""

    def __init__(self, resolve: Resolve, ref_has_siblings: bool) -> None:
        """``ref_has_siblings``: keywords beside a `$ref` count, as they do since draft 2019-09."""
        self._resolve = resolve
        self._ref_has_siblings = ref_has_siblings
        self._known: dict[int, _Facts] = {}

    def of_all(self, schemas: Iterable[Any]) -> bool:
        """Whether each value is valid under at most one of ``schemas``, as far as is easily seen.
        False if it is not known."""
        return all(self._of(left, right, 0) for left, right in combinations(schemas, 2))

    def _of(self, left: Any, right: Any, depth: int) -> bool:
        if left is False or right is False:
            return True
        if depth > MAX_DEPTH or not (isinstance(left, dict) and isinstance(right, dict)):
            return False
        one, other = self._facts(left), self._facts(right)
        common = one.types & other.types
        if not common:
            return True
        if one.values is not None and other.values is not None and not one.values & other.values:
            return True
        if common == {"object"} and self._of_objects(one, other, depth):
            return True
        return any(
            all(self._of(choice, schema, depth + 1) for choice in choices)
            for facts, schema in ((one, right), (other, left))
            for choices in facts.choices
        )

    def _of_objects(self, one: _Facts, other: _Facts, depth: int) -> bool:
        for name in one.required | other.required:
            for left in one.properties.get(name, []):
                for right in other.properties.get(name, []):
                    if self._of(left, right, depth + 1):
                        return True
        return any(
            facts.names is not None and not required <= facts.names
            for facts, required in ((one, other.required), (other, one.required))
        )

    def _facts(self, schema: dict[str, Any]) -> _Facts:
        facts = self._known.get(id(schema))
        if facts is None:
            facts = self._known[id(schema)] = _Facts()
            self._collect(schema, facts, 0)
        return facts

    def _collect(self, schema: Any, facts: _Facts, depth: int) -> None:
        """Add to ``facts`` what ``schema`` demands."""
        if depth > MAX_DEPTH or not isinstance(schema, dict) or {"$id", "id"} & set(schema):
            return  # what is not known excludes nothing; with an id it has its own references
        if isinstance(reference := schema.get("$ref"), str):
            with suppress(LookupError):
                self._collect(self._resolve(reference), facts, depth + 1)
            if not self._ref_has_siblings:
                return
        if "type" in schema:
            named = schema["type"]
            facts.types &= _types([named] if isinstance(named, str) else named)
        for keyword in ("const", "enum"):
            if keyword in schema:
                listed = [schema["const"]] if keyword == "const" else schema["enum"]
                values = frozenset(map(_normal, listed))
                facts.values = values if facts.values is None else facts.values & values
                facts.types &= frozenset(map(_type_of, listed))
        properties = schema.get("properties", {})
        for name, value in properties.items():
            facts.properties.setdefault(name, []).append(value)
        facts.required.update(schema.get("required", []))
        if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
            names = set(properties)
            facts.names = names if facts.names is None else facts.names & names
        for part in schema.get("allOf", []):
            self._collect(part, facts, depth + 1)
        facts.choices += [schema[name] for name in ("anyOf", "oneOf") if name in schema]


def _types(named: Iterable[str]) -> frozenset[str]:
    found = set(named)
    return frozenset(found - {"number"} | ({"integer", "fraction"} if "number" in found else set()))


def _type_of(value: Any) -> str:
    value = _as_number(value)
    kinds: dict[type, str] = {
        type(None): "null",
        bool: "boolean",
        int: "integer",
        float: "fraction",
        str: "string",
        list: "array",
        dict: "object",
    }
    return kinds[type(value)]


def _normal(value: Any) -> str:
    """The same text for values that are equal to JSON Schema: 1 and 1.0 are."""
    return json.dumps(_normalized(value), sort_keys=True)


def _normalized(value: Any) -> Any:
    if isinstance(value, list):
        return [_normalized(item) for item in value]
    if isinstance(value, dict):
        return {name: _normalized(item) for name, item in value.items()}
    return _as_number(value)


def _as_number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
