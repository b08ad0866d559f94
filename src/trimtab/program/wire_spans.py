"""How the runs of a request travel between processes: see `trimtab.program.codec`."""

from typing import Any

from trimtab.errors import SteeringError
from trimtab.program.spans import (
    IDS_BELOW,
    LONGEST_SEQUENCE,
    MOST_ATOMS,
    MOST_ID_RANGES,
    MOST_KINDS,
    MOST_PROGRAMS,
    MOST_RUNS,
    MOST_SEQUENCES,
    POSITIONS_BELOW,
    Atom,
    Between,
    IdSet,
    Spans,
)  # fmt: skip
from trimtab.program.wire_values import check_keys, index_of, list_of, parts_of, truth_of
from trimtab.sites import Phase
from trimtab.wording import shown

IDS, BETWEEN = "ids", "between"
KEYS = frozenset({"prompt_length", "starts", "kinds", "choices", "phases", "atoms"})


def encode_spans(spans: Spans | None) -> dict[str, Any] | None:
    """The form of what says which positions have which program, None where phases do."""
    if spans is None:
        return None
    return {
        "prompt_length": spans.prompt_length,
        "starts": list(spans.starts),
        "kinds": list(spans.kinds),
        "choices": [list(choice) for choice in spans.choices],
        "phases": [phase.value for phase in spans.phases],
        "atoms": [_encode_atom(atom) for atom in spans.atoms],
    }


def decode_spans(entry: Any, path: str) -> Spans | None:
    """The runs of a form. Raises `SteeringError`."""
    if entry is None:
        return None
    check_keys(entry, path, KEYS)
    choices = _few(entry["choices"], MOST_KINDS, f"{path}.choices")
    phases = _few(entry["phases"], MOST_PROGRAMS, f"{path}.phases")
    atoms = _few(entry["atoms"], MOST_ATOMS, f"{path}.atoms")
    parts = (
        index_of(entry["prompt_length"], POSITIONS_BELOW, "positions", f"{path}.prompt_length"),
        _indices(entry["starts"], MOST_RUNS, POSITIONS_BELOW, "positions", f"{path}.starts"),
        _indices(entry["kinds"], MOST_RUNS, len(choices), "choices", f"{path}.kinds"),
        tuple(
            _indices(choice, 1 << MOST_ATOMS, len(phases), "programs", f"{path}.choices[{i}]")
            for i, choice in enumerate(choices)
        ),
        tuple(_phase(phase, f"{path}.phases[{i}]") for i, phase in enumerate(phases)),
        tuple(_decode_atom(atom, f"{path}.atoms[{i}]") for i, atom in enumerate(atoms)),
    )
    try:
        return Spans(*parts)
    except ValueError as error:
        raise SteeringError(path, str(error)) from None


def _encode_atom(atom: Atom) -> list[Any]:
    if isinstance(atom, IdSet):
        return [IDS, [list(one) for one in atom.ranges]]
    opens, closes = ([list(one) for one in some] for some in (atom.opens, atom.closes))
    return [BETWEEN, opens, closes, atom.is_open, atom.looks_back]


def _decode_atom(entry: Any, path: str) -> Atom:
    parts = list_of(entry, path)
    if parts[:1] == [IDS]:
        _, given = parts_of(parts, path, "ids", "ranges")
        ranges = _few(given, MOST_ID_RANGES, f"{path}[1]")
        return IdSet(tuple(_range(one, f"{path}[1][{i}]") for i, one in enumerate(ranges)))
    if parts[:1] != [BETWEEN]:
        raise SteeringError(path, f"got {shown(parts)}, want [{IDS!r}, ...] or [{BETWEEN!r}, ...]")
    _, opens, closes, is_open, looks_back = parts_of(
        parts, path, "between", "opens", "closes", "whether it is open at first", "whether it looks back"
    )
    return Between(
        _sequences(opens, f"{path}[1]"),
        _sequences(closes, f"{path}[2]"),
        truth_of(is_open, f"{path}[3]"),
        truth_of(looks_back, f"{path}[4]"),
    )


def _range(entry: Any, path: str) -> tuple[int, int]:
    first, end = parts_of(entry, path, "first id", "end")
    return index_of(first, IDS_BELOW, "ids", f"{path}[0]"), index_of(end, IDS_BELOW + 1, "ids", f"{path}[1]")


def _sequences(entry: Any, path: str) -> tuple[tuple[int, ...], ...]:
    some = _few(entry, MOST_SEQUENCES, path)
    return tuple(_indices(one, LONGEST_SEQUENCE, IDS_BELOW, "ids", f"{path}[{i}]") for i, one in enumerate(some))


def _indices(entry: Any, most: int, count: int, what: str, path: str) -> tuple[int, ...]:
    """At most so many places among `count`."""
    return tuple(index_of(value, count, what, f"{path}[{i}]") for i, value in enumerate(_few(entry, most, path)))


def _few(value: Any, most: int, path: str) -> list[Any]:
    """A list that is no longer than engines hold: a few bytes must not become hours of reading."""
    some = list_of(value, path)
    if len(some) > most:
        raise SteeringError(path, f"has {len(some)} items, at most {most} are read")
    return some


def _phase(value: Any, path: str) -> Phase:
    if not isinstance(value, str) or value not in Phase.__members__.values():
        raise SteeringError(path, f"got {shown(value)}, want one of {', '.join(Phase)}")
    return Phase(value)
