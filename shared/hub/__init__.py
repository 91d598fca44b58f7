"""Models of the Hugging Face hub. Only `download` and `cache` use its library, once they are called
with a name that needs it."""
