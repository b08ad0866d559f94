"""Which table row holds which content: rows are found by what they hold, counted, and reused oldest first.

Equal content has equal keys and shares one row. A row that nobody holds any more keeps its content, so a request that
comes back (preemption, the next turn of a conversation) finds it and nothing is uploaded; such rows are given to new
content in the order in which they were let go. Every choice follows from the order of the calls alone, so ranks that
see the same requests agree on every row without talking.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Set


class RowAllocator:
    """Hands out the rows 1 .. max_rows - 1 by content key. Row 0 means "no steering" and is never given out."""

    def __init__(self, max_rows: int) -> None:
        self._row_of: dict[bytes, int] = {}
        self._key_of: list[bytes] = [b""] * max_rows  # b"": never used, or its content was forgotten
        self._holders: list[int] = [0] * max_rows
        self._unused = iter(range(1, max_rows))
        self._idle: OrderedDict[int, None] = OrderedDict()  # rows that nobody holds, longest idle first
        self._in_use = 0

    @property
    def in_use(self) -> int:
        """Rows that somebody holds now."""
        return self._in_use

    def holders(self, row: int) -> int:
        """How many acquisitions of `row` have not been released."""
        return self._holders[row]

    def acquire(self, key: bytes) -> tuple[int, bool]:
        """The row of `key`, held once more, and whether its content is new (the caller has to write it).

        Raises IndexError when every row is held by other content: ask `has_room` first.
        """
        row = self._row_of.get(key)
        fresh = row is None
        if row is None:
            row = self._take()
            self._row_of[key] = row
            self._key_of[row] = key
        elif not self._holders[row]:
            del self._idle[row]
        self._in_use += not self._holders[row]
        self._holders[row] += 1
        return row, fresh

    def release(self, row: int) -> bool:
        """Let go of `row` once; True if nobody holds it any more. Its content stays until the row is needed."""
        assert self._holders[row] > 0, f"row {row} is not held"
        self._holders[row] -= 1
        if self._holders[row]:
            return False
        self._in_use -= 1
        self._idle[row] = None
        return True

    def has_room(self, keys: Set[bytes], instead_of: Iterable[int] = ()) -> bool:
        """Whether all of `keys` can be held beside what is held, once the rows `instead_of` (one for each hold) are
        let go."""
        given = Counter(row for row in instead_of if row)
        freed = {row for row, times in given.items() if self._holders[row] == times}
        rows = [self._row_of.get(key, 0) for key in keys]
        fresh = sum(not self._holders[row] or row in freed for row in rows)
        return fresh <= len(self._holders) - 1 - self._in_use + len(freed)

    def forget(self, row: int) -> None:
        """Drop the content of an idle row that was never written, and make it the first to be reused."""
        assert row in self._idle, f"row {row} is not idle"
        del self._row_of[self._key_of[row]]
        self._key_of[row] = b""
        self._idle.move_to_end(row, last=False)

    def state(self) -> Iterator[bytes]:
        """All that later choices depend on, in a fixed order, for digests."""
        for key, row in sorted(self._row_of.items()):
            yield b"%b=%d*%d;" % (key.hex().encode(), row, self._holders[row])
        yield b"idle:" + b",".join(b"%d" % row for row in self._idle)

    def _take(self) -> int:
        row = next(self._unused, 0)
        if row:
            return row
        if not self._idle:
            raise IndexError("every steering row is held")
        row, _ = self._idle.popitem(last=False)
        if self._key_of[row]:
            del self._row_of[self._key_of[row]]
        return row
