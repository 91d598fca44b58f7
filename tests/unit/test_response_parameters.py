"""Each parameter of the official client has been decided on."""

from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)

from services.gateway.http.document import UNSUPPORTED
from services.gateway.http.openai.responses.parameters import OWN, PARAMETERS
from services.gateway.http.openai.responses.requests import ResponseRequest


def test_no_parameter_of_the_client_is_undecided() -> None:
    """A later client may add some: decide on them in `PARAMETERS`."""
    known = {
        *ResponseCreateParamsNonStreaming.__annotations__,
        *ResponseCreateParamsStreaming.__annotations__,
    }
    extra = {*OWN, "chat_template_kwargs"}
    assert known == set(PARAMETERS) - extra


def test_the_table_is_that_of_the_request() -> None:
    """The same names, and a reason for each parameter that is refused or has no effect."""
    assert set(PARAMETERS) == set(ResponseRequest.__struct_fields__)
    for name, parameter in PARAMETERS.items():
        assert parameter.handling == "honoured" or parameter.note, name
    refused = {name for name in PARAMETERS if PARAMETERS[name].handling == "refused"}
    assert refused == set(UNSUPPORTED)
