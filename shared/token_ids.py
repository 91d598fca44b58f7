"""Tokens that a request names by their ids."""

from shared.errors import InvalidRequest
from shared.wire.requests import Sampling


def require_token_ids(options: Sampling, vocabulary: int) -> None:
    """Check that a model with ``vocabulary`` tokens has those that ``options`` name.

    Raises:
        InvalidRequest: it does not have one of them.
    """
    named = {"logit_bias": options.logit_bias, "stop_token_ids": options.stop_token_ids}
    for param, tokens in named.items():
        largest = max(tokens or (), default=0)
        if largest >= vocabulary:
            raise InvalidRequest(
                f"{param}: {largest} is not a token of this model, whose tokens are 0 to "
                f"{vocabulary - 1}",
                param,
            )
