"""Every parameter of the official client is honoured, refused or without effect: what a later
version of the client adds fails here until it is decided."""

import json
import typing
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from openai.types import (
    chat,
    completion_create_params,
    embedding_create_params,
    responses,
    shared_params,
)
from openai.types.chat import (
    ChatCompletionMessageParam,
    ChatCompletionToolUnionParam,
    chat_completion_assistant_message_param,
    chat_completion_content_part_param,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import response_create_params
from openai.types.shared.reasoning_effort import ReasoningEffort

from services.gateway.http.openai.inputs import EmbeddingsRequest, RerankRequest
from services.gateway.http.openai.parameters import Body, Refused, WithoutEffect
from services.gateway.http.openai.requests import (
    ChatRequest,
    CompletionRequest,
    ContentRefusal,
    ContentText,
    OpenAIMessage,
    StreamOptions,
)
from services.gateway.http.openai.responses import input_types, requests
from services.gateway.http.openai.responses.requests import ResponseRequest
from services.gateway.validation.decode import decode_body
from shared.errors import InvalidRequest
from shared.wire.api import Submission
from shared.wire.requests import ChatMessage, GrammarFormat, JsonObject, JsonSchema, RegexFormat
from shared.wire.strict import (
    StrictChosenFunction,
    StrictChosenTool,
    StrictFormat,
    StrictFunction,
    StrictJsonObject,
    StrictJsonSchema,
    StrictNamedSchema,
    StrictPlainText,
    StrictTool,
)

CHATS = {"messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"prompt": "hi"}
BODIES: list[tuple[type[Body], dict[str, Any]]] = [
    (ChatRequest, CHATS),
    (CompletionRequest, PROMPT),
    (EmbeddingsRequest, {"input": "hi"}),
    (RerankRequest, {"query": "a", "documents": ["b"]}),
    (ResponseRequest, {"input": "hi"}),
]
TEXT_BODIES = [BODIES[0], BODIES[1], BODIES[4]]
OTHERS = [
    pytest.param(kind, needed, name, other, id=f"{kind.__name__} {name}")
    for kind, needed in BODIES
    for name, other in kind.others.items()
]
CONTAINED: dict[type[msgspec.Struct], list[Any]] = {
    StreamOptions: [ChatCompletionStreamOptionsParam],
    OpenAIMessage: [
        *typing.get_args(ChatCompletionMessageParam),
        chat.ChatCompletionMessage,
        chat.ParsedChatCompletionMessage,
    ],
    ContentText: [chat.ChatCompletionContentPartTextParam],
    ContentRefusal: [chat.ChatCompletionContentPartRefusalParam],
    StrictTool: [chat.ChatCompletionFunctionToolParam],
    StrictFunction: [shared_params.FunctionDefinition],
    StrictChosenTool: [chat.ChatCompletionNamedToolChoiceParam],
    StrictChosenFunction: [chat.chat_completion_named_tool_choice_param.Function],
    StrictPlainText: [shared_params.ResponseFormatText],
    StrictJsonObject: [shared_params.ResponseFormatJSONObject],
    StrictJsonSchema: [shared_params.ResponseFormatJSONSchema],
    StrictNamedSchema: [shared_params.response_format_json_schema.JSONSchema],
    requests.StreamOptions: [response_create_params.StreamOptions],
    requests.TextOptions: [responses.ResponseTextConfigParam],
    requests.SchemaFormat: [responses.ResponseFormatTextJSONSchemaConfigParam],
    requests.ReasoningOptions: [shared_params.Reasoning],
    requests.FunctionTool: [responses.FunctionToolParam],
    requests.NamedFunction: [responses.ToolChoiceFunctionParam],
    requests.AllowedTools: [responses.ToolChoiceAllowedParam],
    input_types.MessageItem: [
        responses.response_input_item_param.Message,
        responses.ResponseInputMessageItem,
    ],
    input_types.AnswerItem: [
        responses.EasyInputMessageParam,
        responses.ResponseOutputMessageParam,
        responses.ResponseOutputMessage,
    ],
    input_types.CallItem: [
        responses.ResponseFunctionToolCallParam,
        responses.ResponseFunctionToolCallItem,
    ],
    input_types.CallOutputItem: [
        responses.response_input_item_param.FunctionCallOutput,
        responses.ResponseFunctionToolCallOutputItem,
    ],
    input_types.ReasoningItem: [
        responses.ResponseReasoningItemParam,
        responses.ResponseReasoningItem,
    ],
    input_types.AnyItem: [responses.response_input_item_param.ItemReference],
    input_types.InputText: [responses.ResponseInputTextParam],
    input_types.OutputText: [responses.ResponseOutputTextParam, responses.ResponseOutputText],
    input_types.Refusal: [responses.ResponseOutputRefusalParam],
}
"""The structs of what is inside parameters, and the client's types of the same."""
REFUSED_PARTS = {"image_url", "input_audio", "file"}
REFUSED_TOOLS = {"custom"}


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ChatRequest, chat_create_params.CompletionCreateParamsNonStreaming),
        (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
        (CompletionRequest, completion_create_params.CompletionCreateParamsNonStreaming),
        (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
        (EmbeddingsRequest, embedding_create_params.EmbeddingCreateParams),
        (ResponseRequest, response_create_params.ResponseCreateParamsNonStreaming),
        (ResponseRequest, response_create_params.ResponseCreateParamsStreaming),
    ],
)
def test_every_parameter_of_the_client_is_decided(kind: type[Body], params: Any) -> None:
    assert set(typing.get_type_hints(params)) <= {*kind.__struct_fields__, *kind.others}


@pytest.mark.parametrize("kind", [kind for kind, _ in BODIES])
def test_no_parameter_is_decided_twice(kind: type[Body]) -> None:
    assert not set(kind.__struct_fields__) & set(kind.others)


@pytest.mark.parametrize(
    ("struct", "theirs"), CONTAINED.items(), ids=lambda one: getattr(one, "__name__", "")
)
def test_every_name_inside_a_parameter_is_decided(
    struct: type[msgspec.Struct], theirs: list[Any]
) -> None:
    """What the client's types of requests have; of messages and items, which are sent back, also
    those of its responses. Any other name is refused."""
    config = struct.__struct_config__
    ours = {*struct.__struct_encode_fields__, config.tag_field}
    assert config.forbid_unknown_fields
    for one in theirs:
        assert _names(one) <= ours, one


def test_every_kind_of_what_is_inside_a_parameter_is_decided() -> None:
    """The roles of messages, and the types of their parts, of tools and of formats."""
    messages = map(typing.get_type_hints, typing.get_args(ChatCompletionMessageParam))
    roles = set().union(*(typing.get_args(one["role"]) for one in messages))
    assert roles == set(typing.get_args(typing.get_type_hints(OpenAIMessage)["role"]))
    parts = (
        *typing.get_args(chat_completion_content_part_param.ChatCompletionContentPartParam),
        *typing.get_args(chat_completion_assistant_message_param.ContentArrayOfContentPart),
    )
    assert _types(parts) == {"text", "refusal"} | REFUSED_PARTS
    assert _types(typing.get_args(ChatCompletionToolUnionParam)) == {"function"} | REFUSED_TOOLS
    formats = typing.get_args(chat_create_params.ResponseFormat)
    ours = {one.__struct_config__.tag for one in typing.get_args(StrictFormat)}
    assert _types(formats) == ours - {"grammar", "regex"}


def test_every_effort_of_reasoning_is_known() -> None:
    (theirs,) = (one for one in typing.get_args(ReasoningEffort) if one is not type(None))
    ours = typing.get_type_hints(ChatRequest)["reasoning_effort"]
    assert set(typing.get_args(theirs)) == set(typing.get_args(typing.get_args(ours)[0]))


@pytest.mark.parametrize(("kind", "needed", "name", "other"), OTHERS)
def test_what_is_not_used_is_refused_unless_it_asks_for_nothing(
    kind: type[Body], needed: dict[str, Any], name: str, other: Refused | WithoutEffect
) -> None:
    for value in (None, "", [], {}, *getattr(other, "nothing", ())):
        _read(kind, {**needed, name: value})
    for value in ({"a": 1}, "x" * 1000, ["x"]):
        if isinstance(other, WithoutEffect):
            _read(kind, {**needed, name: value})
            continue
        with pytest.raises(InvalidRequest, match=f"^{name}: not supported: ") as raised:
            _read(kind, {**needed, name: value})
        assert raised.value.param == name


@pytest.mark.parametrize(("kind", "needed"), BODIES)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("modle", "did you mean model?"),
        ("zzz", "the fields are"),
        ("x" * 100_000, "the fields are"),
    ],
    ids=["typo", "other", "long"],
)
def test_an_unknown_name_is_refused(
    kind: type[Body], needed: dict[str, Any], name: str, hint: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        _read(kind, {**needed, name: None})
    assert raised.value.param == name[:80]
    assert hint in raised.value.message


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"repetition_penalty": 1.5}, "repeat_penalty", 1.5),
        ({"n_predict": 7}, "max_tokens", 7),
        ({"max_tokens": 7, "max_output_tokens": 7, "n_predict": 7}, "max_tokens", 7),
        ({"top_k": -1}, "top_k", 0),
        ({"seed": -1}, "seed", None),
        ({"seed": -2}, "seed", -2),
        ({"priority": -5}, "priority", "high"),
        ({"priority": 0}, "priority", "normal"),
        ({"priority": 12}, "priority", "low"),
        ({"priority": "low"}, "priority", "low"),
        ({"grammar": 'root ::= "a"'}, "response_format", GrammarFormat('root ::= "a"')),
        ({"guided_grammar": "x"}, "response_format", GrammarFormat("x")),
        ({"guided_regex": "[ab]+"}, "response_format", RegexFormat("[ab]+")),
        ({"guided_choice": ["a.b", "ü"]}, "response_format", RegexFormat(r"a\x2eb|ü")),
        ({"guided_choice": []}, "response_format", None),
        ({"structured_outputs": {"regex": "a"}}, "response_format", RegexFormat("a")),
        ({"structured_outputs": {"choice": ["a"]}}, "response_format", RegexFormat("a")),
        ({"structured_outputs": {"grammar": "x"}}, "response_format", GrammarFormat("x")),
        ({"structured_outputs": {"json_object": True}}, "response_format", JsonObject()),
        ({"structured_outputs": {}}, "response_format", None),
        ({"stop": [], "tools": None}, "stop", []),
    ],
    ids=str,
)
def test_the_words_of_other_servers_are_ours(
    options: dict[str, Any], field: str, value: object
) -> None:
    """The same on all routes that generate text."""
    for kind, needed in TEXT_BODIES:
        given = {name: one for name, one in options.items() if name in kind.__struct_fields__}
        submission = _submission(_read(kind, {**needed, **given}))
        assert getattr(submission, field) == value


