"""LangChain's completions, several prompts at once."""

import json
import sys

from langchain_openai import OpenAI

url, model, *prompts = sys.argv[1:]
llm = OpenAI(base_url=url, api_key="unused", model=model, temperature=0, max_tokens=16)
print(json.dumps(llm.batch(prompts)))
