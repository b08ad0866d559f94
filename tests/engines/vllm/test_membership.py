"""Who is admitted while requests come, wait, finish and come back."""

import os
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimtab import Steering
from trimtab.engines.vllm.carried import Carried
from trimtab.engines.vllm.patches.patching import put_on
from trimtab.engines.vllm.patches.worker import RUNNER_V1
from trimtab.engines.vllm.worker.membership import Membership
from trimtab.engines.vllm.worker.runner_v1 import DriveV1
from trimtab.engines.vllm.worker.runner_v2 import DriveV2
from trimtab.ops import SteeringBuffers
from trimtab.program import EMPTY, ResolvedSteering, Spans
from trimtab.program.codec import encode
from trimtab.program.spans import Between
from trimtab.runtime import SteeringRuntime
from trimtab.sites import HookPoint, ModelSites, Phase, Site

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


NAMES = [f"request {number}" for number in range(24)]


class Runner:
    """As much of the V1 model runner as is patched."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.input_batch: Any = None
        self.first = 0  # what is computed of each request
        self.positions = torch.zeros(64, dtype=torch.int64)
        self.input_ids = SimpleNamespace(gpu=torch.zeros(64, dtype=torch.int32))

    def _update_states(self, scheduler_output: Any) -> None:
        for name in scheduler_output.finished_req_ids:
            del self.requests[name]

    def _dummy_run(self, num_tokens: int) -> None: ...

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> None:
        count = len(self.requests)
        first = np.full(count, self.first, np.int32)
        self.input_batch = SimpleNamespace(
            num_reqs=count, req_ids=list(self.requests), num_computed_tokens_cpu=first, num_prompt_tokens=first * 0 + 4,
            req_id_to_index={name: index for index, name in enumerate(self.requests)},
        )  # fmt: skip


def digest_after_a_set_of_requests_has_left(runner_kind: str) -> str:
    """Two thirds of the requests finish in one step, named in a set as vLLM names them; then others come."""
    runtime, group = members(len(NAMES))
    leaving = set(NAMES[::3]) | set(NAMES[1::3])
    if runner_kind == "v2":
        for number, name in enumerate(NAMES):
            group.join(name, steering(float(number)), NAMES)
        for name in leaving:
            group.leave_soon(name)
        group.settle()
        return runtime.digest()
    runner = Runner()
    drive = DriveV1(runner, runtime, SimpleNamespace(), len(NAMES))  # type: ignore[arg-type]
    put_on(runner, RUNNER_V1, SimpleNamespace(drive=drive))
    for number, name in enumerate(NAMES):
        one = steering(float(number))
        params = SimpleNamespace(extra_args={"steering": Carried(encode(one), one)})
        runner.requests[name] = SimpleNamespace(sampling_params=params)
    runner._prepare_inputs(None, np.ones(len(NAMES), np.int32))
    assert runtime.rows_in_use == len(NAMES)
    runner._update_states(SimpleNamespace(finished_req_ids=leaving))
    assert runtime.rows_in_use == len(NAMES) // 3
    return runtime.digest()


@pytest.mark.parametrize("runner_kind", ["v1", "v2"])
def test_ranks_in_processes_of_their_own_release_in_one_order(runner_kind: str) -> None:
    """A set of strings is iterated in another order in each process, as ranks are processes of their own."""
    code = (
        "import test_membership as test\n"
        "print(list(set(test.NAMES)))\n"
        f"print(test.digest_after_a_set_of_requests_has_left({runner_kind!r}))"
    )
    found = []
    for seed in ("1", "2"):
        path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.splitlines())
    (order, digest), (other_order, other_digest) = found
    assert order != other_order  # else nothing was tried
    assert digest == other_digest


class Told(SteeringRuntime):
    """A runtime that keeps what it is told of tokens that it did not see."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.told: list[tuple[str, list[int], int]] = []

    def admit(self, request_id: str, *args: Any, tokens: Sequence[int] = (), upto: int = 0, **options: Any) -> None:
        self.told.append((request_id, list(tokens), upto))
        super().admit(request_id, *args, tokens=tokens, upto=upto, **options)

    def seed(self, request_id: str, tokens: Sequence[int], upto: int) -> None:
        self.told.append((request_id, list(tokens), upto))
        super().seed(request_id, tokens, upto)


