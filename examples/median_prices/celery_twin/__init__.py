"""The same program with Celery and Redis, for comparison."""
