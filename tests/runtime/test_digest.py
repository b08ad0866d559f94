"""The state digest: equal on ranks that saw the same calls, and another one as soon as anything differs."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_model import HIDDEN, SITES, vector
from slots_model import FORM, VECTORS, Ask

from trimtab.ops import SteeringBuffers
from trimtab.ops.args import SlotForm
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import ResolvedGate, probes_needed, rows_needed
from trimtab.program.spans import IdSet, Spans
from trimtab.runtime import SteeringRuntime
from trimtab.sites import Phase

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
    owner: str | None = None
    slot: Ask | None = None
    spans: Spans | None = None
    text: tuple[int, ...] = ()

    @property
    def steering(self) -> ResolvedSteering:
        terms = [Term(vector(self.vector, SITES[2:]), self.scale, gate=self.gate and self.gate.gate)]
        slots = [] if self.slot is None else [self.slot.slot]
        program, empty = PhaseProgram.of(terms, slots), PhaseProgram.of([])
        if self.spans is not None:
            return ResolvedSteering(tuple(program if place else empty for place in range(3)), spans=self.spans)
        return ResolvedSteering(
            tuple(program if self.phase in ("all", phase) else empty for phase in ("prefill", "decode"))
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
    after: tuple[str, ...] = ()  # what else happens, by the names in `run`
    rows: int = rows_needed(REQUESTS, GATES)
    tokens: int = 32
    probes: int = probes_needed(REQUESTS, GATES)
    most: int = REQUESTS
    lowers: bool = False
    dtype: torch.dtype = torch.float32
    slots: SlotForm | None = FORM


def run(life: Life, sites: tuple[Any, ...] = SITES) -> SteeringRuntime:
    buffers = SteeringBuffers(
        sites, hidden_size=HIDDEN, max_rows=life.rows, max_tokens=life.tokens, dtype=life.dtype, gates=GATES,
        max_probes=life.probes, row_monitor=life.lowers or life.row_probe is not None, slots=life.slots,
        span_requests=life.most,
    )  # fmt: skip
    runtime = SteeringRuntime(buffers, max_requests=life.most, lowers=life.lowers)

    def step(batch: tuple[str, ...] = life.batch) -> None:
        size = len(batch)
        ids = torch.zeros(size * life.count, dtype=torch.int64)
        runtime.step(batch, np.full(size, life.first), np.full(size, life.count), np.full(size, life.prompt),
                     positions=ids, token_ids=ids)  # fmt: skip

    def monitor() -> None:
        gate = (life.monitor or GateAsked()).gate
        runtime.set_monitor(gate, elsewhere=gate.site not in sites)

    for asked in life.requests:
        probes = [life.row_probe.gate] if life.row_probe is not None else []
        runtime.admit(asked.name, asked.steering, probes=probes, owner=asked.owner, tokens=asked.text,
                      upto=len(asked.text))  # fmt: skip
    if life.monitor is not None:
        monitor()
    if life.stepped:
        step()
    runtime.release(life.released)
    for name in life.after:
        {
            "step": step,
            "a step over none of them": lambda: step(("x",)),
            "all leave": lambda: [runtime.release(request) for request in "abcdef"],
            "monitor": monitor,
            "no monitor": lambda: runtime.clear_monitor(life.monitor.gate.site if life.monitor else SITES[0]),
        }[name]()
    return runtime


SPANS = Spans(5, (0, 5, 9), (0, 1, 2), ((0,), (2, 1), (2,)), (Phase.PREFILL, Phase.DECODE, Phase.DECODE),
              (IdSet(((3, 5),)),))  # fmt: skip
GATED = GateAsked()
SLOT = Ask(VECTORS[0], 0.5, -1.0, 0.5)
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
    "the owner": with_first(owner="z"),
    "a slot": with_first(slot=SLOT),
    "another bound": with_first(slot=replace(SLOT, high=1.0)),
    "another direction": with_first(slot=replace(SLOT, along=VECTORS[1])),
    "fewer sites": with_first(slot=replace(SLOT, sites=SITES[1:])),
    "a slot behind a gate": with_first(slot=replace(SLOT, gate=GATED.gate)),
    "spans": with_first(spans=SPANS),
    "another run": with_first(spans=replace(SPANS, starts=(0, 5, 8))),
    "another choice": with_first(spans=replace(SPANS, choices=((0,), (1, 2), (2,)))),
    "another atom": with_first(spans=replace(SPANS, atoms=(IdSet(((3, 6),)),))),
    "a past that the device has yet to see": replace(with_first(spans=SPANS, text=(1, 2)), stepped=False),
    "another past": replace(with_first(spans=SPANS, text=(1, 3)), stepped=False),
    "spans that the device has yet to see": replace(with_first(spans=SPANS), stepped=False),
    "another form of slots": replace(BASE, slots=FORM._replace(count=2)),
    "no slots": replace(BASE, slots=None),
    "more rows": replace(BASE, rows=BASE.rows + 1),
    "more probes": replace(BASE, probes=BASE.probes + 1),
    "longer passes": replace(BASE, tokens=33),
    "room for fewer requests": replace(BASE, requests=BASE.requests[:2], most=2),
    "gates that are lowered": replace(BASE, monitor=None, lowers=True),
    "another dtype": replace(BASE, dtype=torch.bfloat16),
    "a step that ran nobody": replace(BASE, after=("a step over none of them",)),
    "a monitor that the device has yet to see again": replace(BASE, after=("monitor",)),
    "a monitor that the device has yet to forget": replace(BASE, after=("no monitor",)),
    "all left": replace(BASE, after=("all leave",)),
    "all left, and a step saw it": replace(BASE, after=("all leave", "a step over none of them")),
}  # fmt: skip


def test_ranks_that_saw_the_same_agree() -> None:
    for life in CHANGES.values():
        assert run(life).digest() == run(life).digest()


@pytest.mark.parametrize("change", CHANGES)
def test_ranks_that_were_told_anything_else_do_not_agree(change: str) -> None:
    digests = {name: run(life).digest() for name, life in ({"as it was": BASE} | CHANGES).items()}
    assert [name for name, digest in digests.items() if digest == digests[change]] == [change]


def test_pipeline_stages_agree_about_gates_and_monitors_at_sites_of_one_of_them() -> None:
    for life in [life for life in CHANGES.values() if life.row_probe is None]:
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
    kept |= {"gated": gates._gated, "units": runtime._rows._units, "held sites": runtime._rows._site_rows}
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


METERS = {
    "_free": "depends on when passes end", "_most": "constant", "_noted": "what is reported",
    "_lines": "where that is", "_lines_of": "likewise", "_keys": "likewise", "_decided": "the device",
    "_deciding": "what the last pass was",
    **dict.fromkeys(
        ("_log", "_last", "_expected", "_sums", "_kept", "_folded", "_closing", "_finished"),
        "what was seen to be done, and how far that is",
    ),
}  # fmt: skip

NOT_STATE = {
    "runtime": {
        "_buffers": "the device", "_rows": "below", "_tokens": "below", "_planner": "below", "_gates": "below",
        "_monitors": "below", "_row_monitors": "below", "_spans": "below",
        "_slot_rows": "below", "_site_position": "the rank's own",
        "_no_site": "constant",
        "_used": "follows from batch and rows", "_meters": "below", "_slot_meters": "below",
    },
    "rows": {
        "capacity": "the table's", "uploads": "a count, for reports", "_sites": "the rank's own",
        "_site_position": "the rank's own", "_allocator": "below", "_table": "writes the device", "_flags": "below",
        "_row_sites": "the rank's own: where the content of each row acts",
    },
    "slot rows": {
        "_dtype": "the table's", "_slots": "the device", "_uploader": "writes the device",
        "_known": "what is worked out again where it is forgotten",
    },
    "allocator": {
        "_key_of": "the keys of `_row_of`, by row", "_unused": "follows from `_row_of` and `_idle`",
        "_in_use": "counts `_holders`",
    },
    "planner": {
        "_records": "seen by `_record_words`", "_rows": "seen by it", "_coefficients": "seen by it",
        "_last_ids": "whose slots `_last_slots` are", "_last_steered": "follows from `_last_slots`",
        "_counts": "room for a step's numbers", "_segments": "room for a step's records",
        "_is_planned": "whether the plan that the device holds is that of `_last_ids`", "_planned": "the counts of it",
    },
    "gates": {
        "_buffers": "the device", "_words": "a view of `_records`", "_probes": "an allocator as above",
        "_read_at": "the rank's own: how it numbers the site of each probe", "_table": "writes the device",
        "_slab": "an uploader as below", "meters": "below",
    },
    "meters": METERS | {"_totals": "what gates were seen to do", "_values": "the device", "_owns": "the device",
        "_lanes": "constant", "_joined": "what the last pass was"},
    "slot meters": {
        **METERS, "_sites": "the rank's own", "_slots": "the device", "_token_rows": "the device",
        "_places": "room for what is seen",
        **dict.fromkeys(("_cells", "_rows", "_received", "_held", "_end"), "what was seen to be done"),
    },
    "spans": {
        "_buffers": "the device", "_token_words": "the device", "_gate_words": "the device",
        "_lines": "writes the device", "_rings": "writes the device", "_has": "follows from `_held`",
        "_by_ids": "follows from it", "_sites": "the rank's own",
    },
    "monitors": {"_buffers": "the device", "_position": "the rank's own"},
    "row monitors": {
        "_position": "the rank's own", "_site_position": "the rank's own", "_sites": "the rank's own",
        "_width": "constant", "_probes": "writes the device",
        "_params": "writes the device", "_flags": "follows from `_held`, as last written",
    },
    "tokens": {
        "_slab_words": "the device", "_idle": "constant", "_staging": "room for a copy",
    },
    "flags": {
        "_device_flags": "the device", "_staging": "room for a copy",
        "_held": "follows from the rows in use and those that have turned since",
    },
}  # fmt: skip


def other(attribute: str, value: Any) -> Any:
    """Another value for an attribute."""
    if attribute in ("_meter_of", "_idle"):
        return np.roll(value, 1) if isinstance(value, np.ndarray) else {9: None}
    if attribute == "_owner":
        return {meter: ("someone else", gates) for meter, (_, gates) in value.items()}
    if isinstance(value, np.ndarray):
        altered = value.copy()
        whole = altered if altered.dtype.names is None else altered[altered.dtype.names[0]]
        whole.view(np.uint8)[...] ^= 1
        return altered
    if isinstance(value, dict):
        return dict(list(value.items())[1:]) if value else {SITES[0]: GATED.gate}
    if isinstance(value, set):
        return value ^ {SITES[0] if attribute == "_changed" else 1}
    if isinstance(value, list):
        return [*value, 9] if attribute == "_free" else [number + 1 for number in value]
    if isinstance(value, tuple):
        return (value[0] + 1, *value[1:]) if attribute == "_written" else None
    return value - 1


def test_whatever_an_object_of_the_runtime_holds_is_in_the_digest_or_is_said_to_be_no_state() -> None:
    """Each attribute alone is exchanged for another."""
    life = replace(BASE, row_probe=GateAsked(3, 2))
    runtime = run(replace(life, requests=(replace(life.requests[0], slot=SLOT), *life.requests[1:])))
    runtime.admit("b", Asked("b", 1, 2.0, slot=replace(SLOT, high=1.0)).steering)
    runtime.admit("c", Asked("c", 1, gate=GATED, spans=SPANS).steering, tokens=[7, 8], upto=2)
    runtime.admit("a", Asked("a", 8, gate=replace(GATED, probe=8)).steering, probes=[GateAsked(4, 2).gate])
    assert runtime._gates is not None
    objects = {
        "runtime": runtime, "rows": runtime._rows, "allocator": runtime._rows._allocator, "planner": runtime._planner,
        "gates": runtime._gates,
        "meters": runtime._gates.meters, "monitors": runtime._monitors, "row monitors": runtime._row_monitors,
        "tokens": runtime._tokens, "flags": runtime._rows._flags, "slot rows": runtime._slot_rows,
        "slot meters": runtime._slot_meters, "spans": runtime._spans,
    }  # fmt: skip
    before = runtime.digest()
    for name, part in objects.items():
        attributes = dict(vars(part))
        assert set(NOT_STATE[name]) <= set(attributes), "an attribute that is gone needs no reason"
        for attribute in attributes.keys() - NOT_STATE[name].keys():
            value = attributes[attribute]
            setattr(part, attribute, other(attribute, value))
            assert runtime.digest() != before, f"{name}.{attribute} is neither in the digest nor in NOT_STATE"
            setattr(part, attribute, value)
            assert runtime.digest() == before


CODE = """
import json, sys
from test_digest import CHANGES, run
from trimtab.sites import HookPoint, Site
print(json.dumps({"order": [str(site) for site in {Site(layer, hook) for layer in range(9) for hook in HookPoint}],
                  "digests": {name: run(life).digest() for name, life in CHANGES.items()}}))
"""


def test_processes_that_iterate_sets_in_another_order_agree() -> None:
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert found[0]["order"] != found[1]["order"]  # else nothing was tried
    assert found[0]["digests"] == found[1]["digests"] == {name: run(life).digest() for name, life in CHANGES.items()}
