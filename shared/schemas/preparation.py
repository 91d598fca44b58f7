"""Prepares a JSON schema for llguidance. Refuses by name what cannot be enforced (decision 45)."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

from shared.schemas.disjoint import Disjointness
from shared.schemas.formats import FORMATS
from shared.schemas.patterns import rust_pattern

Schema = dict[str, Any]

UNREACHABLE = 2**24
"""No answer has this many characters, items or properties: such a bound is dropped."""
UPPER_BOUNDS = ("maxLength", "maxItems", "maxProperties")
COUNTS = (*UPPER_BOUNDS, "minLength", "minItems", "minProperties")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

UNENFORCED = (
    "$dynamicAnchor",
    "$dynamicRef",
    "$recursiveAnchor",
    "$recursiveRef",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "if",
    "not",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
)
"""Keywords of any draft that llguidance does not implement. Some versions of `$schema` do not know
some of them, and would ignore them."""
CONTENT = ("contentEncoding", "contentMediaType")
"""Annotations since draft 2019-09; before, validators may check them."""
DROPPED = (
    *UNENFORCED,
    *CONTENT,
    "contentSchema",
    "deprecated",
    "else",
    "maxContains",
    "minContains",
    "then",
    "x-guidance",
)
"""Keywords that have no effect where they are not refused, and which llguidance does not accept.
`x-guidance` would change its options."""

MAPS_OF_SCHEMAS = ("properties", "patternProperties")
LISTS_OF_SCHEMAS = ("prefixItems", "items")
SINGLE_SCHEMAS = ("items", "additionalProperties", "additionalItems")
COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
OBJECT_KEYWORDS = (*MAPS_OF_SCHEMAS, "additionalProperties", "required", "minProperties")
BESIDE_REF = (
    *(*UNENFORCED, *CONTENT, *COUNTS, *NUMBERS, *OBJECT_KEYWORDS, *LISTS_OF_SCHEMAS),
    *("allOf", "anyOf", "const", "enum", "format", "multipleOf", "oneOf", "pattern", "type"),
)
"""Keywords that an old draft ignores beside a `$ref`."""

MAX_PATH_CHARS = 200


class Unenforceable(ValueError):
    """The message names the keyword and where it is."""

    def __init__(self, keyword: str, path: str, why: str = "") -> None:
        place = f" (at {path[:MAX_PATH_CHARS]})" if path else ""
        super().__init__(f"`{keyword}`{place} cannot be enforced{why and ': '}{why}")


class _Place(NamedTuple):
    """A schema in the document."""

    node: Schema
    path: str
    root: Schema
    """Where the references around it begin."""
    closes: bool
    """Whether no other schema describes the same value: in combination, each would forbid the
    properties of the others."""

    @property
    def base(self) -> Schema:
        """Where the references in this schema begin."""
        return self.node if _has_own_base(self.node) else self.root

    def inside(self, node: Any, path: str) -> "_Place":
        """A schema in this one."""
        closes = self.closes and self.passes_on
        return _Place(node, f"{self.path}/{path}", self.base, closes)

    @property
    def combining(self) -> list[str]:
        return [name for name in COMBINING if name in self.node]

    @property
    def passes_on(self) -> bool:
        """Whether this schema adds nothing of its own to a single other one."""
        names = self.combining
        return not names or (
            len(names) == 1
            and not any(name in self.node for name in OBJECT_KEYWORDS)
            and (names != ["allOf"] or len(self.node["allOf"]) == 1)
        )


OLD_DRAFT = re.compile(r"https?://json-schema\.org/draft-0[467]/schema#?")
"""Drafts in which keywords beside a `$ref` are ignored."""


def prepared(schema: Schema) -> Schema:
    """``schema``, valid under its meta-schema, as llguidance is to compile it. Every value that is
    valid under the result is valid under ``schema``.

    An object that names its properties, and does not say whether there may be others, has no
    others: a model might go on inventing them. Not where several schemas describe it together.

    Raises:
        Unenforceable: it has a keyword that cannot be enforced.
    """
    root: Schema = json.loads(json.dumps(schema))
    ref_has_siblings = not OLD_DRAFT.fullmatch(str(root.get("$schema")))
    places = _reachable(root, ref_has_siblings)
    _refuse_circles(places)
    for place in places:
        _refuse_unenforced(place, ref_has_siblings)
    # Only then: an object that is closed here may seem to exclude another one.
    for place in places:
        _prepare(place)
    return root


def _reachable(root: Schema, ref_has_siblings: bool) -> list[_Place]:
    """All schemas that describe a part of the answer, each once."""
    found: dict[int, _Place] = {}
    waiting = [_Place(root, "", root, closes=True)]
    while waiting:
        place = waiting.pop()
        if not isinstance(place.node, dict):
            continue
        known = found.get(id(place.node))
        if known is not None and (place.closes or not known.closes):
            continue
        found[id(place.node)] = place
        if not ref_has_siblings and "$ref" in place.node:
            for name in BESIDE_REF:
                place.node.pop(name, None)
        waiting += _children(place)
    return list(found.values())


def _children(place: _Place) -> Iterator[_Place]:
    """The schemas that describe parts of the value, and those that describe it together."""
    yield from _of_parts(place)
    yield from _of_the_same(place)


def _of_parts(place: _Place) -> Iterator[_Place]:
    for name in (*MAPS_OF_SCHEMAS, *LISTS_OF_SCHEMAS, *SINGLE_SCHEMAS):
        value = place.node.get(name)
        if isinstance(value, dict) and name in MAPS_OF_SCHEMAS:
            for key, one in value.items():
                yield place.inside(one, f"{name}/{key}")
        elif isinstance(value, list):
            for number, one in enumerate(value):
                yield place.inside(one, f"{name}/{number}")
        elif isinstance(value, dict):
            yield place.inside(value, name)


def _of_the_same(place: _Place) -> Iterator[_Place]:
    for name in place.combining:
        value = place.node[name]
        if isinstance(value, list):
            for number, one in enumerate(value):
                yield place.inside(one, f"{name}/{number}")
        elif isinstance(value, str):
            with suppress(LookupError):
                found = resolve(place.base, value)
                yield place.inside(found, name)._replace(path=value.lstrip("#"))


def _refuse_circles(places: list[_Place]) -> None:
    """Raises: Unenforceable: a schema refers to itself, and not inside a part of the value."""
    complete: dict[int, bool] = {}

    def visit(place: _Place) -> None:
        if not isinstance(place.node, dict):
            return
        known = complete.get(id(place.node))
        if known is False:
            raise Unenforceable("$ref", place.path, "it refers to itself")
        if known is None:
            complete[id(place.node)] = False
            for other in _of_the_same(place):
                visit(other)
            complete[id(place.node)] = True

    for place in places:
        visit(place)


def _refuse_unenforced(place: _Place, ref_has_siblings: bool) -> None:
    """Raises: Unenforceable."""
    node, path = place.node, place.path
    for name in UNENFORCED:
        if name in node and _has_effect(name, node):
            raise Unenforceable(name, path)
    if not ref_has_siblings:  # an old draft
        for name in CONTENT:
            if name in node:
                raise Unenforceable(name, path)
    for name in (*NUMBERS, "const", "enum"):
        if not _is_exact(node.get(name)):
            raise Unenforceable(name, path, "a number in it has too many digits")
    if node.get("minProperties", 0) > 1 + len(node.get("required", [])):
        raise Unenforceable("minProperties", path, "a name could come twice; use `required`")
    if "format" in node and _allows_text(node) and node["format"] not in FORMATS:
        raise Unenforceable("format", path, f"use one of {', '.join(FORMATS)}, or `pattern`")
    if "oneOf" in node:
        comparison = Disjointness(partial(resolve, place.base), ref_has_siblings)
        if not comparison.of_all(node["oneOf"]):
            raise Unenforceable("oneOf", path, "two of its schemas may both match; use `anyOf`")


def _prepare(place: _Place) -> None:
    node = place.node
    if place.closes and not place.combining and "patternProperties" not in node:
        names = node.get("properties", {})
        others = set(node.get("required", [])) - set(names)
        if "properties" in node and not others and node.get("minProperties", 0) <= len(names):
            node.setdefault("additionalProperties", False)
    for name in COUNTS:
        bound = node.get(name)
        if isinstance(bound, int | float):
            if name in UPPER_BOUNDS and bound >= UNREACHABLE:
                del node[name]
            else:
                node[name] = int(bound)
    for name in DROPPED:
        node.pop(name, None)
    together: list[Schema] = []
    if "format" in node and (patterns := FORMATS.get(node["format"])) != ():
        del node["format"]
        together += [{"pattern": pattern} for pattern in patterns or ()]
    if "pattern" in node:
        node["pattern"] = _translated("pattern", node["pattern"], place)
    if "patternProperties" in node:
        node["patternProperties"] = {
            _translated("patternProperties", pattern, place): value
            for pattern, value in node["patternProperties"].items()
        }
    if "oneOf" in node:
        together.append({"anyOf": node.pop("oneOf")})
    if together:
        node["allOf"] = [*node.get("allOf", []), *together]


def _translated(keyword: str, pattern: str, place: _Place) -> str:
    try:
        return rust_pattern(pattern)
    except ValueError as error:
        raise Unenforceable(keyword, place.path, str(error)) from None


def _allows_text(node: Schema) -> bool:
    return "string" in node.get("type", "string")


def _has_effect(keyword: str, node: Schema) -> bool:
    value = node[keyword]
    match keyword:
        case "uniqueItems" | "$recursiveAnchor":
            return value is not False
        case "propertyNames" | "unevaluatedItems" | "unevaluatedProperties":
            return value is not True and value != {}
        case "dependencies" | "dependentRequired" | "dependentSchemas":
            return bool(value != {})
        case "if":
            return "then" in node or "else" in node
    return True


def _is_exact(value: Any) -> bool:
    """Whether llguidance, which computes with doubles, has the very numbers in ``value``."""
    if isinstance(value, dict):
        return all(map(_is_exact, value.values()))
    if isinstance(value, list):
        return all(map(_is_exact, value))
    try:
        return not isinstance(value, int) or int(float(value)) == value
    except OverflowError:
        return False


def _has_own_base(node: Schema) -> bool:
    names = (node.get("$id"), node.get("id"))
    return any(isinstance(name, str) and not name.startswith("#") for name in names)


def resolve(root: Schema, reference: str) -> Any:
    """The schema at the JSON pointer ``reference``, such as ``#/$defs/name``, in ``root``.

    Raises:
        LookupError: it is not there, or the reference is of another kind.
    """
    if reference != "#" and not reference.startswith("#/"):
        raise LookupError(reference)
    found: Any = root
    for token in unquote(reference[1:]).split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(name)] if isinstance(found, list) else found[name]
        except (KeyError, IndexError, ValueError, TypeError):
            raise LookupError(reference) from None
        if isinstance(found, dict) and found is not root and _has_own_base(found):
            raise LookupError(reference)  # it has references of its own
    return found
