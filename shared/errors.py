"""The hierarchy of errors. Each edge (HTTP, NATS, command line) translates them."""


class SluiceError(Exception):
    """An error with a message for the person who caused it or can fix it.

    ``code`` is stable and machine-readable. `services/inferer/worker/retry_policy.py` decides which
    failures of a job are retried.
    """

    code = "internal_error"

    @property
    def message(self) -> str:
        return str(self)


class InvalidRequest(SluiceError):
    """The request is invalid. ``param`` names the invalid field, if there is one."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt does not fit into the model's context, or leaves no room for an answer."""

    code = "prompt_too_long"


class RequestTooLarge(SluiceError):
    """The body exceeds `GATEWAY_MAX_BODY_BYTES`, or the maximum size of a broker message."""

    code = "request_too_large"


class KeyReused(SluiceError):
    """The ``Idempotency-Key`` was already used with another request."""

    code = "idempotency_key_reused"


class UnknownModel(SluiceError):
    """No model of this name has a queue, or there is no queue yet."""

    code = "model_not_found"


class UnknownInferer(SluiceError):
    """No live inferer has this id."""

    code = "inferer_not_found"


class CommandRefused(SluiceError):
    """An inferer refuses a command."""

    code = "refused"


class UnknownJob(SluiceError):
    """There is no job with this id."""

    code = "job_not_found"


class JobAgedOut(SluiceError):
    """The job's result was deleted 48 hours after its end."""

    code = "job_aged_out"


class UnknownResponse(UnknownJob):
    """There is no response with this id, or it is not stored. ``param`` names the parameter that
    contains the id."""

    code = "response_not_found"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class AlreadyFinished(SluiceError):
    """The job had ended before it was cancelled. ``state`` is its state, with Celery's names."""

    code = "already_finished"

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


class ListingRefused(SluiceError):
    """The gateway is configured not to list jobs and dead letters (`GATEWAY_LIST_JOBS`)."""

    code = "listing_refused"


class StateChanged(SluiceError):
    """The job is no longer in the state in which it was to be cancelled, so it was not."""

    code = "state_changed"


class NotFinished(SluiceError):
    """The job has no result yet."""

    code = "not_finished"


class QueueFull(SluiceError):
    """The queue is at its limit. ``retry_after_s`` estimates when there will be room."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyStreams(SluiceError):
    """The gateway has reached its limit of open streams."""

    code = "too_many_streams"
    retry_after_s = 10


class BrokerUnavailable(SluiceError):
    """The broker is unavailable, restarting or electing a leader."""

    code = "broker_unavailable"


class StorageShort(BrokerUnavailable):
    """The broker's storage is full, or too full for new jobs. Nothing was stored."""

    code = "storage_short"
    retry_after_s = 10
    """Room is freed when jobs end and results expire, or when the limit is raised."""


class StreamRefused(BrokerUnavailable):
    """The configuration of a stream does not allow this message. It was not stored."""

    code = "stream_refused"


class StoredAlready(SluiceError):
    """The last message of the subject is not the one that the publisher expected."""


class Overloaded(SluiceError):
    """The gateway has reached its limit of concurrent requests. Nothing was done."""

    code = "overloaded"


class ModelError(SluiceError):
    """The model could not be loaded, or llama.cpp failed during a computation."""

    code = "model_error"


class InvalidAnswer(ModelError):
    """A complete answer does not match the requested format. The next attempt would have the same
    seed, and so give the same answer."""


class OutOfMemory(ModelError):
    """llama.cpp could not allocate memory for a context, or a context is full."""

    code = "out_of_memory"


class UnknownDeadLetter(SluiceError):
    """There is no dead letter with this id."""

    code = "letter_not_found"


class CannotRetry(SluiceError):
    """The dead letter does not contain a valid request."""

    code = "cannot_retry"


class SettingsError(SluiceError):
    """A setting is invalid, or cannot be used with this machine or model."""

    code = "invalid_settings"


class TopologyError(SluiceError):
    """The broker has streams, consumers or buckets that cannot be changed to what is needed."""

    code = "incompatible_topology"
