"""What a slot makes of the number that it reads: each response once, by its name, with the numbers that it is given.

A slot reads one direction of the stream, u = y . a + bias, and writes c times a direction; c is its response to u. Some
responses see a second score too, v, which another slot of the site reads. How each is computed on a device stands in
`trimtab.ops.responses`, under the same names.

Some look back instead, at x, the whole stream before anything of ours (`trimtab.ops.looking_back`): those of stage
`FIRST` act before others measure the stream, those of stage `LAST` on what has come of all.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from trimtab.wording import summary

MOST_NUMBERS = 8
"""That any response takes. The last is for the place of the second score, where a response sees one."""

FLOAT32_ROWS = 3
"""Table rows that hold one direction to all digits of float32, `DIGITS` in each: every model dtype has as many."""

DIGITS = 8

CODES = range(32)
"""That responses may have."""


class Stage(Enum):
    """When a response acts."""

    FIRST = "first"  # it reads no direction, and what it writes is measured by the others
    LOCAL = "local"
    LAST = "last"  # it reads and writes no direction


@dataclass(frozen=True)
class Response:
    """One response: its name in programs, its code on devices, and what its numbers are called, in their order.

    Where the numbers that `nothing` names are as it says, the response is 0 whatever it sees. `bounds` names the least
    and the largest of an interval, either of which may be infinite. Where it is `odd`, it makes -c of -u.
    """

    name: str
    code: int
    numbers: tuple[str, ...]
    nothing: Mapping[str, float] = field(default_factory=dict)
    bounds: tuple[()] | tuple[str, str] = ()
    odd: bool = False
    sees_two: bool = False
    reads_float32: bool = False  # each of its slots reads one direction to all digits of float32, and writes another
    stage: Stage = Stage.LOCAL

    def __post_init__(self) -> None:
        if len(self.numbers) + self.sees_two > MOST_NUMBERS:
            raise ValueError(f"the response {self.name!r} takes more than {MOST_NUMBERS} numbers")
        if self.code not in CODES:
            raise ValueError(f"the response {self.name!r} has the code {self.code}, want one of 0 to {CODES[-1]}")

    def is_nothing(self, own: Sequence[float]) -> bool:
        """Whether with these numbers it is 0 whatever it sees."""
        numbers = dict(zip(self.numbers, own, strict=True))
        return bool(self.nothing) and all(numbers[name] == value for name, value in self.nothing.items())


def by_name(*responses: Response) -> dict[str, Response]:
    """The responses by their names. Raises `ValueError` where two share a name or a code."""
    found: dict[str, Response] = {}
    codes: dict[int, str] = {}
    for response in responses:
        if response.name in found:
            raise ValueError(f"two responses are called {response.name!r}")
        if (other := codes.setdefault(response.code, response.name)) != response.name:
            free = summary([code for code in CODES if code not in {known.code for known in responses}])
            said = f"the response {response.name!r} has the code {response.code}, which is that of {other!r}"
            raise ValueError(f"{said}; free are {free}")
        found[response.name] = response
    return found


# c = strength * (min(max(u, low), high) - u)
CLIP = Response("clip", 0, ("strength", "low", "high"), {"strength": 0.0}, bounds=("low", "high"))

# c = own * u + other * v + length * |(u, v)|, where `when` is 1 only if u > 0, and where it is 2 only if v > 0
TURN = Response("turn", 1, ("own", "other", "length", "when"), {"own": 0.0, "other": 0.0, "length": 0.0}, sees_two=True)

# c = min(max(scale * u + add, low), high) - u where u > threshold, and `off` where it is not
FEATURE = Response(
    "feature",
    2,
    ("threshold", "scale", "add", "low", "high", "off"),
    {"scale": 1.0, "add": 0.0, "low": -math.inf, "high": math.inf, "off": 0.0},
    bounds=("low", "high"),
    reads_float32=True,
)

# c = amount; so much of x goes, and c times a direction comes
REPLACE = Response("replace", 8, ("amount",), stage=Stage.FIRST)

# c = scale * |x|
NORM = Response("norm", 9, ("scale",), {"scale": 0.0}, stage=Stage.FIRST)

# the stream leaves as long as x; where `if_grown` is 1 only if it is longer
KEEP_NORM = Response("keep_norm", 10, ("if_grown",), stage=Stage.LAST)

RESPONSES = by_name(CLIP, TURN, FEATURE, REPLACE, NORM, KEEP_NORM)
"""Every response by its name. Codes are kept for ever: they are part of identities."""


def of_stage(names: Iterable[str], stage: Stage) -> tuple[str, ...]:
    """The responses among `names` that act at `stage`, in their order."""
    return tuple(name for name in names if RESPONSES[name].stage is stage)
