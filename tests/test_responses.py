"""A response that could not be told from another, or that nothing computes, is refused when it is imported."""

from dataclasses import replace

import pytest
from torch import Tensor

from trimtab.ops import responses as computed
from trimtab.responses import CODES, RESPONSES, TURN, Response, Stage, by_name


@pytest.mark.parametrize("known", RESPONSES.values(), ids=RESPONSES)
def test_a_code_that_is_taken_is_refused_naming_the_free_ones(known: Response) -> None:
    own = Response("soften", known.code, ("limit",))
    free = [code for code in CODES if code not in {response.code for response in RESPONSES.values()}]
    said = f"'soften' has the code {known.code}, which is that of '{known.name}'; free are {free[0]}, {free[1]}, "
    with pytest.raises(ValueError, match=said):
        by_name(*RESPONSES.values(), own)
    assert list(by_name(*RESPONSES.values(), replace(own, code=free[0]))) == [*RESPONSES, "soften"]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="two responses are called 'turn'"):
        by_name(*RESPONSES.values(), replace(TURN, code=CODES[-1]))


@pytest.mark.parametrize("code", [-1, len(CODES), 1 << 40])
def test_a_code_beyond_those_that_there_are_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=f"'soften' has the code {code}, want one of 0 to {CODES[-1]}"):
        Response("soften", code, ("limit",))


def soften(u: Tensor, most: Tensor) -> Tensor:
    return u - most


def test_a_response_that_nothing_computes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Response("soften", CODES[-1], ("limit",))
    monkeypatch.setattr(computed, "RESPONSES", by_name(*RESPONSES.values(), own))
    for functions in ([], [soften]):
        with pytest.raises(ValueError, match=r"'soften' needs the function soften\(u, limit\) in trimtab\.ops\.resp"):
            computed.by_name(*computed.EXPRESSIONS.values(), *functions)
    monkeypatch.setattr(computed, "RESPONSES", by_name(*RESPONSES.values(), replace(own, stage=Stage.FIRST)))
    with pytest.raises(ValueError, match=r"'soften' looks back, and trimtab\.ops\.looking_back does not compute it"):
        computed.by_name(*computed.EXPRESSIONS.values(), soften)
