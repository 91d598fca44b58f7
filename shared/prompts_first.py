"""How long prompts hold up the answers of others: the scheduler's rule, which the ETA follows."""

PROMPTS_FIRST_S = 1.0
"""Prompts are computed at once for so many seconds while sequences that generate wait. Then each of
the two gets half of the time, until sequences have generated alone for as long."""
