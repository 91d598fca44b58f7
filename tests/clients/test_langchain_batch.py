"""Several prompts in one request, as LangChain's `OpenAI().batch` sends them."""

import openai

from tests.clients.running import run_program

PROMPTS = ["The colours of a rainbow are", "Once upon a time"]


def test_each_prompt_of_a_batch_has_its_text(
    served: dict[str, str], official: openai.OpenAI
) -> None:
    """In their order, each the text that it has alone."""
    texts = run_program("langchain", "use_langchain_batch", served["url"], "model", *PROMPTS)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        alone = official.completions.create(
            model="model", prompt=prompt, temperature=0, max_tokens=16
        )
        assert text == alone.choices[0].text
