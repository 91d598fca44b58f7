"""LlamaIndex."""

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
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike


def chat(served: Served, model: str) -> OpenAILike | OpenAIResponses:
    if served.api == "responses":
        return OpenAIResponses(
            api_base=served.url,
            api_key="unused",
            model=model,
            context_window=4096,
            temperature=0,
            max_output_tokens=MAX_TOKENS,
        )
    return OpenAILike(
        api_base=served.url,
        api_key="unused",
        model=model,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        temperature=0,
        max_tokens=MAX_TOKENS,
    )


def plain(served: Served) -> str:
    return chat(served, served.model).chat([ChatMessage(QUESTION)]).message.content


def stream(served: Served) -> list[str]:
    parts = chat(served, served.model).stream_chat([ChatMessage(QUESTION)])
    return [part.delta for part in parts]


def structured(served: Served) -> Person:
    llm = chat(served, served.model).as_structured_llm(Person)
    return llm.chat([ChatMessage(ABOUT_A_PERSON)]).raw


async def tools(served: Served) -> str:
    """Streamed, its default."""
    agent = FunctionAgent(llm=chat(served, served.caller), tools=[get_weather])
    return str(await agent.run(ABOUT_THE_WEATHER))


def embeddings(served: Served) -> list[list[float]]:
    embedder = OpenAILikeEmbedding(
        api_base=served.url, api_key="unused", model_name=served.embedder
    )
    return embedder.get_text_embedding_batch(TEXTS)


run(plain, stream, structured, tools, embeddings)
