"""Rows as a pool: which request may start, where tables hold less than all requests together could need.

A request reserves all that it needs, by content, before it first runs, and keeps it until it ends, whatever happens in
between. So a request that runs never waits, and whoever writes the rows always finds one. Those that do not fit wait in
a line, the most urgent first and then in order of arrival, and nobody passes them, not even one whose content is there
already: otherwise a request that needs much could wait for ever. What needs nothing is no concern of the pool.
"""

from bisect import insort
from collections import Counter
from collections.abc import Set
from typing import NamedTuple

Urgency = tuple[float, ...]  # the smaller, the sooner; equal ones in order of arrival


class Contents(NamedTuple):
    """The keys of the different contents that a request needs at one time: of rows, and of probes."""

    rows: Set[bytes]
    probes: Set[bytes] = frozenset()


class RowPool:
    """Reserves the rows of tables that others write. Knows no engine: who asks says in which order to ask."""

    def __init__(self, rows: int, probes: int = 0) -> None:
        """How many different contents each table holds: `rows` of all sites, and `probes`."""
        self._sizes = (rows, probes)
        self._holders: tuple[Counter[bytes], Counter[bytes]] = (Counter(), Counter())  # key -> requests that hold it
        self._held: dict[str, Contents] = {}
        self._places: dict[str, tuple[Urgency, int, str]] = {}  # of those that wait
        self._line: list[tuple[Urgency, int, str]] = []  # the same, in order
        self._arrivals = 0

    @property
    def capacity(self) -> int:
        """Rows that can be reserved at one time."""
        return self._sizes[0]

    @property
    def reserved(self) -> int:
        """Rows that are reserved: equal content counts once."""
        return len(self._holders[0])

    @property
    def waiting(self) -> int:
        """Requests that asked, were told to wait, and have not ended."""
        return len(self._line)

    def reserve(self, request_id: str, contents: Contents, urgency: Urgency = ()) -> bool:
        """Whether `request_id` may run: it holds its `contents` from then on. If not, it waits in line: ask again.

        Raises ValueError for more than the whole pool, which no waiting could bring.
        """
        if request_id in self._held:
            return True
        place = self._places.get(request_id)
        known = place is not None
        if place is None:
            if not all(len(keys) <= size for keys, size in zip(contents, self._sizes, strict=True)):
                raise ValueError(f"request {request_id!r} needs {tuple(map(len, contents))}, more than {self._sizes}")
            self._arrivals += 1
            place = (urgency, self._arrivals, request_id)
        first = not self._line or place <= self._line[0]
        if first and self._fits(contents):
            self._leave_line(request_id)
            self._held[request_id] = contents
            for holders, keys in zip(self._holders, contents, strict=True):
                holders.update(keys)
            return True
        if not known:
            self._places[request_id] = place
            insort(self._line, place)
        return False

    def release(self, request_id: str) -> None:
        """Forget a request that has ended, whether it ran or waited. An unknown one is no error."""
        self._leave_line(request_id)
        contents = self._held.pop(request_id, None)
        if contents is None:
            return
        for holders, keys in zip(self._holders, contents, strict=True):
            for key in keys:
                holders[key] -= 1
                if not holders[key]:
                    del holders[key]

    def _fits(self, contents: Contents) -> bool:
        return all(
            len(holders) + sum(key not in holders for key in keys) <= size
            for holders, keys, size in zip(self._holders, contents, self._sizes, strict=True)
        )

    def _leave_line(self, request_id: str) -> None:
        place = self._places.pop(request_id, None)
        if place is not None:
            self._line.remove(place)
