"""LangChain."""

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
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


def chat(served: Served, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=served.url,
        api_key="unused",
        model=model,
        temperature=0,
        max_tokens=MAX_TOKENS,
        use_responses_api=served.api == "responses",
    )


def plain(served: Served) -> str:
    return chat(served, served.model).invoke(QUESTION).text


def stream(served: Served) -> list[str]:
    return [chunk.text for chunk in chat(served, served.model).stream(QUESTION)]


def structured(served: Served) -> Person:
    return chat(served, served.model).with_structured_output(Person).invoke(ABOUT_A_PERSON)


def forced(served: Served) -> Person:
    llm = chat(served, served.model)
    return llm.with_structured_output(Person, method="function_calling").invoke(ABOUT_A_PERSON)


def tools(served: Served) -> str:
    agent = create_agent(chat(served, served.caller), [get_weather])
    return agent.invoke({"messages": ABOUT_THE_WEATHER})["messages"][-1].text


def embeddings(served: Served) -> list[list[float]]:
    embedder = OpenAIEmbeddings(
        base_url=served.url,
        api_key="unused",
        model=served.embedder,
        check_embedding_ctx_length=False,  # otherwise it sends tokens of OpenAI's models
    )
    return embedder.embed_documents(TEXTS)


run(plain, stream, structured, forced, tools, embeddings)
