"""How it is sent. An attack is a function with `@attack`: it sends one case, and raises `Fault`
where something answers as nothing may. Each module adds its own."""

from tests.fuzz.attacks import http, jobs, nats, templates
from tests.fuzz.attacks.attack import ATTACKS

__all__ = ("ATTACKS", "http", "jobs", "nats", "templates")
