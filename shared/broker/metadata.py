"""The metadata of streams and consumers: what operators set there stays.

``nats server check stream`` and ``nats audit`` read their thresholds from it. Those here are only
the defaults. An update from code replaces all metadata, so it is merged with what the broker holds.
"""

THRESHOLDS = "io.nats.monitor."
"""What the keys of thresholds begin with."""

SERVERS = "_nats."
"""What the keys begin with that the server itself sets."""

# `nats audit` looks at what has this only.
ENABLED = {f"{THRESHOLDS}enabled": "true"}

CONSUMER_THRESHOLDS = {
    **ENABLED,
    # Nine tenths of the default of GATEWAY_MAX_WAITING.
    f"{THRESHOLDS}unprocessed-critical": "9000",
    # Jobs that are delivered again, because their inferers died or did not renew the lease.
    f"{THRESHOLDS}redelivery-critical": "5",
}

# Each job is a subject of its own. The thresholds for messages would be for too few of them.
REQUESTS_THRESHOLDS = {
    **ENABLED,
    f"{THRESHOLDS}subjects-warn": "5000",
    f"{THRESHOLDS}subjects-critical": "9000",
}
DEAD_THRESHOLDS = {
    **ENABLED,
    f"{THRESHOLDS}subjects-warn": "1",
    f"{THRESHOLDS}subjects-critical": "100",
}


def peer_thresholds(replicas: int) -> dict[str, str]:
    """Of a stream that has ``replicas`` copies."""
    if replicas == 1:
        return {}
    return {
        **ENABLED,
        f"{THRESHOLDS}peer-expect": str(replicas),
        f"{THRESHOLDS}peer-lag-critical": "1000",
        f"{THRESHOLDS}peer-seen-critical": "10s",
    }


def merged(ours: dict[str, str], held: dict[str, str] | None, own: set[str]) -> dict[str, str]:
    """``ours``, and of what the broker holds all but the keys in ``own`` and the server's.

    Thresholds in ``ours`` count only where there is none at all: an operator who wants none sets
    ``io.nats.monitor.enabled`` to false.
    """
    others = {
        key: value
        for key, value in (held or {}).items()
        if key not in own and not key.startswith(SERVERS)
    }
    if any(key.startswith(THRESHOLDS) for key in others):
        ours = {key: value for key, value in ours.items() if not key.startswith(THRESHOLDS)}
    return {**others, **ours}
