"""LangChain with models whose calls of tools are written in different ways, whole and streamed."""

import json
import sys
from typing import Any

from harness import ABOUT_THE_WEATHER, called, get_weather
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

weather = tool(get_weather)


def outcome(url: str, model: str, extra_body: dict[str, Any], *, streams: bool) -> dict[str, Any]:
    """A call is forced, the tool is run, and its result is answered without another call."""
    llm = ChatOpenAI(
        base_url=url,
        api_key="unused",
        model=model,
        temperature=0,
        max_tokens=200,
        extra_body=extra_body,
    )

    def ask(messages: list, tool_choice: str, **options: object) -> Any:
        bound = llm.bind_tools([weather], tool_choice=tool_choice)
        if not streams:
            return bound.invoke(messages, **options)
        first, *others = bound.stream(messages, **options)
        for chunk in others:
            first += chunk
        return first

    called.clear()
    messages = [HumanMessage(ABOUT_THE_WEATHER)]
    answer = ask(messages, "get_weather")
    messages += [answer, *(weather.invoke(call) for call in answer.tool_calls)]
    assert isinstance(messages[-1], ToolMessage)
    end = ask(messages, "none", max_tokens=8)
    return {"called": list(called), "answer": end.text, "calls_after": len(end.tool_calls)}


arguments = json.loads(sys.argv[1])
print(
    json.dumps(
        {
            model: [
                outcome(arguments["url"], model, extra_body, streams=streams)
                for streams in (False, True)
            ]
            for model, extra_body in arguments["models"].items()
        }
    )
)
