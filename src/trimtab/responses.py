"""What a slot makes of the number that it reads: each response once, by its name, with the numbers that it is given.

A slot reads one direction of the stream, u = y . a + bias, and writes c times a direction; c is its response to u. How
each is computed on a device stands in `trimtab.ops.responses`, under the same names.
"""

from typing import NamedTuple

MOST_NUMBERS = 8  # that any response takes


class Response(NamedTuple):
    """One response: its name in programs, its code on devices, and what its numbers are called, in their order."""

    name: str
    code: int
    numbers: tuple[str, ...]


CLIP = Response("clip", 0, ("strength", "low", "high"))  # c = strength * (min(max(u, low), high) - u)

RESPONSES = {response.name: response for response in (CLIP,)}
"""Every response by its name. Codes are kept for ever: they are part of identities."""
