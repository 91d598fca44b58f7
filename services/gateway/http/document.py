"""The OpenAPI document: what the framework cannot derive from our structs and streams."""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal, get_args

import msgspec
from litestar.openapi.spec import (
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    Schema,
)
from litestar.plugins import OpenAPISchemaPlugin
from litestar.types import Empty
from litestar.typing import FieldDefinition
from msgspec import Raw, Struct, UnsetType, inspect

from services.gateway.http.openai.parameters import Body, OtherParameters, WithoutEffect
from shared.wire.api import JobSubmission, TaskState
from shared.wire.listing import ID_PREFIX, PAGE, JobQuery, JobSort
from shared.wire.requests import Priority, Via

EVENT_STREAM = "text/event-stream"

RAW_FIELDS: dict[str, Any] = {
    "metadata": dict[str, Any] | None,
    "request": dict[str, Any] | None,
    "source": dict[str, Any],
    "parameters": dict[str, Any] | None,
    "input": str | list[dict[str, Any]],
    "guided_json": dict[str, Any] | str | None,
    "json_schema": dict[str, Any] | str | None,
    "json": dict[str, Any] | str | None,
    "audio": None,
    "function_call": None,
    "annotations": list[Any] | None,
    "parsed": Any,
    "provider_specific_fields": dict[str, Any] | None,
    "cache_control": dict[str, Any] | None,
    "prompt_cache_breakpoint": dict[str, Any] | None,
}
"""Fields that are passed on as raw bytes, with the type that they must contain."""

EXACTLY_ONE: dict[type[Struct], list[list[str]]] = {
    JobSubmission: [
        ["messages"],
        ["prompt"],
        ["prompt_tokens"],
        ["input"],
        ["query", "documents"],
    ]
}
"""Groups of fields of which exactly one must be given, with all its fields."""

NUMBERS = (OpenAPIType.INTEGER, OpenAPIType.NUMBER)


@dataclass
class StreamOperation(Operation):
    """A route that may respond with server-sent events, for which there is no schema."""

    def __post_init__(self) -> None:
        response = (self.responses or {})["200"]
        assert not isinstance(response, Reference)
        response.content = {**(response.content or {}), EVENT_STREAM: OpenAPIMediaType()}


_TIME = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.DATE_TIME)
_LIST_PARAMETERS: dict[str, Schema] = {
    "state": Schema(
        type=OpenAPIType.STRING,
        pattern=f"^({'|'.join(get_args(TaskState))})(,({'|'.join(get_args(TaskState))})){{0,5}}$",
        description="One or more states, separated by commas.",
    ),
    "priority": Schema(type=OpenAPIType.STRING, enum=list(get_args(Priority))),
    "via": Schema(type=OpenAPIType.STRING, enum=list(get_args(Via))),
    "id": Schema(type=OpenAPIType.STRING, pattern=ID_PREFIX),
    "since": _TIME,
    "until": _TIME,
    "sort": Schema(type=OpenAPIType.STRING, enum=list(get_args(JobSort))),
    "cursor": Schema(
        type=OpenAPIType.STRING,
        pattern="^[0-9a-f]+$",
        description="`cursor` of the previous page. With it, `sort` must be the same.",
    ),
    "limit": Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=200, default=PAGE),
}


@dataclass
class ListOperation(Operation):
    """A route that takes the parameters of a `JobQuery`."""

    def __post_init__(self) -> None:
        text = Schema(type=OpenAPIType.STRING, min_length=1)
        self.parameters = [
            Parameter(name, "query", schema=_LIST_PARAMETERS.get(name, text), required=False)
            for name in JobQuery.__struct_fields__
            if name != "metadata"
        ]