def followed(runner: Any) -> tuple[Told, Any]:
    """A runtime, and the drive of a V1 runner with one request: a prompt of 4 tokens, steered behind token 9."""
    buffers = SteeringBuffers([SITE], hidden_size=4, max_rows=5, max_tokens=64, dtype=torch.float32, span_requests=2)
    runtime = Told(buffers, max_requests=2)
    drive = DriveV1(runner, runtime, SimpleNamespace(), 2)  # type: ignore[arg-type]
    put_on(runner, RUNNER_V1, SimpleNamespace(drive=drive))
    one = behind_token_9()
    params = SimpleNamespace(extra_args={"steering": Carried(encode(one), one)})
    runner.requests["a"] = SimpleNamespace(sampling_params=params, prompt_token_ids=[1, 2, 3, 4], output_token_ids=[])
    return runtime, drive


def behind_token_9() -> ResolvedSteering:
    spans = Spans(
        prompt_length=4, starts=(0, 4), kinds=(0, 1), choices=((0,), (1, 2)),
        phases=(Phase.PREFILL, Phase.DECODE, Phase.DECODE), atoms=(Between(opens=((9,),)),),
    )  # fmt: skip
    return ResolvedSteering((EMPTY, EMPTY, steering(1.0).decode), spans=spans)


def output(resumed: Sequence[str] = (), **all_token_ids: list[int]) -> Any:
    """As much of a scheduler's output as the drive looks at."""
    return SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed), all_token_ids=all_token_ids)
    )


def step(runner: Runner, scheduled: Any, first: int, count: int = 1) -> None:
    runner.first = first
    runner._prepare_inputs(scheduled, np.array([count], np.int32))


def test_the_device_is_told_what_lies_before_where_a_request_joins_comes_back_or_begins_again() -> None:
    runner = Runner()
    runtime, _ = followed(runner)
    step(runner, output(), 2, 2)  # two tokens of its prompt are in the prefix cache
    assert runtime.told == [("a", [1, 2, 3, 4], 2)]
    step(runner, output(), 0, 4)  # they could not be loaded
    step(runner, output(), 4)
    step(runner, output(), 5, 3)
    step(runner, output(), 6)  # drafts were rejected: the device knows what it computed
    assert runtime.told[1:] == [("a", [1, 2, 3, 4], 0)]
    runner.requests["a"].output_token_ids = [-1, -1, -1]  # as asynchronous scheduling leaves them
    step(runner, output(["a"], a=[1, 2, 3, 4, 8, 9, 7]), 6)  # thrown out; most is found in the prefix cache
    step(runner, output(), 7)
    assert runtime.told[2:] == [("a", [1, 2, 3, 4, 8, 9, 7], 6)]


def test_a_runner_of_the_second_kind_tells_of_each_request_that_comes() -> None:
    runtime, _ = followed(Runner())
    drive = DriveV2(SimpleNamespace(), runtime, SimpleNamespace(), 2)  # type: ignore[arg-type]
    one = behind_token_9()
    new = SimpleNamespace(
        req_id="a", sampling_params=SimpleNamespace(extra_args={"steering": Carried(encode(one), one)}),
        prefill_token_ids=[1, 2, 3, 4, 8, 9], num_computed_tokens=5,
    )  # fmt: skip
    drive.added(SimpleNamespace(scheduled_new_reqs=[new], num_scheduled_tokens={"a": 1}))
    assert runtime.told == [("a", [1, 2, 3, 4, 8, 9], 5)]
