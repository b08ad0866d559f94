"""What an engine core does with a request before anything else sees it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.engines.vllm.carried import MARK, Carried, Decoded
from trimtab.engines.vllm.core import checks
from trimtab.errors import SteeringError
from trimtab.program.codec import encode
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.sites import HookPoint, ModelSites, Room, Site
from trimtab.spec import Steering
from trimtab.vectors import SteeringVector

pytestmark = pytest.mark.vllm  # refusals are vLLM's own errors too

SITE = Site(0, HookPoint.POST_BLOCK)
MODEL = ModelSites(4, 1, frozenset({SITE}))
SETTINGS = SimpleNamespace(start_vectors={}, start_probes={}, start_vectors_by_digest={})
SPEC = {"interventions": [{"kind": "add", "vector": {"post_block": {"0": [1.0, 2.0, 3.0, 4.0]}}}]}
SENT = encode(Steering.parse(SPEC).resolve({}, MODEL))


def core(steered: bool = True) -> Any:
    return SimpleNamespace(_trimtab_served=(SETTINGS, MODEL, Decoded()) if steered else None)


def request(given: Any, **attributes: Any) -> Any:
    params = SimpleNamespace(extra_args={MARK: True, "other": 1} | ({} if given is None else {"steering": given}))
    return SimpleNamespace(request_id="r", sampling_params=params, **attributes)


def test_a_request_gets_its_steering_in_the_form_that_was_read_and_keeps_the_rest() -> None:
    asked = request(SENT)
    params = asked.sampling_params
    checks.check_request(core(), asked)
    assert isinstance(asked.sampling_params.extra_args["steering"], Carried)
    assert asked.sampling_params.extra_args["other"] == 1
    assert params.extra_args["steering"] is SENT  # the caller's own parameters are not touched


@pytest.mark.parametrize("resumable", [True, False])
def test_a_resumable_request_is_refused_only_if_it_is_steered(resumable: bool) -> None:
    checks.check_request(core(), request(None, resumable=resumable))
    checks.check_request(core(steered=False), request(SENT, resumable=resumable))
    asked = request(SENT, resumable=resumable)
    if not resumable:
        checks.check_request(core(), asked)
        return
    with pytest.raises(SteeringError, match="cannot be combined with resumable requests"):
        checks.check_request(core(), asked)
    assert asked.sampling_params.extra_args["steering"] is SENT


def test_what_another_engine_of_this_process_has_read_is_checked_again() -> None:
    elsewhere = Site(7, HookPoint.POST_BLOCK)
    spec = {"interventions": [{"kind": "add", "vector": {"post_block": {"7": [1.0, 2.0, 3.0, 4.0]}}}]}
    read = Steering.parse(spec).resolve({}, ModelSites(4, 8, frozenset({elsewhere})))
    with pytest.raises(SteeringError, match="post_block:7 is not served by this engine"):
        checks.check_request(core(), request(Carried(encode(read), read)))
    monitor = ResolvedGate.of(SteeringVector({SITE: [1.0] * 4}), 0.0, 1.0)
    monitored = behind(Steering.parse(SPEC).resolve({}, MODEL), monitor)
    with pytest.raises(SteeringError, match="serves 0 per request"):
        checks.check_request(core(), request(Carried(encode(monitored), monitored)))


def test_a_request_that_no_waiting_could_bring_its_rows_is_refused() -> None:
    halves = [{**SPEC["interventions"][0], "phase": "prefill"}, {**SPEC["interventions"][0], "phase": "decode"}]
    halves[1]["vector"] = {"post_block": {"0": [4.0, 3.0, 2.0, 1.0]}}
    sent = encode(Steering.parse({"interventions": halves}).resolve({}, MODEL))
    checks.check_request(core(), request(sent))
    small = SimpleNamespace(_trimtab_served=(SETTINGS, replace(MODEL, room=Room(1, 0)), Decoded()))
    with pytest.raises(SteeringError, match="needs 2 table rows at one time, and this engine has 1"):
        checks.check_request(small, request(sent))
    checks.check_request(small, request(SENT))
