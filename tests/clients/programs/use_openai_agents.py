"""OpenAI's agents."""

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
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
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent

set_tracing_disabled(True)


def agent(served: Served, model: str, **options: object) -> Agent:
    kind = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}[served.api]
    client = AsyncOpenAI(base_url=served.url, api_key="unused")
    return Agent(
        "assistant",
        model=kind(model, client),
        model_settings=ModelSettings(temperature=0, max_tokens=MAX_TOKENS),
        **options,
    )


async def plain(served: Served) -> str:
    return (await Runner.run(agent(served, served.model), QUESTION)).final_output


async def stream(served: Served) -> list[str]:
    events = Runner.run_streamed(agent(served, served.model), QUESTION).stream_events()
    raw = [event.data async for event in events if event.type == "raw_response_event"]
    return [event.delta for event in raw if isinstance(event, ResponseTextDeltaEvent)]


async def structured(served: Served) -> Person:
    asked = agent(served, served.model, output_type=Person)
    return (await Runner.run(asked, ABOUT_A_PERSON)).final_output


async def tools(served: Served) -> str:
    """Streamed."""
    asked = agent(served, served.caller, tools=[function_tool(get_weather)])
    running = Runner.run_streamed(asked, ABOUT_THE_WEATHER)
    async for _ in running.stream_events():
        pass
    return running.final_output


run(plain, stream, structured, tools)
