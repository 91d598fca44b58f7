"""The ids of responses and of their items, all made from the id of the job."""

from shared.job_ids import is_job_id

RESPONSE = "resp_"

_KINDS = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}
_INPUT = "in"


def response_id(job_id: str) -> str:
    return RESPONSE + job_id


def job_of_response(text: str) -> str | None:
    """The job of a response; None if ``text`` is not the id of a response."""
    job_id = text.removeprefix(RESPONSE)
    return job_id if text.startswith(RESPONSE) and is_job_id(job_id) else None


def output_item_id(kind: str, job_id: str, index: int) -> str:
    """The id of the item at ``index`` of a response's output."""
    return f"{_KINDS[kind]}_{job_id}_{index}"


def input_item_id(kind: str, job_id: str, index: int) -> str:
    """The id of the item at ``index`` of a response's input."""
    return f"{_KINDS[kind]}_{job_id}_{_INPUT}{index}"


def job_of_output_item(text: str) -> str | None:
    """The job whose response has an output item with this id; None if the id cannot exist."""
    kind, _, rest = text.partition("_")
    job_id, _, index = rest.rpartition("_")
    is_id = kind in _KINDS.values() and is_job_id(job_id)
    return job_id if is_id and index.isdecimal() and index.isascii() else None
