"""What llguidance gets for a JSON schema, and what is refused by name. Nothing is compiled here."""

import re
from typing import Any

import pytest

from shared.schemas.patterns import rust_pattern
from shared.schemas.preparation import Unenforceable, prepared

TEXT = {"type": "string"}
A, B = ({"properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab")
DRAFT_7 = "http://json-schema.org/draft-07/schema#"

UNENFORCED: dict[str, Any] = {
    "$dynamicRef": "#x",
    "$dynamicAnchor": "x",
    "$recursiveRef": "#",
    "contains": TEXT,
    "dependencies": {"a": ["b"]},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": TEXT},
    "if": TEXT,
    "not": TEXT,
    "propertyNames": {"maxLength": 3},
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "uniqueItems": True,
    "minProperties": 2,
    "format": "iri",
    "minimum": 2**53 + 1,
    "const": [{"a": 2**53 + 1}],
    "enum": [10**400],
    "pattern": "[]a",
    "oneOf": [{"minLength": 1}, {"minLength": 2}],
}


@pytest.mark.parametrize("keyword", UNENFORCED)
@pytest.mark.parametrize("dialect", [{}, {"$schema": DRAFT_7}], ids=["2020-12", "7"])
def test_a_keyword_that_cannot_be_enforced_is_named(keyword: str, dialect: dict[str, str]) -> None:
    """With its place, wherever it is, also where a draft does not know it and would ignore it."""
    schema: dict[str, Any] = {keyword: UNENFORCED[keyword]}
    if keyword == "if":
        schema["then"] = TEXT
    for path, whole in {
        "": schema,
        "/properties/a": {"properties": {"a": schema}},
        "/patternProperties/a": {"patternProperties": {"a": schema}},
        "/additionalProperties": {"additionalProperties": schema},
        "/items": {"items": schema},
        "/anyOf/1": {"anyOf": [TEXT, schema]},
        "/oneOf/1": {"oneOf": [TEXT, {"type": "integer", **schema}]},
        "/allOf/0": {"allOf": [schema]},
        "/$defs/a": {"$ref": "#/$defs/a", "$defs": {"a": schema}},
        "/elsewhere/a/0": {"$ref": "#/elsewhere/a/0", "elsewhere": {"a": [schema]}},
    }.items():
        if keyword == "format" and path == "/oneOf/1":
            continue  # an integer has no format
        with pytest.raises(Unenforceable) as refused:
            prepared({**dialect, **whole})
        assert f"`{keyword}`" in str(refused.value)
        assert path in str(refused.value)
        assert "cannot be enforced" in str(refused.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"uniqueItems": False},
        {"unevaluatedProperties": True, "unevaluatedItems": {}, "propertyNames": True},
        {"dependentRequired": {}, "dependentSchemas": {}, "dependencies": {}},
        {"if": TEXT},
        {"then": TEXT, "else": TEXT, "minContains": 1, "maxContains": 5},
        {"deprecated": True, "contentSchema": {"not": {}}, "contentEncoding": "base64"},
        {"x-guidance": {"lenient": True}},
    ],
    ids=lambda schema: next(iter(schema)),
)
def test_what_has_no_effect_is_left_out(schema: dict[str, Any]) -> None:
    """Generators write such keywords, and llguidance refuses them; or does what a client must not
    ask for: to ignore the schema."""
    assert prepared({"type": "string", **schema}) == TEXT


def test_annotations_and_unknown_keywords_are_accepted() -> None:
    """They say nothing of the answer, whatever is in them."""
    schema = {
        "title": "T",
        "description": "D",
        "default": {"not": 1},
        "examples": [{"uniqueItems": True}],
        "$comment": "C",
        "readOnly": True,
        "writeOnly": False,
        "x-order": 7,
        "enum": [{"if": 1, "then": 2}],
        "const": {"if": 1, "then": 2},
        "properties": {"not": TEXT, "if": TEXT, "$ref": TEXT, "größe 📏": TEXT},
        "additionalProperties": True,
        "$defs": {"unused": {"not": {}}},
    }
    assert prepared(schema) == schema


def test_in_old_drafts_nothing_counts_beside_a_reference() -> None:
    """As validators of these drafts see it; and they may check what is encoded in a string."""
    schema = {"$schema": DRAFT_7, "definitions": {"a": TEXT}, "$ref": "#/definitions/a"}
    assert prepared({**schema, "not": TEXT, "maxLength": 3}) == schema
    with pytest.raises(Unenforceable, match="`contentEncoding`"):
        prepared({"$schema": DRAFT_7, "contentEncoding": "base64"})