def test_a_response_knows_all_words_that_a_chat_knows() -> None:
    """Those of other servers, and Sluice's own; those of OpenAI differ."""
    known = {*ChatRequest.__struct_fields__, *ChatRequest.others}
    foreign = known - set(
        typing.get_type_hints(chat_create_params.CompletionCreateParamsNonStreaming)
    )
    assert len(foreign) > 60
    assert foreign <= {*ResponseRequest.__struct_fields__, *ResponseRequest.others}


def test_a_response_has_one_format_and_one_length() -> None:
    for options, param in (
        ({"text": {"format": {"type": "json_object"}}, "guided_json": {}}, "guided_json"),
        ({"max_output_tokens": 5, "n_predict": 6}, "n_predict"),
    ):
        with pytest.raises(InvalidRequest) as raised:
            _submission(_read(ResponseRequest, {"input": "hi", **options}))
        assert raised.value.param == param


@pytest.mark.parametrize("name", ["guided_json", "json_schema", "structured_outputs"])
@pytest.mark.parametrize("as_text", [False, True], ids=["object", "text"])
def test_a_schema_by_any_name(name: str, as_text: bool) -> None:
    """It may be an object, or JSON as text."""
    schema = {"type": "object", "required": ["é"]}
    value: Any = json.dumps(schema) if as_text else schema
    value = {"json": value} if name == "structured_outputs" else value
    (submission,) = _read(ChatRequest, {**CHATS, name: value}).submissions()
    assert isinstance(submission.response_format, JsonSchema)
    assert submission.response_format.json_schema.schema == schema


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"max_tokens": 5, "n_predict": -1}, "n_predict"),
        ({"n_predict": 0}, "n_predict"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"grammar": "x", "guided_regex": "x"}, "guided_regex"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_json": 5}, "guided_json"),
        (
            {"structured_outputs": {"disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
        ({"stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        (
            {"stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
    ids=str,
)
def test_a_contradiction_is_named(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        _read(ChatRequest, {**CHATS, **options}).submissions()
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [("grammar", "x" * 40_000), ("guided_regex", "x" * 40_000), ("guided_choice", ["/" * 10_000])],
    ids=["grammar", "regex", "choice"],
)
def test_a_grammar_has_a_bound_by_any_name(name: str, value: Any) -> None:
    """That of what an inferer reads, where a choice is a regular expression."""
    with pytest.raises(InvalidRequest, match="more than the limit of 32768") as raised:
        _read(ChatRequest, {**CHATS, name: value}).submissions()
    assert raised.value.param == name


def test_a_refusal_is_what_an_assistant_said() -> None:
    """As a field or as a part; with null where nothing was said."""
    messages = [
        {"role": "assistant", "content": None, "refusal": "no", "annotations": [], "audio": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
        {"role": "assistant", "content": None, "refusal": None, "function_call": None},
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"x": 1}}]},
    ]
    (submission,) = _read(ChatRequest, {"messages": messages}).submissions()
    assert [message.text for message in submission.messages or []] == ["no", "never", "", "a"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_sent_back_by_either_name(name: str) -> None:
    message = {"role": "assistant", "content": "x", name: "because"}
    (submission,) = _read(ChatRequest, {"messages": [message]}).submissions()
    assert [one.reasoning_content for one in submission.messages or []] == ["because"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "name": "f", "content": "x"}, "role"),
        ({"role": "user", "content": "x", "refusal": "x"}, "refusal"),
        ({"role": "assistant", "content": "x", "audio": {"id": "x"}}, "audio"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": "x", "prefix": True}, "prefix"),
        ({"role": "assistant", "content": "x", "contnt": "y"}, "contnt"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "a": 1}]}, "content[0].a"),
    ],
)
def test_what_a_message_cannot_have_is_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        _read(ChatRequest, {"messages": [*CHATS["messages"], message]}).submissions()
    assert raised.value.param == f"messages[1].{param}"


