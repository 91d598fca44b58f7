"""What can go wrong, in one small hierarchy. Each edge (HTTP, NATS, command line) translates it."""


class SluiceError(Exception):
    """A failure with a sentence for the person who caused it or can mend it.

    ``code`` is stable and machine-readable. Which failures of a job are tried again is said in one
    table, `services/inferer/worker/retry_policy.py`.
    """

    code = "internal_error"

    @property
    def message(self) -> str:
        return str(self)


class InvalidRequest(SluiceError):
    """The request can never run as it stands. ``param`` names the field, where one is to blame."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    code = "prompt_too_long"


class RequestTooLarge(SluiceError):
    code = "request_too_large"


class KeyReused(SluiceError):
    """An ``Idempotency-Key`` that stands for another request already."""

    code = "idempotency_key_reused"


class UnknownModel(SluiceError):
    code = "model_not_found"


class UnknownInferer(SluiceError):
    code = "inferer_not_found"


class Refused(SluiceError):
    """An inferer will not do what it was told."""

    code = "refused"


class UnknownJob(SluiceError):
    code = "job_not_found"


class JobAgedOut(SluiceError):
    code = "job_aged_out"


class AlreadyFinished(SluiceError):
    """A cancel came after the result. ``state`` is the job's, in Celery's words."""

    code = "already_finished"

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


class NotFinished(SluiceError):
    """A result was asked for that is not there yet."""

    code = "not_finished"


class QueueFull(SluiceError):
    """As many jobs wait as may. ``retry_after_s`` is when there should be room again."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyStreams(SluiceError):
    """As many streams are open on a gateway as may be."""

    code = "too_many_streams"
    retry_after_s = 10


class BrokerUnavailable(SluiceError):
    """The broker is away, restarting or electing a leader."""

    code = "broker_unavailable"


class StorageShort(BrokerUnavailable):
    """The broker has no room left, or too little to take more jobs on. Nothing was stored."""

    code = "storage_short"
    retry_after_s = 10
    """Room comes back when jobs end, results age out, or somebody adds some."""


class StreamRefused(BrokerUnavailable):
    """A stream does not take this message, until somebody changes the stream. It was not stored."""


class StoredAlready(SluiceError):
    """Another message is stored under this subject than the publisher expected."""


class Overloaded(SluiceError):
    """A gateway handles as many requests as it may. Nothing was done."""

    code = "overloaded"


class ModelError(SluiceError):
    """The model could not be loaded, or llama.cpp failed while it ran."""

    code = "model_error"


class OutOfMemory(ModelError):
    """llama.cpp found no room for its contexts, or for what is in them."""

    code = "out_of_memory"


class UnknownLetter(SluiceError):
    """There is no dead letter of that id."""

    code = "letter_not_found"


class CannotRetry(SluiceError):
    """A dead letter does not hold what could be sent again."""

    code = "cannot_retry"


class SettingsError(SluiceError):
    code = "invalid_settings"


class TopologyError(SluiceError):
    """The broker holds streams, consumers or buckets that cannot be made ours."""

    code = "incompatible_topology"
