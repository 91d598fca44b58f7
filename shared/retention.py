"""How long jobs may live and how long the broker keeps what is left of them."""

from datetime import timedelta

MAX_JOB_LIFETIME = timedelta(hours=24)
"""From acceptance to the deadline, at most."""

RESULT_RETENTION = timedelta(hours=48)
"""Results and events. Longer than a job may live, so that no job starts again after its result was
deleted."""

IDEMPOTENCY_RETENTION = timedelta(hours=24)
"""Idempotency keys. Shorter than results, so that a key never refers to a deleted result."""

DEAD_LETTER_RETENTION = timedelta(days=7)