FUNCTION: Any = {"name": "f", "parameters": {"type": "object"}}
TOOL: Any = {"type": "function", "function": FUNCTION}
SCHEMA: Any = {"name": "a", "schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("kind", "options", "param", "hint"),
    [
        (ChatRequest, {"tools": [{**TOOL, "functoin": 1}]}, "tools[0].functoin", "function"),
        (
            ChatRequest,
            {"tools": [TOOL, {**TOOL, "function": {**FUNCTION, "strickt": True}}]},
            "tools[1].function.strickt",
            "strict",
        ),
        (
            ChatRequest,
            {"tool_choice": {"type": "function", "function": {"name": "f", "nam": "g"}}},
            "tool_choice.function.nam",
            "name",
        ),
        (
            ChatRequest,
            {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA, "strickt": 1}}},
            "response_format.json_schema.strickt",
            "strict",
        ),
        (
            CompletionRequest,
            {"response_format": {"type": "regex", "pattern": "a", "patern": "b"}},
            "response_format.patern",
            "pattern",
        ),
        (
            ResponseRequest,
            {"tools": [{"type": "function", "name": "f", "sctrict": True}]},
            "tools[0].sctrict",
            "strict",
        ),
        (
            ResponseRequest,
            {"text": {"format": {"type": "json_schema", **SCHEMA, "strickt": True}}},
            "text.format.strickt",
            "strict",
        ),
        (
            ResponseRequest,
            {"tool_choice": {"type": "function", "name": "f", "nme": "g"}},
            "tool_choice.nme",
            "name",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_an_unknown_name_inside_a_parameter_is_refused(
    kind: type[Body], options: dict[str, Any], param: str, hint: str
) -> None:
    """The nearest one is named."""
    (needed,) = (body for one, body in BODIES if one is kind)
    with pytest.raises(InvalidRequest) as raised:
        _read(kind, {**needed, **options})
    assert raised.value.param == param
    assert f"did you mean {hint}?" in raised.value.message


def test_tools_of_a_response_have_a_bound() -> None:
    """That of what an inferer reads."""
    tools = [{"type": "function", "name": f"f{number}"} for number in range(129)]
    with pytest.raises(InvalidRequest, match="128") as raised:
        _read(ResponseRequest, {"input": "hi", "tools": tools})
    assert raised.value.param == "tools"


def test_a_tool_of_a_response_may_ask_for_what_happens_anyway() -> None:
    tool = {"type": "function", "name": "f", "async": False, "defer_loading": False}
    tool |= {"allowed_callers": ["direct"], "output_schema": None}
    _read(ResponseRequest, {"input": "hi", "tools": [tool]})
    for name, value, why in (
        ("async", True, r"tools\[0\]\.async must be false, not true"),
        ("allowed_callers", ["programmatic"], "must be direct, not 'programmatic'"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            _read(ResponseRequest, {"input": "hi", "tools": [{**tool, name: value}]})


@pytest.mark.parametrize(
    ("prompt", "jobs"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, [1, 2])]),
        ([[1, 2], "a"], [(None, [1, 2]), ("a", None)]),
        (["x"] * 64, [("x", None)] * 64),
    ],
)
def test_each_prompt_is_a_job(prompt: Any, jobs: list[Any]) -> None:
    submissions = _read(CompletionRequest, {"prompt": prompt}).submissions()
    assert [(one.prompt, one.prompt_tokens) for one in submissions] == jobs


