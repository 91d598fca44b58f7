"""What a list of jobs shows of a request."""

from shared.wire.api import Submission

MAX_CHARS = 80


def preview_of(submission: Submission) -> str:
    """The beginning of what is asked: of the last message of a user, the prompt, the query or the
    first input, on one line. Empty if none of these is text."""
    texts = [one.text for one in submission.messages or () if one.role == "user"]
    texts += [submission.prompt or "", submission.query or ""]
    texts += [one for one in (submission.input or ())[:1] if isinstance(one, str)]
    asked = next((text for text in reversed(texts) if text), "")
    # A prompt may have megabytes; its white space is removed from a part that is long enough.
    return " ".join(asked[: 10 * MAX_CHARS].split())[:MAX_CHARS]
