"""What a step of decoding costs the host: calls and operations on the device, as many for a large batch as for one."""

from typing import Any

import numpy as np
import pytest
import torch
from runtime_model import HIDDEN, SITES, vector
from slots_model import FORM, VECTORS, Ask
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.ops import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.spans import Spans
from trimtab.runtime import SteeringRuntime, probes_needed, rows_needed
from trimtab.runtime import runtime as module
from trimtab.runtime.passes import MOST_PASSES, PassLog
from trimtab.sites import Phase
from work import calls

GATES, SUMS = 4, 12
SPANS = Spans(5, (0, 5), (0, 1), ((0,), (1,)), (Phase.PREFILL, Phase.DECODE))
PROBES = [vector(100 + seed, SITES[:1]) for seed in range(GATES)]


class Operations(TorchDispatchMode):
    """Counts those that are no mere views: each is a launch or a copy where tensors are a GPU's."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


class Batch:
    """Requests that decode, each with a vector at its own scale, gates and slots."""

    def __init__(
        self, requests: int, gates: int = 0, slots: bool = False, max_tokens: int = 8192, spans: bool = False
    ) -> None:
        self.buffers = SteeringBuffers(
            SITES,
            hidden_size=HIDDEN,
            max_rows=rows_needed(requests, gates, FORM.count),
            max_tokens=max_tokens,
            dtype=torch.float32,
            gates=gates,
            max_probes=probes_needed(requests, gates),
            slots=FORM if slots else None,
            span_requests=requests,
        )
        self.runtime = SteeringRuntime(self.buffers, max_requests=requests)
        self.names = [f"r{number}" for number in range(requests)]
        for number, name in enumerate(self.names):
            terms = [Term(vector(1), 1.0 + number)]
            terms += [Term(vector(2), 1.0, gate=ResolvedGate.of(probe, 0.0, 1.0)) for probe in PROBES[:gates]]
            both = PhaseProgram.of(terms, [Ask(one, high=float(number)).slot for one in VECTORS[:2]] if slots else [])
            self.runtime.admit(name, ResolvedSteering((both, both), spans=SPANS if spans else None))
        self.positions, self.prompts = np.full(requests, 10), np.full(requests, 5)
        self.on_device = torch.zeros(requests, dtype=torch.int64)

    def step(self) -> None:
        self.positions += 1
        self.runtime.step(self.names, self.positions, np.ones_like(self.positions), self.prompts,
                          positions=self.on_device, token_ids=self.on_device)  # fmt: skip


@pytest.mark.parametrize("requests", [1, 32, 256])
@pytest.mark.parametrize(("gates", "slots", "most"), [(0, False, 0), (0, True, 2), (1, False, 1), (4, True, 3)])
def test_a_steady_step_writes_nothing_and_copies_what_gates_decided_and_what_slots_did(
    requests: int, gates: int, slots: bool, most: int
) -> None:
    batch = Batch(requests, gates, slots)
    batch.step()
    batch.step()
    steps = 4 * MOST_PASSES
    with Operations() as seen:
        for _ in range(steps):
            batch.step()
    # Logs go to the host every `MOST_PASSES` passes, from memory that is asked for once; what slots did is summed then.
    often = steps // MOST_PASSES + 1
    assert seen.count <= most * (steps + often) + slots * SUMS * often


def test_gates_and_slots_add_few_calls_to_a_steady_step_and_as_many_for_256_requests_as_for_one() -> None:
    made = {}
    for requests in (1, 256):
        for gates, slots in ((0, False), (4, True)):
            batch = Batch(requests, gates, slots)
            batch.step()
            batch.step()
            made[requests, gates] = calls(batch.step)
    assert made[1, 0] == made[256, 0]
    assert made[1, 4] == made[256, 4] <= made[1, 0] + 40


def test_spans_add_a_launch_and_few_calls_to_a_step_and_as_many_for_256_requests_as_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In steady steps, and in those in which two requests have changed places."""
    launches: list[int] = []
    monkeypatch.setattr(module, "route", lambda args, count: launches.append(count))
    made = {}
    for requests in (2, 256):
        for spans in (False, True):
            batch = Batch(requests, 4, slots=True, spans=spans)
            launches.clear()
            for steady in (True, False):

                def step(batch: Batch = batch, steady: bool = steady) -> None:
                    if not steady:
                        batch.names.reverse()
                    batch.step()

                for _ in range(3):
                    step()
                made[requests, spans, steady] = calls(step)
                with Operations() as seen:
                    step()
                made[requests, spans, steady, "operations"] = seen.count
            assert launches == [requests] * 10 * spans
    for steady in (True, False):
        assert made[2, True, steady] == made[256, True, steady] <= made[256, False, steady] + 40
        # What was decided is copied for both meters; records of gates that are alike name their slots, so they change.
        more = made[256, True, steady, "operations"] - made[256, False, steady, "operations"]
        assert more <= (2 if steady else 3)