@pytest.mark.parametrize("prompt", [["x"] * 65, [1, "a"], [], [[]], [""], [-1]], ids=str)
def test_prompts_that_are_none_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        _read(CompletionRequest, {"prompt": prompt})


def test_echo_needs_texts() -> None:
    with pytest.raises(InvalidRequest, match="echo"):
        _read(CompletionRequest, {"prompt": [1], "echo": True}).submissions()


def _submission(body: Any) -> Submission:
    """Its only job."""
    if isinstance(body, ResponseRequest):
        return body.submission([], [ChatMessage("user", "hi")])
    (submission,) = body.submissions()
    assert isinstance(submission, Submission)
    return submission


def _names(theirs: Any) -> set[str]:
    """Those of the fields of one of the client's types, as they are sent."""
    fields = getattr(theirs, "model_fields", None)
    if fields is None:
        return set(typing.get_type_hints(theirs))
    return {field.alias or name for name, field in fields.items()}


def _types(theirs: Iterable[Any]) -> set[str]:
    """The values of their fields `type`."""
    return {tag for one in theirs for tag in typing.get_args(typing.get_type_hints(one)["type"])}


def _read(kind: Any, body: dict[str, Any]) -> Any:
    encoded = json.dumps(body).encode()
    kind.check_names(encoded)
    read = decode_body(encoded, kind)
    assert isinstance(read, Body)
    return read
