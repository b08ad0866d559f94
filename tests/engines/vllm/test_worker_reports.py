"""What a worker says of itself: never by raising, a digest only where one is shown, no rows of gone requests."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from trimtab import Probe, Steering, SteeringVector
from trimtab.engines.vllm.carried import TICKET, Carried
from trimtab.engines.vllm.patches.patching import put_on
from trimtab.engines.vllm.patches.worker import RUNNER_V2
from trimtab.engines.vllm.worker.runner_v2 import DriveV2
from trimtab.engines.vllm.worker.worker import WorkerSteering, worker_status
from trimtab.ops import SteeringBuffers
from trimtab.program.codec import encode
from trimtab.runtime import SteeringRuntime, probes_needed, rows_needed
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site

SITE = Site(0, HookPoint.POST_BLOCK)
MODEL = ModelSites(4, 1, frozenset({SITE}), gates=GateLimits(1, frozenset({SITE})))
STEERING = Steering.parse(
    {"interventions": [{"kind": "add", "vector": "calm", "gate": {"probe": "anger", "threshold": 0.0}}]}
).resolve({"calm": SteeringVector({SITE: [1.0, 0.0, 0.0, 0.0]})}, MODEL, {"anger": Probe.at(SITE, [1.0, 0, 0, 0])})


@pytest.fixture
def runtime() -> SteeringRuntime:
    rows, probes = rows_needed(2, 1), probes_needed(2, 1)
    buffers = SteeringBuffers(
        [SITE], hidden_size=4, max_rows=rows, max_tokens=8, dtype=torch.float32, gates=1, max_probes=probes
    )
    return SteeringRuntime(buffers, max_requests=2)


def kept(attachment: Any, runtime: SteeringRuntime, drive: DriveV2 | None = None) -> WorkerSteering:
    return WorkerSteering(SimpleNamespace(), attachment, runtime, drive)  # type: ignore[arg-type]


@pytest.fixture
def worker(runtime: SteeringRuntime) -> Any:
    attachment: Any = SimpleNamespace(buffers=runtime._buffers, modules={})
    return SimpleNamespace(rank=3, model_runner=object(), _trimtab=kept(attachment, runtime))


def test_a_worker_that_cannot_answer_says_so_and_does_not_raise(worker, monkeypatch) -> None:
    assert "was started without it" in worker_status(SimpleNamespace(rank=1))["error"]
    monkeypatch.setattr(SteeringRuntime, "gate_report", lambda self, owner: 1 / 0)
    assert worker_status(worker, False, ["a"]) == {"rank": 3, "error": "ZeroDivisionError: division by zero"}


def test_the_state_is_hashed_only_where_its_digest_is_shown(worker, runtime, monkeypatch) -> None:
    assert worker_status(worker)["digest"] == runtime.digest()
    monkeypatch.setattr(SteeringRuntime, "digest", lambda self: pytest.fail("hashed"))
    status = worker_status(worker, False)
    assert "digest" not in status
    assert status["capacity"] == runtime.capacity


def test_a_worker_tells_of_an_account_by_its_whole_name(worker, runtime) -> None:
    for name in ("a", "a-b"):
        runtime.admit(name, STEERING, owner=name)
    runtime.step(["a", "a-b"], [0, 0], [2, 3], [1, 1])
    uses = worker_status(worker, False, ["a", "-", ".*"])["uses"]
    assert {name: [(use["probe"], use["tokens"]) for use in told] for name, told in uses.items()} == {
        "a": [("anger", 2)], "-": [], ".*": [],
    }  # fmt: skip


class Runner:
    """The methods of a V2 runner that are wrapped."""

    def _remove_request(self, req_id: str) -> None: ...
    def add_requests(self, scheduler_output: Any) -> None: ...
    def prepare_inputs(self, scheduler_output: Any) -> None: ...
    def _dummy_run(self, num_tokens: int) -> str:
        return f"ran {num_tokens}"


def test_an_engine_that_falls_idle_holds_no_rows(runtime) -> None:
    """With its last requests finished, a V2 runner removes them, adds none, and prepares no step."""
    runner, settings = Runner(), SimpleNamespace()
    put_on(runner, RUNNER_V2, kept(None, runtime, DriveV2(runner, runtime, settings, 2)))  # type: ignore[arg-type]
    extra = {"steering": Carried(encode(STEERING), STEERING), TICKET: {"answer": "the answer"}}
    params = SimpleNamespace(extra_args=extra)
    new = SimpleNamespace(req_id="a", sampling_params=params, prefill_token_ids=[3, 4], num_computed_tokens=0)
    runner.add_requests(SimpleNamespace(scheduled_new_reqs=[new], num_scheduled_tokens={"a": 2}))
    assert runtime.rows_in_use == 1
    runtime.step(["a"], [0], [2], [1])
    assert [use.tokens for use in runtime.gate_report("the answer")] == [2]
    runner._remove_request("a")
    runner.add_requests(SimpleNamespace(scheduled_new_reqs=[], num_scheduled_tokens={}))
    assert runtime.rows_in_use == 0


def test_a_dummy_run_is_made_after_the_last_step_is_counted(runtime) -> None:
    runner = Runner()
    put_on(runner, RUNNER_V2, kept(None, runtime))
    runtime.admit("a", STEERING)
    runtime.step(["a"], [0], [2], [1])
    values = runtime._buffers.gates.values
    values.fill_(1.0)
    assert runner._dummy_run(5) == "ran 5"
    values.fill_(0.0)
    (use,) = runtime.gate_report("a")
    assert (use.tokens, use.mean) == (2, 1.0)
