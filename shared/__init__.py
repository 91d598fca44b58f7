"""What gateway, inferer and command line share: wire format, broker client, errors, settings."""

__version__ = "0.1.0"
