"""Tokens that come out otherwise have another identity, so state that was kept under the old one is not found."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import trimtab
from outcomes import CLOSE, CONSTANTS, MORE, RECORDED, STEPS, identities, outcomes, resolved
from trimtab.ops import responses as operators
from trimtab.responses import CLIP, RESPONSES
from trimtab.spec.kinds import KINDS

ANEW = "if it is meant to, record it: PYTHONPATH=src:tests python tests/outcomes.py"
CASES = [(group, case) for group, cases in STEPS.items() for case in cases]


def fault(group: str, case: str, recorded: dict[str, Any]) -> str | None:
    """What is wrong with a case, as its developer is to be told; None if nothing is."""
    steering = resolved(group, case)
    same = identities(steering) == recorded["identity"]
    if same and not np.allclose(outcomes(steering), recorded["tokens"], rtol=CLOSE, atol=CLOSE):
        constant, file = CONSTANTS[group]
        said = "tokens come out otherwise under an identity that names what they were, and state that outlives a "
        return f"{case}: {said}release would be taken for theirs: raise the number in {constant} of {file}; then {ANEW}"
    return None if same else f"{case}: its identity is another, so state kept under the old one is lost; {ANEW}"


@pytest.mark.parametrize(("group", "case"), CASES)
def test_tokens_come_out_as_their_identity_says(group: str, case: str) -> None:
    assert fault(group, case, json.loads(RECORDED.read_text())[case]) is None


def test_gates_of_the_record_open_for_some_tokens_alone() -> None:
    plain = outcomes(resolved("added", "add"))
    hard = outcomes(resolved("gates", "hard"))
    same = (plain == hard).all(axis=1)
    assert same.any()
    assert not same.all()
    soft = outcomes(resolved("gates", "soft"))
    assert (np.abs(soft - plain).max(axis=1) > 0.1).any()


def test_every_kind_response_and_gate_is_recorded() -> None:
    asked = [step for cases in STEPS.values() for steps in cases.values() for step in steps]
    assert {step["kind"] for step in asked} == {kind.model_fields["kind"].default for kind in KINDS}
    used = {slot.response for group, case in CASES for slot in resolved(group, case).decode.slots}
    assert used == set(RESPONSES)
    assert set(json.loads(RECORDED.read_text())) == {case for _, case in CASES}
    assert {case for _, case in CASES} >= set(MORE)


def test_arithmetic_that_changes_under_an_identity_is_told_with_the_number_to_raise() -> None:
    recorded = json.loads(RECORDED.read_text())

    def more_of_it(u: Any, *numbers: Any) -> Any:
        return 1.001 * operators.clip(u, *numbers)

    with mock.patch.dict(operators.EXPRESSIONS, {CLIP.name: more_of_it}):
        assert 'raise the number in b"trimtab slot 1' in (fault("slots", "ablate", recorded["ablate"]) or "")
        assert fault("added", "add", recorded["add"]) is None
    other = recorded["add"] | {"identity": recorded["a sum"]["identity"]}
    assert "its identity is another" in (fault("added", "add", other) or "")


@pytest.mark.parametrize("group", CONSTANTS)
def test_the_numbers_to_raise_stand_where_it_is_said(group: str) -> None:
    constant, file = CONSTANTS[group]
    assert constant in (Path(trimtab.__file__).parent / file).read_text()
