"""Paths of OpenAI's API that Sluice does not have: why, and what to use instead."""

_TEXT_ONLY = "Sluice serves models for text only"
_NO_FILES = (
    "Sluice stores no files; send each request by itself, to /jobs or, with `background`, to "
    "/v1/responses; with `priority: low`, other jobs go first"
)
_NO_AGENTS = "Sluice runs no agents; use /v1/responses or /v1/chat/completions with `tools`"
_NO_ACCOUNTS = "Sluice has no accounts"
_NO_PROGRAMS = "Sluice runs no programs and keeps nothing for them"
_NO_MODERATION = "Sluice does not moderate; ask a model that was trained for it"
_NO_WEBHOOKS = "Sluice calls no URLs; read /jobs/<id>/events, or the stream of a response"

NOT_OFFERED = {
    "agents": _NO_AGENTS,
    "assistants": _NO_AGENTS,
    "audio": _TEXT_ONLY,
    "batches": _NO_FILES,
    "chat/completions": "answers are not stored; use /v1/responses, or GET /jobs to list jobs",
    "chatkit": _NO_AGENTS,
    "containers": _NO_PROGRAMS,
    "content_provenance_checks": _NO_MODERATION,
    "conversations": "use `previous_response_id` on /v1/responses",
    "decisions": "use /v1/chat/completions with a `response_format`",
    "evals": "Sluice does not evaluate models; send the prompts as jobs",
    "files": _NO_FILES,
    "fine_tuning": "Sluice does not train; serve an adapter that was trained elsewhere, and select "
    "it with `adapter`",
    "images": _TEXT_ONLY,
    "live": _TEXT_ONLY,
    "models": "models come and go with their inferers",
    "moderations": _NO_MODERATION,
    "organization": _NO_ACCOUNTS,
    "projects": _NO_ACCOUNTS,
    "realtime": _TEXT_ONLY,
    "responses/compact": "nothing is cut from a conversation; shorten it yourself",
    "responses/input_tokens": "tokens are counted when a request runs; see `usage` in its response",
    "safety": _NO_MODERATION,
    "skills": _NO_PROGRAMS,
    "threads": _NO_AGENTS,
    "uploads": _NO_FILES,
    "vaults": _NO_PROGRAMS,
    "vector_stores": "Sluice has no database; use /v1/embeddings and /v1/rerank with one",
    "videos": _TEXT_ONLY,
    "webhook_endpoints": _NO_WEBHOOKS,
    "webhook_event_types": _NO_WEBHOOKS,
}
"""By the beginning of the path after ``/v1/``; some of what begins like that is offered."""


def why_not_offered(path: str) -> str | None:
    """Why ``path`` of OpenAI's API is not offered; None for any other path."""
    parts = path.removeprefix("/v1/").split("/")
    for length in (2, 1):
        if (why := NOT_OFFERED.get("/".join(parts[:length]))) is not None:
            return why
    return None
