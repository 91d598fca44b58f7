"""instructor, whose answers are objects: by a forced call, its default, or under a schema."""

import instructor
from harness import ABOUT_A_PERSON, MAX_TOKENS, Person, Served, run
from openai import OpenAI


def ask(served: Served, mode: instructor.Mode) -> Person:
    openai = OpenAI(base_url=served.url, api_key="unused")
    client = instructor.from_openai(openai, mode=mode)
    return client.create(
        model=served.model,
        messages=[{"role": "user", "content": ABOUT_A_PERSON}],
        response_model=Person,
        temperature=0,
        max_tokens=MAX_TOKENS,
    )


def structured(served: Served) -> Person:
    """With the Responses API, instructor has forced calls alone."""
    return ask(served, instructor.Mode.JSON_SCHEMA)


def forced(served: Served) -> Person:
    modes = {"chat": instructor.Mode.TOOLS, "responses": instructor.Mode.RESPONSES_TOOLS}
    return ask(served, modes[served.api])


run(structured, forced)