@pytest.mark.parametrize(
    "schemas",
    [
        [TEXT, {"type": ["integer", "null"]}, {"type": "array"}],
        [{"const": 1}, {"const": "1"}, {"enum": [2, True]}],
        [{"type": "integer"}, {"enum": [1.5]}, {"enum": ["x"]}],
        [{"type": "object", **A}, {"type": "object", **B}],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        [{"allOf": [{"$ref": "#/$defs/a"}]}, {"anyOf": [{"$ref": "#/$defs/b"}, TEXT]}],
        [
            {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
            {"type": "object", "required": ["b"]},
        ],
        [False, TEXT],
        [TEXT],
    ],
    ids=str,
)
def test_schemas_that_exclude_each_other_may_be_in_one_of(schemas: list[Any]) -> None:
    """It is then the same as `anyOf`."""
    kinds = {"a": {"type": "object", **A}, "b": {"type": "object", **B}}
    made = prepared({"oneOf": schemas, "$defs": kinds})
    assert "oneOf" not in made
    assert len(made["allOf"][0]["anyOf"]) == len(schemas)


@pytest.mark.parametrize(
    "schemas",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [{"const": {"a": [1]}}, {"enum": [{"a": [1.0]}]}],
        [A, B],
        [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}],
        [
            {"type": "object", "properties": {"a": {"const": 1}}},
            {"type": "object", "properties": {"a": {"const": 2}}},
        ],
        [{"$ref": "#/$defs/loop"}, TEXT],
        [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}],
        [{"$id": "http://x/y", "$ref": "#/$defs/a"}, {"type": "integer"}],
        [True, {"type": "integer"}],
        [{}, {"type": "integer"}],
    ],
    ids=str,
)
def test_schemas_that_may_both_match_may_not(schemas: list[Any]) -> None:
    """Refused, with what to do instead."""
    defined = {"loop": {"items": {"$ref": "#/$defs/loop"}}, "a": TEXT}
    with pytest.raises(Unenforceable, match=r"`oneOf` cannot be enforced: .* use `anyOf`"):
        prepared({"oneOf": schemas, "$defs": defined})


def test_an_object_that_is_closed_here_excludes_no_other() -> None:
    """With `b`, an object matches both: that the first one gets no `b` does not count, though it
    is described on its own before."""
    defined = {
        "a": {"type": "object", "properties": {"a": TEXT}},
        "b": {"type": "object", "properties": {"b": TEXT}, "required": ["b"]},
    }
    refs = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]
    for parts in ([*refs, {"oneOf": refs}], [{"oneOf": refs}, *refs]):
        with pytest.raises(Unenforceable, match="`oneOf`"):
            prepared({"prefixItems": parts, "$defs": defined})


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"anyOf": [TEXT, {"$ref": "#/$defs/a"}]}}},
        {"allOf": [{"oneOf": [{"$ref": "#"}]}]},
    ],
    ids=str,
)
def test_a_circle_is_refused(schema: dict[str, Any]) -> None:
    """A schema that refers to itself in the middle of nothing; recursion as such is accepted."""
    with pytest.raises(Unenforceable, match=r"`\$ref` .*refers to itself|`\$ref` cannot"):
        prepared(schema)
    prepared({"anyOf": [TEXT, {"items": {"$ref": "#"}}]})


def test_an_object_that_names_its_properties_has_no_others() -> None:
    """Unless the schema says something of others, or several schemas describe the object."""
    named = {"properties": {"a": TEXT}}
    closed = {**named, "additionalProperties": False}
    assert prepared(named) == closed
    assert prepared({"properties": {}}) == {"properties": {}, "additionalProperties": False}
    assert prepared({"items": {"anyOf": [named]}}) == {"items": {"anyOf": [closed]}}
    assert prepared({"allOf": [named]}) == {"allOf": [closed]}
    for schema in (
        {**named, "additionalProperties": TEXT},
        {**named, "patternProperties": {"b": TEXT}},
        {**named, "required": ["b"]},
        {**named, "minProperties": 1, "properties": {}},
        {"allOf": [named, {"properties": {"b": named}}]},
        {**named, "anyOf": [{"properties": {"b": TEXT}}]},
        {"required": ["b"], "anyOf": [named]},
    ):
        assert prepared(schema) == schema


def test_a_definition_that_is_combined_somewhere_stays_open() -> None:
    """Also where it is used alone as well, whichever comes first."""
    base = {"properties": {"a": TEXT}}
    alone, combined = {"$ref": "#/$defs/base"}, {"$ref": "#/$defs/base", "required": ["b"]}
    for uses in ([alone, combined], [combined, alone]):
        made = prepared({"prefixItems": uses, "$defs": {"base": base}})
        assert made["$defs"]["base"] == base


def test_bounds_that_no_answer_reaches_are_left_out() -> None:
    """What generators write for "no limit"; and whole numbers are written as such."""
    assert prepared({"maxLength": 2**31 - 1, "maxItems": 10**30}) == {}
    assert prepared({"maxLength": 5.0, "minItems": 2.0}) == {"maxLength": 5, "minItems": 2}


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        (r"^\s$", "\ufeff\u2003\n", "\x85a"),
        (r"^\S$", "\x85a", "\ufeff\u2003\n"),
        (r"^[\s]$", "\ufeff", "\x85"),
        (r"^[^\S]$", "\ufeff", "\x85"),
        (r"^.$", "a😀", "\n\r\u2028"),
        (r"^[.]$", ".", "a"),
        (r"^\.$", ".", "a"),
    ],
)
def test_patterns_mean_what_they_mean_in_javascript(
    pattern: str, matches: str, others: str
) -> None:
    """Where Rust means something else: here Python stands for Rust, which has the same classes."""
    written = re.sub(r"\\x\{(\w+)\}", lambda found: chr(int(found[1], 16)), rust_pattern(pattern))
    # Python has no classes in classes.
    written = written.replace("[[", "[").replace("[^[^", "[").replace("]]", "]")
    assert all(re.search(written, one) for one in matches)
    assert not any(re.search(written, one) for one in others)


def test_operators_on_classes_are_characters() -> None:
    """Rust would take `[a&&b]` for an intersection and `[[a]` for a class in a class."""
    assert rust_pattern("[[a&&b--c~]&~") == r"[\[a\&\&b\--c\~]&~"
    assert rust_pattern(r"[^\]\[a-z]\[") == r"[^\]\[a-z]\["