def test_what_a_pass_in_inference_mode_left_is_read_outside_of_it() -> None:
    left = torch.arange(8.0).reshape(4, 2)
    with torch.inference_mode():
        log = PassLog(4, 1, torch.device("cpu"))
        log.widen(2)
        log.keep(np.zeros(3, np.int64), left[:3])
    log.keep(np.ones(1, np.int64), left[3:])
    log.send()
    (arrived,) = log.arrived(wait=True)
    assert arrived.passes == 2
    assert arrived.keys.tolist() == [0, 0, 0, 1]
    assert arrived.values.tolist() == left.tolist()


def test_what_gates_decide_is_counted_alike_over_any_number_of_passes() -> None:
    """In steady steps, in prefill, with the log full, while requests go."""
    batch = Batch(3, gates=2, max_tokens=400)
    rng = np.random.default_rng(0)
    due: dict[str, list[np.ndarray]] = {name: [] for name in batch.names}
    names, computed = list(batch.names), dict.fromkeys(batch.names, 0)
    for number in range(3 * MOST_PASSES):
        counts = [int(rng.integers(1, 130)) if number % 11 == 0 else 1 for _ in names]
        batch.runtime.step(names, [computed[name] for name in names], counts, [40] * len(names))
        values = rng.random(batch.buffers.gates.values.shape).astype(np.float32)
        batch.buffers.gates.values.copy_(torch.from_numpy(values))
        place = 0
        for name, count in zip(names, counts, strict=True):
            due[name].append(values[:, place : place + count].astype(np.float64))
            place, computed[name] = place + count, computed[name] + count
        if number == 70:
            batch.runtime.release(names.pop(0))
    for name, parts in due.items():
        factors = np.concatenate(parts, axis=1)
        uses = {use.gate: use for use in batch.runtime.gate_report(name)}
        assert len(uses) == 2
        gates = sorted(ResolvedGate.of(probe, 0.0, 1.0).digest.hex() for probe in PROBES[:2])
        for gate, of_gate in zip(gates, factors, strict=True):
            assert (uses[gate].tokens, uses[gate].above_half) == (len(of_gate), int((of_gate > 0.5).sum()))
            assert uses[gate].mean == pytest.approx(of_gate.mean(), rel=1e-6)


def test_meters_of_requests_that_go_are_used_again_while_others_run() -> None:
    batch = Batch(2, gates=1)
    program = PhaseProgram.of([Term(vector(2), 1.0, gate=ResolvedGate.of(PROBES[0], 0.0, 1.0))])
    held = len(batch.runtime._gates.meters._sums)
    batch.runtime.release("r1")
    for number in range(100):
        batch.runtime.admit(f"s{number}", ResolvedSteering((program, program)))
        batch.runtime.step(["r0", f"s{number}"], [10, 10], [1, 1], [5, 5])
        batch.runtime.release(f"s{number}")
    assert len(batch.runtime._gates.meters._sums) == held
    assert sum(use.tokens for use in batch.runtime.gate_totals()) == 200


def test_a_batch_that_did_not_fit_leaves_the_plan_of_the_last_one() -> None:
    batch = Batch(2, gates=1, max_tokens=400)
    batch.step()
    before = batch.buffers.token_slab.clone()
    with pytest.raises(ValueError, match="401 tokens in a forward pass of 400"):
        batch.runtime.step(batch.names, [0, 0], [400, 1], [5, 5])
    batch.step()
    assert torch.equal(batch.buffers.token_slab, before)
    batch.runtime.step(batch.names, [0, 0], [399, 1], [500, 500])
    assert bool((batch.buffers.index[:400] > 0).all())
