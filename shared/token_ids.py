"""Tokens that a request names by their ids."""

from collections.abc import Collection

from shared.errors import InvalidRequest
from shared.wire.requests import Sampling


def require_token_ids(options: Sampling, vocabulary: int) -> None:
    """Check that a model with ``vocabulary`` tokens has those that ``options`` name.

    Raises:
        InvalidRequest: it does not have one of them.
    """
    named = {"logit_bias": options.logit_bias, "stop_token_ids": options.stop_token_ids}
    for param, tokens in named.items():
        require_known(tokens or (), vocabulary, param)


def require_known(tokens: Collection[int], vocabulary: int, param: str) -> None:
    """The same for ``tokens`` in the field ``param``."""
    largest = max(tokens, default=0)
    if largest >= vocabulary:
        raise InvalidRequest(
            f"{param}: {largest} is not a token of this model, whose tokens are 0 to "
            f"{vocabulary - 1}",
            param,
        )
