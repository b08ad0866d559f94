"""Turns pydantic's report on one model of a spec into a `SteeringError`: the caller's own path, and the remedy."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab.errors import SteeringError
from trimtab.wording import shown, with_suggestions


def translate(error: ValidationError, model: type[BaseModel]) -> SteeringError:
    """The first fault of a report on `model`; an unknown key goes first, being the likely cause of a missing one."""
    faults = error.errors(include_url=False)
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    place = path(fault["loc"])
    context = fault.get("ctx", {})
    if isinstance(cause := context.get("error"), SteeringError):
        return SteeringError(join(place, cause.field), cause.message)
    if fault["type"] == "extra_forbidden":
        known = sorted(field.alias or name for name, field in model.model_fields.items())
        hint = with_suggestions(fault["loc"][-1], known)
        return SteeringError(place, f"unknown key{hint}; the keys are {', '.join(known)}")
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _kind_fault(fault, place)
    return SteeringError(place, _REMEDIES.get(fault["type"], "got {given}: {msg}").format(**_facts(fault)))


def path(loc: Sequence[int | str]) -> str:
    """`interventions[1].scale` for ("interventions", 1, "add", "scale"): the tag of a kind is not the caller's key."""
    parts = [part for index, part in enumerate(loc) if index != 2 or loc[0] != "interventions"]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part!s:.80}" for part in parts).removeprefix(".")


def join(outer: str, inner: str) -> str:
    """The path of a place `inner` within `outer`."""
    return f"{outer}{'.' if outer and inner and not inner.startswith('[') else ''}{inner}"


_REMEDIES = {
    "missing": "is required",
    "literal_error": "got {given}, want {expected}",
    "bool_type": "got {given}, want true or false",
    "too_short": "is empty, so nothing would be steered: give at least one, or leave the spec out",
    "too_long": "has {actual_length} items, at most {max_length} are allowed",
    "tuple_type": "got {type}, want a list",
    "model_type": "got {type}, want an object",
    "model_attributes_type": "got {type}, want an object",
}


def _kind_fault(fault: ErrorDetails, place: str) -> SteeringError:
    given = fault["input"]
    kind = given.get("kind") if isinstance(given, dict) else None
    expected = fault.get("ctx", {}).get("expected_tags")
    known = [name.strip("' ") for name in expected.split(",")] if expected else []
    said = f"unknown kind {shown(kind)}{with_suggestions(kind, known)}" if expected else "is required"
    return SteeringError(join(place, "kind"), said + (f"; the kinds are {', '.join(known)}" if known else ""))


def _facts(fault: ErrorDetails) -> dict[str, Any]:
    given = fault["input"]
    facts = {"given": shown(given), "type": type(given).__name__, "msg": fault["msg"]}
    return facts | dict(fault.get("ctx", {}))
