"""How long prompts hold up the answers of others: the scheduler's rule, which the ETA follows."""

PROMPTS_FIRST_S = 1.0
"""How far prompts, or sequences that generate, can be ahead of their half of the time: a second's
worth of prompts that come together is computed at once. Not more: the machine may have slept."""
