"""Sets: the slots of a program that write along what they read, at one site.

Each of them is asked to move one projection of the stream, and their directions overlap. So the numbers c that they
write are mixed, d = (A^T A)^-1 c with the directions as the columns of A: then each projection lands exactly where it
was asked to, whatever the others do.

    z = y + sum_k d_k a_k    so    a_j . z = a_j . y + c_j

Directions that are nearly dependent would need steps much longer than c to do so, and are refused. One direction given
twice is one slot, where both agree.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.program.slots import Direction, Numbers, Slot, a_few
from trimtab.recent import Recent
from trimtab.responses import CLIP, FEATURE, REPLACE, RESPONSES
from trimtab.sites import Site, site_order

MOST_GROWTH = 10.0
"""How much further than along its own direction alone one slot of a set may move a token."""

SAME = 1e-12  # 1 - |cosine| of what is one direction up to length and sign: float32 numbers times a scale differ less

WHOLE = 1e-6  # by which amounts that are rounded to float32 may pass 1 together

Matrix = npt.NDArray[np.float64]

# What directions were found to be: requests bring the same ones again and again, with other numbers or in other sets.
_COSINES: Recent[Matrix] = Recent(1 << 14, 16 << 20)  # of two, by their row keys and `_place`
_APART: Recent[bool] = Recent(1 << 14)  # of some, by their row keys and `_place`


def formed(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    """The slots in canonical order: what does nothing left out, and one direction of a set in one slot.

    A feature is in one slot too. Raises `SteeringError` without a field where two slots contradict each other, where
    directions are too close, and where more of the stream is replaced than there is.
    """
    kept = _features_once(sorted(filter(None, map(_active, slots)), key=lambda slot: slot.digest))
    _check_amounts(kept)
    members = [index for index, slot in enumerate(kept) if slot.is_member]
    if len(members) < 2:
        return tuple(kept)
    sites_of: dict[tuple[int, ...], list[Site]] = {}
    for site in sorted({site for index in members for site in kept[index].sites}, key=site_order):
        sites_of.setdefault(tuple(index for index in members if site in kept[index].at), []).append(site)
    numbers = [dict(slot.at) for slot in kept]
    asked_by = [set(slot.asked_by) for slot in kept]
    for together, sites in sites_of.items():
        if len(together) > 1:
            own = [kept[index] for index in together], [numbers[index] for index in together]
            for first, other in _join(*own, sites):
                asked_by[together[first]] |= kept[together[other]].asked_by
    for index in members:
        if asked_by[index] != kept[index].asked_by:
            kept[index] = replace(kept[index], asked_by=frozenset(asked_by[index]))
    left = [_with_numbers(slot, own) for slot, own in zip(kept, numbers, strict=True)]
    return tuple(sorted(filter(None, left), key=lambda slot: slot.digest))


def mixing(rows: Matrix, members: npt.NDArray[np.bool_]) -> Matrix:
    """Float64 [K, K], by which the numbers of K slots are multiplied: (A^T A)^-1 among the members of the set.

    `rows` [K, H] are the directions as they are stored: rounded, and times their units. For the other slots it is the
    identity.
    """
    result = np.eye(len(rows))
    if members.any():
        directions = rows[members]
        result[np.ix_(members, members)] = np.linalg.inv(directions @ directions.T)
    return result


def _active(slot: Slot) -> Slot | None:
    """`slot` where it does something: a clip of strength 0 does not."""
    is_nothing = RESPONSES[slot.response].is_nothing
    different = {id(numbers): numbers for _, numbers in slot.numbers}  # mostly all sites share one
    if not any(is_nothing(numbers.own) for numbers in different.values()):
        return slot
    return _with_numbers(slot, {site: numbers for site, numbers in slot.numbers if not is_nothing(numbers.own)})


def _with_numbers(slot: Slot, numbers: dict[Site, Numbers]) -> Slot | None:
    if numbers == slot.at:
        return slot
    if not numbers:
        return None
    return replace(slot, numbers=tuple((site, numbers[site]) for site in slot.sites if site in numbers))


def _join(slots: Sequence[Slot], numbers: Sequence[dict[Site, Numbers]], sites: Sequence[Site]) -> set[tuple[int, int]]:
    """Join equal directions among `slots`, which all act at `sites`: the first keeps the `numbers` of all. Returns
    which was the first, and which it was joined with, by their places."""
    joined_with: set[tuple[int, int]] = set()
    ways, place = [slot.read for slot in slots if slot.read is not None], _place(sites)
    if _are_apart(ways, sites, place):
        return joined_with
    for site, cosine in zip(sites, _cosines(ways, sites, place), strict=True):
        kept: list[int] = []
        for index, slot in enumerate(slots):
            first = next((other for other in kept if 1.0 - abs(cosine[other, index]) < SAME), None)
            if first is None:
                kept.append(index)
                continue
            other = numbers[index].pop(site)
            joined = _joined(slots[first], numbers[first][site], slot, other, flipped=cosine[first, index] < 0.0)
            if joined is None:
                raise _contradiction(slots[first], slot, site)
            numbers[first][site] = joined
            joined_with.add((first, index))
        _check_growth([slots[index] for index in kept], cosine[np.ix_(kept, kept)], site)
    return joined_with


def _place(sites: Sequence[Site]) -> bytes:
    """Names the sites in a few bytes."""
    return hashlib.sha256("".join(f"{site.layer} {site.hook.value} " for site in sites).encode()).digest()


def _are_apart(ways: Sequence[Direction], sites: Sequence[Site], place: bytes) -> bool:
    """Whether no two directions are one at any of `sites`, and no set of them is refused there.

    Remembered, and a matter of which they are alone, not of their order.
    """
    ordered = sorted(ways, key=lambda way: way.row_key)
    key = hashlib.sha256(place + b"".join(way.row_key for way in ordered)).digest()
    known = _APART.get(key)
    if known is None:
        cosines = _cosines(ordered, sites, place)
        one, other = np.triu_indices(len(ways), 1)
        different = bool((1.0 - np.abs(cosines[:, one, other]) >= SAME).all())
        known = different and bool((np.diagonal(_inverses(cosines), axis1=1, axis2=2) <= MOST_GROWTH**2).all())
        _APART.put(key, known)
    return known


def _cosines(ways: Sequence[Direction], sites: Sequence[Site], place: bytes) -> Matrix:
    """Those [len(sites), K, K] of the directions at each of `sites`, which `place` names; of two they are remembered.

    They are taken pair by pair: in whatever sets two meet, in every process, they have the same bits.
    """
    result = np.ones((len(sites), len(ways), len(ways)))
    unknown: dict[tuple[bytes, ...], tuple[int, int]] = {}
    for one, other in itertools.combinations(range(len(ways)), 2):
        key = (place, *sorted((ways[one].row_key, ways[other].row_key)))
        if (known := _COSINES.get(key)) is None:
            unknown[key] = one, other
        else:
            result[:, one, other] = result[:, other, one] = known
    if unknown:
        _take_cosines(ways, sites, list(unknown.values()), result)
        for key, (one, other) in unknown.items():
            _COSINES.put(key, result[:, one, other].copy(), 8 * len(sites))
    return result


def _take_cosines(
    ways: Sequence[Direction], sites: Sequence[Site], pairs: Sequence[tuple[int, int]], into: Matrix
) -> None:
    taken = sorted({index for pair in pairs for index in pair})
    spread = all(ways[index].is_spread for index in taken)
    start = 0
    for some in a_few(sites[:1] if spread else sites, len(taken) * ways[0].hidden_size):
        units: dict[int, Matrix] = {}
        for index in taken:
            values = ways[index].values(some)
            units[index] = values / np.linalg.norm(values, axis=1, keepdims=True)
        at = slice(None) if spread else slice(start, start + len(some))
        for one, other in pairs:
            into[at, one, other] = into[at, other, one] = np.einsum("sh,sh->s", units[one], units[other])
        start += len(some)


def _joined(slot: Slot, numbers: Numbers, other: Slot, others: Numbers, *, flipped: bool) -> Numbers | None:
    """What both ask of one direction, in terms of the first; None where that is no one thing."""
    if slot.gate != other.gate or slot.response != other.response:
        return None
    if numbers == others and (not flipped or (RESPONSES[slot.response].odd and not numbers.bias)):
        return numbers
    if slot.response != CLIP.name or numbers.bias or others.bias:
        return None
    strength, low, high = numbers.own
    strength_too, low_too, high_too = others.own
    if flipped:
        low_too, high_too = -high_too, -low_too
    low, high = max(low, low_too), min(high, high_too)
    return Numbers.of(0.0, strength, low, high) if strength == strength_too and low <= high else None


def _contradiction(slot: Slot, other: Slot, site: Site) -> SteeringError:
    one = slot.read is not None and slot.read.names
    if slot.response != other.response:
        wanted = "one direction has one response"
    elif slot.response == CLIP.name:
        wanted = "on one direction strengths and gates must be equal and intervals must meet"
    else:
        wanted = "on one direction numbers and gates must be equal"
        wanted += "" if RESPONSES[slot.response].odd else ", and no direction the opposite of the other"
    return SteeringError(
        "",
        f"{_called(slot)} and {_called(other)} act along one direction ({one}) at {site} and ask for different things: "
        f"{wanted}; leave one of them out",
    )


def _check_growth(slots: Sequence[Slot], cosines: Matrix, site: Site) -> None:
    """Refuse a set in which one slot alone would move a token too far. `cosines` are those of its directions."""
    if len(slots) < 2:
        return
    inverse = _inverses(cosines)
    growth = np.sqrt(np.diag(inverse))
    first = int(growth.argmax())
    if growth[first] <= MOST_GROWTH:
        return
    shares = np.abs(inverse[first])
    shares[first] = -1.0
    close = [slots[first], slots[int(shares.argmax())]]
    names = " and ".join(slot.read.names for slot in close if slot.read is not None)
    how = "dependent" if growth[first] > 1e6 else f"so close that one alone would move a token {growth[first]:.1f}"
    how += "" if growth[first] > 1e6 else " times as far as its direction needs"
    raise SteeringError(
        "",
        f"{_called(close[0])} and {_called(close[1])} cannot act together at {site}: the directions {names} are {how}, "
        f"at most {MOST_GROWTH:g} times is served; leave one out, or narrow it with `layers`",
    )


def _inverses(cosines: Matrix) -> Matrix:
    values, vectors = np.linalg.eigh(cosines)
    result: Matrix = (vectors / np.maximum(values, 1e-30)[..., None, :]) @ vectors.swapaxes(-1, -2)
    return result


def _features_once(slots: list[Slot]) -> list[Slot]:
    """The slots, of which each feature has one at a site: two would move it twice as far as either was asked to.

    Raises `SteeringError` where they ask for different things.
    """
    first: dict[tuple[object, ...], Slot] = {}
    kept: list[Slot] = []
    for slot in slots:
        numbers = dict(slot.at)
        for site in slot.sites if slot.response == FEATURE.name else ():
            other = first.setdefault((site, *_content(slot, site)), slot)
            if other is slot:
                continue
            if (other.at[site], other.gate) != (numbers.pop(site), slot.gate):
                raise SteeringError(
                    "",
                    f"{_called(other)} and {_called(slot)} change one feature at {site} and ask for different things: "
                    "leave one of them out, or say both in one",
                )
        if (left := _with_numbers(slot, numbers)) is not None:
            kept.append(left)
    return sorted(kept, key=lambda slot: slot.digest)


def _content(slot: Slot, site: Site) -> Iterator[tuple[bytes, float, bool]]:
    """What its directions are at `site`, wherever else they act."""
    for part in (part for way in slot.directions for part in way.parts):
        yield part.vector.digest_at(site), part.weight, part.unit


def _check_amounts(slots: Sequence[Slot]) -> None:
    replacing = [slot for slot in slots if slot.response == REPLACE.name]
    for site in sorted({site for slot in replacing for site in slot.sites}, key=site_order):
        here = [slot for slot in replacing if site in slot.at]
        if (whole := sum(slot.at[site].own[0] for slot in here)) > 1.0 + WHOLE:
            called = " and ".join(map(_called, here))
            said = f"replace {whole:g} of the stream at {site} together, and 1 is all of it: lower `amount`"
            raise SteeringError("", f"{called} {said}, gates counted as if they were open, or narrow `layers`")


def _called(slot: Slot) -> str:
    return " at ".join(filter(None, (slot.kind or "a slot", slot.path)))
