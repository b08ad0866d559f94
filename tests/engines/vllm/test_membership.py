"""Who is admitted while requests come, wait, finish and come back."""

import torch

from trimtab import Steering
from trimtab.engines.vllm.membership import Membership
from trimtab.ops import SteeringBuffers
from trimtab.program import ResolvedSteering
from trimtab.runtime import SteeringRuntime
from trimtab.sites import HookPoint, ModelSites, Site

SITE = Site(0, HookPoint.POST_BLOCK)
MODEL = ModelSites(4, 1, frozenset({SITE}))


def steering(value: float) -> ResolvedSteering:
    vector = {"post_block": {"0": [value, 1.0, 0.0, 0.0]}}
    return Steering.parse({"interventions": [{"kind": "add", "vector": vector}]}).resolve({}, MODEL)


def members(limit: int) -> tuple[SteeringRuntime, Membership]:
    buffers = SteeringBuffers([SITE], hidden_size=4, max_rows=1 + 2 * limit, max_tokens=64, dtype=torch.float32)
    runtime = SteeringRuntime(buffers, max_requests=limit)
    return runtime, Membership(runtime, limit)


def test_a_request_joins_once_and_its_row_is_free_when_it_leaves() -> None:
    runtime, group = members(2)
    assert list(group.new(["a", "b"])) == ["a", "b"]
    group.join("a", steering(1.0), ["a", "b"])
    group.join("b", None, ["a", "b"])
    assert list(group.new(["a", "b", "c"])) == ["c"]
    assert runtime.rows_in_use == 1
    group.leave(["a", "b", "never seen"])
    assert runtime.rows_in_use == 0
    assert list(group.new(["a"])) == ["a"]


def test_when_room_runs_out_those_that_wait_leave_and_those_that_run_stay() -> None:
    runtime, group = members(2)
    group.join("waits", steering(1.0), ["waits", "runs"])
    group.join("runs", steering(2.0), ["waits", "runs"])
    group.join("new", steering(3.0), ["runs", "new"])
    assert runtime.rows_in_use == 2
    assert list(group.new(["waits", "runs", "new"])) == ["waits"]


def test_a_request_that_comes_back_under_its_id_brings_its_own_steering() -> None:
    runtime, group = members(1)
    group.join("a", steering(1.0), ["a"])
    group.join("a", steering(2.0), ["a"])
    assert runtime.rows_in_use == 1
    group.join("a", None, ["a"])
    assert runtime.rows_in_use == 0


def test_requests_that_leave_together_are_released_in_one_order_whatever_order_they_are_named_in() -> None:
    digests = []
    for order in (["a", "b", "c"], ["c", "a", "b"]):
        runtime, group = members(3)
        for number, name in enumerate(["a", "b", "c"]):
            group.join(name, steering(float(number)), ["a", "b", "c"])
        for name in order:
            group.leave_soon(name)
        assert runtime.rows_in_use == 3
        group.settle()
        assert runtime.rows_in_use == 0
        digests.append(runtime.digest())
    assert digests[0] == digests[1]


def test_a_request_that_left_and_comes_back_at_once_is_admitted_anew() -> None:
    runtime, group = members(1)
    group.join("a", steering(1.0), ["a"])
    group.leave_soon("a")
    group.join("a", steering(2.0), ["a"])
    assert runtime.rows_in_use == 1
    group.settle()
    assert runtime.rows_in_use == 1
