"""Formats of strings that can be enforced."""

DATE = (
    "(?:[0-9]{4}-(?:"
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8])"
    ")|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
"""29 February in leap years only."""
HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = f"{HOUR}:[0-5][0-9](?:\\.[0-9]+)?(?:[zZ]|[+-]{HOUR})"
"""Without leap seconds, which are in few minutes."""

LOCAL = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"
HOST = "[a-zA-Z0-9]"
LABEL = f"{HOST}(?:-?{HOST}){{0,30}}"
EMAIL = rf"{LOCAL}(?:\.?{LOCAL}){{0,31}}@{LABEL}(?:\.{LABEL}){{0,3}}"
"""64 characters before the @ and 253 behind it, at most."""

FORMATS: dict[str, tuple[str, ...]] = {
    "date": (f"^{DATE}$",),
    "date-time": (f"^{DATE}[tT]{TIME}$",),
    "duration": (),
    "email": (f"^{EMAIL}$",),
    "hostname": (
        f"^{HOST}+(?:[-.]{HOST}+)*$",
        r"^[^.]{1,63}(?:\.[^.]{1,63})*$",
        "^.{1,253}$",
    ),
    "ipv4": (),
    "ipv6": (),
    "time": (f"^{TIME}$",),
    "uri": (),
    "uuid": (),
}
"""The patterns that together enforce each; none for those that llguidance itself enforces strictly.
Some are stricter than their format: names of hosts have no two hyphens in a row."""
