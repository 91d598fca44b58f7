"""The status of each error, the same over HTTP and NATS."""

from shared.errors import (
    AlreadyFinished,
    BrokerUnavailable,
    CannotRetry,
    InvalidRequest,
    JobAgedOut,
    KeyReused,
    ListingRefused,
    NotFinished,
    Overloaded,
    QueueFull,
    RequestTooLarge,
    SluiceError,
    StateChanged,
    TooManyStreams,
    UnknownDeadLetter,
    UnknownInferer,
    UnknownJob,
    UnknownModel,
)

STATUSES: dict[type[SluiceError], int] = {
    InvalidRequest: 400,
    ListingRefused: 403,
    UnknownModel: 404,
    UnknownInferer: 404,
    UnknownJob: 404,
    UnknownDeadLetter: 404,
    AlreadyFinished: 409,
    NotFinished: 409,
    StateChanged: 409,
    CannotRetry: 409,
    JobAgedOut: 410,
    RequestTooLarge: 413,
    KeyReused: 422,
    QueueFull: 429,
    BrokerUnavailable: 503,
    TooManyStreams: 503,
    Overloaded: 503,
}


def status_of(error: SluiceError) -> int:
    """The HTTP status of ``error``."""
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return 500