class StructSchemaPlugin(OpenAPISchemaPlugin):
    """Replaces the framework's own plugin, which fails on defaults without a hash (raw fields),
    and drops both the bounds of nullable fields and ``additionalProperties: false``."""

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        return not field_definition.is_union and field_definition.is_subclass_of(Struct)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Schema:
        hints = field_definition.get_type_hints(include_extras=True, resolve_generics=True)
        info = inspect.type_info(field_definition.type_)
        assert isinstance(info, inspect.StructType)
        required = [field.encode_name for field in info.fields if field.required]
        properties = {
            field.encode_name: FieldDefinition.from_annotation(
                RAW_FIELDS[field.name]
                if _is_raw(hints[field.name])
                else _without_unset(hints[field.name]),
                name=field.encode_name,
                default=_default(field),
            )
            for field in info.fields
        }
        if info.tag_field:
            properties[info.tag_field] = FieldDefinition.from_annotation(Literal[info.tag])
            required.append(info.tag_field)
        schema: Schema = schema_creator.create_component_schema(
            field_definition, required=sorted(required), property_fields=properties
        )
        if issubclass(info.cls, Body):
            schema.additional_properties = False
            schema.properties = {**(schema.properties or {}), **_others(info.cls.others)}
        if info.forbid_unknown_fields:
            schema.additional_properties = False
        if (groups := EXACTLY_ONE.get(info.cls)) is not None:
            schema.one_of = [_only(group, groups) for group in groups]
        for field in info.fields:
            _constrain(field.type, (schema.properties or {})[field.encode_name])
        return schema


def _others(parameters: OtherParameters) -> dict[str, Schema]:
    """The schemas of parameters that are refused or have no effect."""
    return {
        name: Schema(description=other.why)
        if isinstance(other, WithoutEffect)
        else Schema(enum=[None, *other.nothing], description=f"Not supported: {other.why}.")
        for name, other in parameters.items()
    }


def _is_raw(hint: Any) -> bool:
    """Whether ``hint`` is `Raw`, also when annotated or in a union."""
    return hint is Raw or any(_is_raw(part) for part in get_args(hint))


def _without_unset(hint: Any) -> Any:
    """``hint`` without the type of what is left out, which the framework takes for another type."""
    parts = get_args(hint)
    if UnsetType not in parts:
        return hint
    return reduce(or_, (part for part in parts if part is not UnsetType))


def _is_number(kind: inspect.Type) -> bool:
    return isinstance(kind.type if isinstance(kind, inspect.Metadata) else kind, inspect.IntType)


def _type(schema: Schema | Reference) -> Any:
    return None if isinstance(schema, Reference) else schema.type


def _only(group: list[str], groups: list[list[str]]) -> Schema:
    """A schema that requires the fields of ``group`` and forbids those of the other ``groups``."""
    null = Schema(type=OpenAPIType.NULL)
    given = dict.fromkeys(group, Schema(schema_not=null))
    others = {name: null for other in groups if other != group for name in other}
    return Schema(required=group, properties={**given, **others})


def _default(field: inspect.Field) -> Any:
    if isinstance(field.default, Raw) or field.default in (msgspec.NODEFAULT, msgspec.UNSET):
        return Empty
    return field.default


def _constrain(kind: inspect.Type, schema: Schema | Reference) -> None:
    """Add the bounds of ``kind`` to ``schema``, which was generated for the same type."""
    if isinstance(schema, Reference):
        return
    match kind:
        case inspect.Metadata():
            _constrain(kind.type, schema)
            if schema.type is not OpenAPIType.NULL:
                schema.description = (kind.extra_json_schema or {}).get("description")
        case inspect.UnionType():
            parts = list(schema.one_of or ())
            for member in kind.types:
                for part in parts:
                    _constrain(member, part)
            if OpenAPIType.NUMBER in map(_type, parts):
                # An integer is a number, too, and of ``oneOf`` only one may match.
                schema.one_of = [part for part in parts if _type(part) != OpenAPIType.INTEGER]
        case inspect.IntType() | inspect.FloatType() if schema.type in NUMBERS:
            schema.minimum, schema.maximum = kind.ge, kind.le
            schema.exclusive_minimum, schema.exclusive_maximum = kind.gt, kind.lt
        case inspect.StrType() if schema.type is OpenAPIType.STRING:
            schema.min_length, schema.max_length = kind.min_length, kind.max_length
            schema.pattern = kind.pattern
        case inspect.DictType() if schema.type is OpenAPIType.OBJECT:
            schema.max_properties = kind.max_length
            if isinstance(schema.additional_properties, Schema):
                _constrain(kind.value_type, schema.additional_properties)
            if _is_number(kind.key_type):
                schema.property_names = Schema(pattern="^[0-9]{1,10}$")
        case inspect.ListType() if schema.type is OpenAPIType.ARRAY:
            schema.min_items, schema.max_items = kind.min_length, kind.max_length
            if schema.items is not None:
                _constrain(kind.item_type, schema.items)
