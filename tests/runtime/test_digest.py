"""The state digest: equal on ranks that saw the same calls, and another one as soon as anything differs."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_model import HIDDEN, SITES, vector

from trimtab.ops import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.gates import ResolvedGate, probes_needed, rows_needed
from trimtab.runtime import SteeringRuntime

REQUESTS, GATES = 3, 2


@dataclass(frozen=True)
class GateAsked:
    probe: int = 0
    site: int = 0
    threshold: float = 0.5
    sharpness: float | None = 2.0
    invert: bool = False

    @property
    def gate(self) -> ResolvedGate:
        probe = vector(100 + self.probe, (SITES[self.site],))
        return ResolvedGate.of(probe, self.threshold, self.sharpness, self.invert)


@dataclass(frozen=True)
class Asked:
    name: str = "a"
    vector: int = 0
    scale: float = 1.0
    gate: GateAsked | None = None
    phase: str = "all"

    @property
    def steering(self) -> ResolvedSteering:
        terms = [Term(vector(self.vector, SITES[2:]), self.scale, gate=self.gate and self.gate.gate)]
        program, empty = PhaseProgram.of(terms), PhaseProgram.of([])
        return ResolvedSteering(
            *(program if self.phase in ("all", phase) else empty for phase in ("prefill", "decode"))
        )


@dataclass(frozen=True)
class Life:
    """All that a rank is told."""

    requests: tuple[Asked, ...] = ()
    batch: tuple[str, ...] = ("a", "b", "c")
    first: int = 4
    count: int = 2
    prompt: int = 5
    stepped: bool = True
    released: str = "-"
    monitor: GateAsked | None = None
    row_probe: GateAsked | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


def run(life: Life, sites: tuple[Any, ...] = SITES) -> SteeringRuntime:
    buffers = SteeringBuffers(
        sites, hidden_size=HIDDEN, max_rows=rows_needed(REQUESTS, GATES), max_tokens=32, dtype=torch.float32,
        gates=GATES, max_probes=probes_needed(REQUESTS, GATES), row_monitor=life.row_probe is not None,
    )  # fmt: skip
    runtime = SteeringRuntime(buffers, max_requests=REQUESTS)
    for asked in life.requests:
        probes = [life.row_probe.gate] if life.row_probe is not None else []
        runtime.admit(asked.name, asked.steering, probes=probes)
    if life.monitor is not None:
        runtime.set_monitor(life.monitor.gate, elsewhere=life.monitor.gate.site not in sites)
    if life.stepped:
        size = len(life.batch)
        runtime.step(life.batch, np.full(size, life.first), np.full(size, life.count), np.full(size, life.prompt))
    runtime.release(life.released)
    return runtime


GATED = GateAsked()
BASE = Life(
    (Asked("a", 0, 1.0, GATED), Asked("b", 1, 2.0), Asked("c", 2, -1.0, replace(GATED, probe=1), "decode")),
    monitor=GateAsked(2, 1),
)
OTHER_GATES = {
    "probe": replace(GATED, probe=7),
    "site": replace(GATED, site=1),
    "threshold": replace(GATED, threshold=0.5 + 2.0**-20),
    "sharpness": replace(GATED, sharpness=2.0 + 2.0**-20),
    "hard": replace(GATED, sharpness=None),
    "invert": replace(GATED, invert=True),
    "none": None,
}


def with_first(**changes: Any) -> Life:
    return replace(BASE, requests=(replace(BASE.requests[0], **changes), *BASE.requests[1:]))


CHANGES = {
    "the name": with_first(name="d"),
    "the vector": with_first(vector=9),
    "the scale of a gated sum": with_first(scale=1.0 + 2.0**-20),
    "the phase": with_first(phase="decode"),
    **{f"the gate: {name}": with_first(gate=gate) for name, gate in OTHER_GATES.items()},
    "the order of arrival": replace(BASE, requests=BASE.requests[::-1]),
    "one fewer": replace(BASE, requests=BASE.requests[:2]),
    "one that left": replace(BASE, released="c"),
    "a batch in another order": replace(BASE, batch=("b", "a", "c")),
    "a batch without one": replace(BASE, batch=("b", "a")),
    "more tokens": replace(BASE, count=3),
    "another position": replace(BASE, first=3),
    "another prompt": replace(BASE, prompt=4),
    "no step": replace(BASE, stepped=False),
    "no monitor": replace(BASE, monitor=None),
    **{f"the monitor's {name}": replace(BASE, monitor=gate) for name, gate in OTHER_GATES.items()
       if gate is not None and name != "hard"},
    "a row probe": replace(BASE, row_probe=GateAsked(3, 2)),
    "another row probe": replace(BASE, row_probe=GateAsked(3, 2, threshold=0.25)),
}  # fmt: skip


def test_ranks_that_saw_the_same_agree() -> None:
    for life in CHANGES.values():
        assert run(life).digest() == run(life).digest()


@pytest.mark.parametrize("change", CHANGES)
def test_ranks_that_were_told_anything_else_do_not_agree(change: str) -> None:
    digests = {name: run(life).digest() for name, life in ({"as it was": BASE} | CHANGES).items()}
    assert [name for name, digest in digests.items() if digest == digests[change]] == [change]


def test_pipeline_stages_agree_about_gates_and_monitors_at_sites_of_one_of_them() -> None:
    for life in (BASE, CHANGES["the gate: site"], CHANGES["no step"], CHANGES["one that left"]):
        assert len({run(life, sites).digest() for sites in (SITES, SITES[:1], SITES[1:], ())}) == 1


def arrays(runtime: SteeringRuntime) -> dict[str, np.ndarray]:
    """The host's state of admitted requests and of the last plan, as the bytes that the device is sent."""
    gates, planner = runtime._gates, runtime._planner
    assert gates is not None
    slots = sorted(planner.slots.values())
    found = {f"requests.{name}": planner._records[name] for name in planner._records.dtype.names or ()}
    found |= {f"gates.{name}": gates._records[name] for name in gates._records.dtype.names or ()}
    kept = {name: values for name, values in found.items()}
    plan = runtime._tokens.held.view(planner._records.dtype)[:, 0]
    gated = gates._slab.held.view(gates._records.dtype)[:, 0]
    kept |= {f"plan.{name}": plan[name] for name in plan.dtype.names or ()}
    kept |= {f"planned gates.{name}": gated[name] for name in gated.dtype.names or ()}
    kept |= {"gated": gates._gated, "units": runtime._units, "held sites": runtime._site_rows}
    assert slots
    return kept


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_single_number_of_the_state_can_differ_unseen(data: st.DataObject) -> None:
    runtime = run(BASE)
    slots = sorted(runtime._planner.slots.values())
    state = arrays(runtime)
    name = data.draw(st.sampled_from(sorted(state)))
    values = state[name]
    place = list(data.draw(st.tuples(*(st.integers(0, size - 1) for size in values.shape))))
    if name.startswith("requests."):
        place[0] = data.draw(st.sampled_from(slots))
    at = tuple(place)
    before, digest = values[at].copy(), runtime.digest()
    values[at] = not before if values.dtype == np.bool_ else before + 1
    assert runtime.digest() != digest, name
    values[at] = before
    assert runtime.digest() == digest


def test_what_the_device_has_yet_to_see_is_state() -> None:
    """Two ranks after a step in which none of the new ones ran, which one of them missed."""
    digests = []
    for missed in (False, True):
        runtime = run(replace(BASE, requests=BASE.requests[1:2], batch=("b",)))
        runtime.admit("late", Asked("late", 5, gate=replace(GATED, probe=9)).steering)
        if not missed:
            runtime.step(("b",), np.full(1, 4), np.full(1, 2), np.full(1, 5))
        digests.append(runtime.digest())
    assert digests[0] != digests[1]


def test_memory_that_copies_leave_as_it_was_is_no_state() -> None:
    """NumPy copies records field by field: what lies between the fields is whatever the memory held before."""
    runtime = run(BASE)
    digests = set()
    for value in range(64):
        junk = [np.full(size, value, np.uint8) for size in range(16, 2048, 16)]
        del junk
        digests.add(runtime.digest())
    assert len(digests) == 1


def test_the_digest_reads_and_changes_nothing() -> None:
    runtime = run(BASE)
    before = {name: values.tobytes() for name, values in arrays(runtime).items()}
    assert runtime.digest() == runtime.digest()
    assert {name: values.tobytes() for name, values in arrays(runtime).items()} == before
