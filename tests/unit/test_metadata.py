"""What is written as metadata: ours, and what others have added."""

from shared.broker.metadata import merged

DEFAULTS = {"io.nats.monitor.subjects-warn": "1", "sluice.name": "m"}


def test_defaults_are_set_where_there_is_no_threshold() -> None:
    """Also beside keys that are nobody's thresholds; the server's own are not written back."""
    assert merged(DEFAULTS, None, set()) == DEFAULTS
    held = {"team": "search", "_nats.level": "5"}
    assert merged(DEFAULTS, held, set()) == {**DEFAULTS, "team": "search"}


def test_thresholds_of_an_operator_replace_all_defaults() -> None:
    """Even one that says that there should be none."""
    held = {"io.nats.monitor.enabled": "false"}
    assert merged(DEFAULTS, held, set()) == {**held, "sluice.name": "m"}


def test_our_own_keys_are_ours() -> None:
    """They are set and removed by us alone."""
    held = {"sluice.name": "old", "sluice.facts": "{}"}
    assert merged(DEFAULTS, held, {"sluice.name", "sluice.facts"}) == DEFAULTS
