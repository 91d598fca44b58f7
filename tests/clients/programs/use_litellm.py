"""litellm."""

import json
from typing import Any

import litellm
from harness import (
    ABOUT_A_PERSON,
    ABOUT_THE_WEATHER,
    MAX_TOKENS,
    QUESTION,
    TEXTS,
    Person,
    Served,
    get_weather,
    run,
)

GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": get_weather.__doc__,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Bergen"]}},
            "required": ["city"],
        },
    },
}


def ask(served: Served, model: str, messages: Any, **options: object) -> Any:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    provider = {"chat": "openai", "responses": "openai/responses"}[served.api]
    return litellm.completion(
        f"{provider}/{model}",
        messages,
        api_base=served.url,
        api_key="unused",
        temperature=0,
        max_tokens=MAX_TOKENS,
        **options,
    )


def plain(served: Served) -> str:
    return ask(served, served.model, QUESTION).choices[0].message.content


def stream(served: Served) -> list[str]:
    chunks = ask(served, served.model, QUESTION, stream=True)
    return [chunk.choices[0].delta.content or "" for chunk in chunks]


def structured(served: Served) -> Person:
    answer = ask(served, served.model, ABOUT_A_PERSON, response_format=Person)
    return Person.model_validate_json(answer.choices[0].message.content)


def tools(served: Served) -> str:
    messages = [{"role": "user", "content": ABOUT_THE_WEATHER}]
    while True:
        answer = ask(served, served.caller, messages, tools=[GET_WEATHER])
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def embeddings(served: Served) -> list[list[float]]:
    answer = litellm.embedding(
        f"openai/{served.embedder}", input=TEXTS, api_base=served.url, api_key="unused"
    )
    return [one["embedding"] for one in answer.data]


run(plain, stream, structured, tools, embeddings)
