"""pydantic-ai, whose answers are objects by a forced call, its default, or under a schema."""

from harness import (
    ABOUT_A_PERSON,
    ABOUT_THE_WEATHER,
    MAX_TOKENS,
    QUESTION,
    Person,
    Served,
    get_weather,
    run,
)
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


def agent(served: Served, model: str, **options: object) -> Agent:
    kind = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[served.api]
    provider = OpenAIProvider(base_url=served.url, api_key="unused")
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS}
    return Agent(kind(model, provider=provider), model_settings=settings, **options)


def plain(served: Served) -> str:
    return agent(served, served.model).run_sync(QUESTION).output


async def stream(served: Served) -> list[str]:
    async with agent(served, served.model).run_stream(QUESTION) as answer:
        return [text async for text in answer.stream_text(delta=True, debounce_by=None)]


def structured(served: Served) -> Person:
    asked = agent(served, served.model, output_type=NativeOutput(Person))
    return asked.run_sync(ABOUT_A_PERSON).output


def forced(served: Served) -> Person:
    return agent(served, served.model, output_type=Person).run_sync(ABOUT_A_PERSON).output


def tools(served: Served) -> str:
    asked = agent(served, served.caller, tools=[get_weather])
    return asked.run_sync(ABOUT_THE_WEATHER).output


run(plain, stream, structured, forced, tools)
