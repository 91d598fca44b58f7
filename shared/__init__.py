"""What gateway, inferer and command line agree on: names, payloads, errors, the broker."""

__version__ = "0.1.0"
