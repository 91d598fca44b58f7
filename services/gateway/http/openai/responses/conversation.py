"""The conversation that a response continues: the earlier messages and its input."""

import msgspec

from services.gateway.http.openai.responses.items import (
    Item,
    input_items,
    messages_of,
    output_messages,
    referenced_jobs,
)
from services.gateway.http.openai.responses.output import output_of
from services.gateway.http.openai.responses.requests import ResponseRequest
from services.gateway.jobs.stored_responses import StoredResponse, StoredResponses
from services.gateway.state.pending_job import PendingJob
from shared.errors import InvalidRequest, RequestTooLarge
from shared.wire.requests import ChatMessage
from shared.wire.results import Completed

PREVIOUS = "previous_response_id"


async def conversation_of(
    body: ResponseRequest, responses: StoredResponses
) -> tuple[list[ChatMessage], list[ChatMessage]]:
    """The messages of earlier responses without their instructions, and those of the input.

    Raises:
        UnknownResponse: an earlier response is not kept.
        InvalidRequest: an item is not valid, or an earlier response has no output.
        RequestTooLarge: the items that are referred to are larger than a job may be.
        BrokerUnavailable: no answer.
    """
    items = input_items(body.input)
    references = referenced_jobs(items)
    history: list[ChatMessage] = []
    if body.previous is not None:
        stored = await responses.find(body.previous, PREVIOUS)
        output = _output(stored, PREVIOUS)
        request = responses.require_request(stored, PREVIOUS)
        earlier = (request.messages or [])[stored.form.has_instructions :]
        history = [*earlier, *output_messages(output)]
    known: dict[str, Item] = {}
    size = 0
    for job_id, param in references.items():
        output = _output(await responses.find(job_id, param), param)
        known |= {item["id"]: item for item in output}
        size += len(msgspec.json.encode(output))
        if size > responses.max_bytes:
            raise RequestTooLarge(
                "input: the responses that it refers to are larger than a request may be "
                f"({responses.max_bytes} bytes); refer to fewer"
            )
    return history, messages_of(items, history, known)


def _output(stored: StoredResponse, param: str) -> list[Item]:
    """Raises: InvalidRequest: it has none."""
    if isinstance(stored.job, Completed):
        return output_of(stored.job)
    state = "has not ended yet" if isinstance(stored.job, PendingJob) else "did not complete"
    raise InvalidRequest(f"{param}: the response resp_{stored.job.id} {state}", param)
