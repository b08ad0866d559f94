"""A gate of several as a request writes it: `{"all": [gate, ...]}` or `{"any": [gate, ...]}`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator

from trimtab.errors import SteeringError
from trimtab.program.joint_gate import MOST_MEMBERS, Join, joined
from trimtab.program.joint_gate import Condition as Resolved
from trimtab.spec.base import Model, below, keys_are_text
from trimtab.spec.gate import Gate
from trimtab.vectors.probe import Probe
from trimtab.wording import shown


def _members(value: Any) -> tuple[Gate, ...]:
    if not isinstance(value, (list, tuple)):
        raise SteeringError("", f"got {type(value).__name__}, want a list of gates")
    if not value:
        raise SteeringError("", "is empty: name at least one gate, or leave the gate out")
    if len(value) > MOST_MEMBERS:
        raise SteeringError("", f"has {len(value)} items, at most {MOST_MEMBERS} are allowed")
    members = []
    for index, one in enumerate(value):
        with below(f"[{index}]"):
            members.append(_member(one))
    return tuple(members)


def _member(value: Any) -> Gate:
    if isinstance(value, JointGate) or (isinstance(value, Mapping) and _joins(value)):
        raise SteeringError(
            "",
            "is made of several gates itself, and a member has one probe: an `all` within an `all` is one list, and so "
            "is an `any` within an `any`; of the rest, give the intervention once behind each part",
        )
    return value if isinstance(value, Gate) else Gate(**_mapping(value))


class JointGate(Model):
    """A gate of several; build it as `AllOf` or `AnyOf`."""

    @property
    def join(self) -> Join:
        """How its members are joined: the name of its one field."""
        return next(join for join in Join if join in type(self).model_fields)

    @property
    def members(self) -> dict[str, Gate]:
        """Its gates, by where they stand in it."""
        members: tuple[Gate, ...] = getattr(self, self.join)
        return {f"{self.join}[{index}]": member for index, member in enumerate(members)}

    def resolve(self, probes: Mapping[str, Probe]) -> Resolved:
        """The gate with its probes looked up in `probes`; of one member, that. Raises `SteeringError` below the gate,
        for equal members too."""
        found = []
        for where, member in self.members.items():
            with below(where):
                found.append(replace(member.resolve(probes), path=where))
        return joined(self.join, found)


Members = Annotated[tuple[Gate, ...], BeforeValidator(_members)]


class AllOf(JointGate):
    """The product of the factors of its members."""

    all: Members


class AnyOf(JointGate):
    """One minus the product of one minus the factors of its members."""

    any: Members


_OF: dict[Join, type[JointGate]] = {Join.ALL: AllOf, Join.ANY: AnyOf}


def _condition(value: Any) -> Gate | JointGate | None:
    if value is None or isinstance(value, (Gate, JointGate)):
        return value
    given = _mapping(value)
    joins = _joins(given)
    if not joins:
        return Gate(**given)
    if others := sorted(given.keys() - {joins[0]}):
        raise SteeringError(
            others[0],
            f"cannot stand beside `{joins[0]}`: what a gate says, each member says for itself; the opposite of `all` "
            "is `any` of the inverted members, and of `any` it is `all` of them",
        )
    return _OF[joins[0]](**given)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SteeringError("", f"got {shown(value) if value is None else type(value).__name__}, want an object")
    keys_are_text(value)
    return value


def _joins(value: Mapping[str, Any]) -> list[Join]:
    return [join for join in Join if join in value]


Condition = Annotated[Gate | AllOf | AnyOf | None, BeforeValidator(_condition)]
"""What may stand before an intervention."""
