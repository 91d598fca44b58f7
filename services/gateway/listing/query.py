"""What is asked for, as SQL. Nothing of a query becomes part of a statement but as a parameter."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import msgspec
from msgspec import Struct

from shared.errors import InvalidRequest
from shared.wire.listing import JobQuery, JobSort, ListedJob, id_at, value_text

ESTIMATES = ("position", "eta")
"""What is known only when a page is made."""
COLUMNS = tuple(name for name in ListedJob.__struct_fields__ if name not in ESTIMATES)

SORTED_BY: dict[JobSort, str] = {
    "accepted": "id",
    "finished": "coalesce(finished_at, '')",
    "waited": "coalesce(waited_s, -1.0)",
    "ran": "coalesce(ran_s, -1.0)",
    "tokens": "coalesce(completion_tokens, -1)",
}
"""The newest, longest or most first; jobs accepted later before others that are the same."""

SAME = ("code", "model", "priority", "inferer", "owner", "via", "retry_of")
"""Filters that compare a column."""
COMMON = ("model", "priority", "inferer", "owner", "via")
"""Those of them whose values many jobs may share. One alone, or with common members of metadata, is
searched in its own index. With another column, each of these jobs would be looked up in the table.
That takes longer than reading the index of states, which has all of these columns; so `+` excludes
their own indexes, as it does where few jobs have a member of metadata."""

Statement = tuple[str, Sequence[Any]]


class Cursor(Struct, frozen=True, array_like=True):
    """The last job of a page: the next one begins after it."""

    sort: JobSort
    key: str | float | None
    id: bytes

    def encode(self) -> str:
        return msgspec.msgpack.encode(self).hex()

    @classmethod
    def decode(cls, text: str, sort: JobSort) -> Self:
        """Raises: InvalidRequest: it is not a cursor of such a list."""
        try:
            cursor = msgspec.msgpack.decode(bytes.fromhex(text), type=cls)
            kinds: dict[str, type] = {"accepted": type(None), "finished": str}
            if cursor.sort == sort and isinstance(cursor.key, kinds.get(sort, float)):
                return cursor
        except (ValueError, msgspec.MsgspecError):
            pass
        raise InvalidRequest(
            "cursor must be the `cursor` of a page with the same `sort`; leave it out to begin",
            "cursor",
        )


class Search(NamedTuple):
    """The statements that answer a query."""

    page: Statement
    """Its rows have `COLUMNS`, and the value that they are sorted by. One more than a page."""
    total: Statement
    sort: JobSort

    @classmethod
    def of(
        cls,
        query: JobQuery,
        pair: Callable[[str, str], int],
        is_common: Callable[[int], bool],
    ) -> Self:
        """``pair`` gives the number of a member of metadata, ``is_common`` whether many jobs have
        it.

        Raises:
            InvalidRequest: the cursor is not one of such a list.
        """
        members = [pair(name, value_text(value)) for name, value in (query.metadata or {}).items()]
        common = [is_common(member) for member in members]
        conditions, values = _conditions(query, has_rare=not all(common))
        table = "jobs"
        for member, is_in_many_jobs in zip(members, common, strict=True):
            if table == "jobs" and query.sort == "accepted" and not _compared(query):
                table, condition = "pairs", "pair = ?"
            elif is_in_many_jobs:
                condition = (
                    f"EXISTS (SELECT 1 FROM pairs AS p WHERE p.pair = ? AND p.id = {table}.id)"
                )
            else:
                condition = "id IN (SELECT id FROM pairs WHERE pair = ?)"
            conditions.append(condition)
            values.append(member)
        where = " AND ".join(conditions) or "true"
        total = f"SELECT count(*) FROM {table} WHERE {where}", tuple(values)
        key = SORTED_BY[query.sort]
        if query.cursor is not None:
            cursor = Cursor.decode(query.cursor, query.sort)
            if query.sort == "accepted":
                where += " AND id < ?"
                values.append(cursor.id)
            else:
                where += f" AND ({key}, id) < (?, ?)"
                values += [cursor.key, cursor.id]
        order = "id DESC" if query.sort == "accepted" else f"{key} DESC, id DESC"
        # The inner statement reads nothing but an index, if that has all columns of the filter.
        page = (
            f"SELECT {', '.join(COLUMNS)}, {key} FROM jobs WHERE id IN "
            f"(SELECT id FROM {table} WHERE {where} ORDER BY {order} LIMIT ?) ORDER BY {order}",
            (*values, query.limit + 1),
        )
        return cls(page, total, query.sort)

    def cursor(self, row: Sequence[Any]) -> str:
        """The cursor of a page that ends with ``row``."""
        return Cursor(self.sort, None if self.sort == "accepted" else row[-1], row[0]).encode()


def _compared(query: JobQuery) -> list[str]:
    """The columns that are compared, but for the id."""
    return [name for name in ("state", *SAME) if getattr(query, name) is not None]


def _conditions(query: JobQuery, *, has_rare: bool) -> tuple[list[str], list[Any]]:
    """All but those for metadata. ``has_rare``: few jobs have one of its members."""
    conditions: list[str] = []
    values: list[Any] = []

    def add(condition: str, *given: Any) -> None:
        conditions.append(condition)
        values.extend(given)

    plus = "+" if has_rare or len(_compared(query)) > 1 else ""
    if query.state is not None:
        add(f"state IN ({', '.join('?' * len(query.state))})", *query.state)
    for name in SAME:
        if (value := getattr(query, name)) is not None:
            add(f"{plus if name in COMMON else ''}{name} = ?", value)
    if query.id is not None:
        first, last = _id_range(query.id)
        add("id BETWEEN ? AND ?", first, last)
    if query.since is not None:
        add("id >= ?", id_at(query.since))
    if query.until is not None:
        add("id < ?", id_at(query.until))
    return conditions, values


def _id_range(beginning: str) -> tuple[bytes, bytes]:
    """The first and the last id that begin so."""
    digits = beginning.replace("-", "")[:32]
    return bytes.fromhex(digits.ljust(32, "0")), bytes.fromhex(digits.ljust(32, "f"))
