"""Where the draft of a sequence comes from."""

from services.inferer.engine.lookup import Lookup
from services.inferer.engine.sequence import Sequence


def is_from_answers(sequence: Sequence) -> bool:
    """Whether its own text, of one answer, gives another draft or none."""
    own = Lookup(sequence.tokens).continuation(len(sequence.draft))
    return sequence.draft != own
