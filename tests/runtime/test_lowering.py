"""Gates that run as probes of rows: the same numbers as in lanes of their own, in every form, whoever shares a row."""

from itertools import count, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_model import HIDDEN, SITES, vector
from torch import nn

from trimtab.errors import SteeringError
from trimtab.ops import ROWS_ONLY, Emission, SteeringBuffers, emit, set_emission
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.lowering import contents_of, lowered
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime import SteeringRuntime, probes_needed, rows_needed
from trimtab.sites import Site
from trimtab.vectors.vector import SteeringVector

FIRST, MIDDLE, LAST = SITES
REQUESTS, TOKENS, GATES = 8, 32, 3
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def gate(site: Site = MIDDLE, seed: int = 100, **options) -> ResolvedGate:
    return ResolvedGate.of(vector(seed, (site,)), **({"threshold": 0.3, "sharpness": 0.8} | options))


def term(seed: int, sites, behind: ResolvedGate | None = None, scale: float = 1.0) -> Term:
    return Term(vector(seed, tuple(sites)), scale, gate=behind)


def decode(*terms: Term) -> ResolvedSteering:
    return ResolvedSteering((PhaseProgram.of([]), PhaseProgram.of(terms)))


def both(*terms: Term) -> ResolvedSteering:
    return ResolvedSteering((PhaseProgram.of(terms), PhaseProgram.of(terms)))


SOFT = term(1, [MIDDLE], gate())
STEERINGS = {
    "alone": decode(SOFT),
    "beside a row": decode(SOFT, term(2, [FIRST, LAST], scale=-1.5)),
    "beside sums": both(SOFT, term(2, [FIRST]), term(3, [LAST], scale=0.5), term(4, [MIDDLE], gate(), 2.0)),
    "two sites": decode(SOFT, term(5, [LAST], gate(LAST, 101, threshold=-0.2)), term(2, [FIRST])),
    "in both phases": both(SOFT),
    "beside gates that stay": decode(
        SOFT, term(5, [MIDDLE], gate(seed=101, sharpness=None)), term(6, [LAST], gate(invert=True))
    ),
    "hard": decode(term(1, [MIDDLE], gate(sharpness=None))),
    "inverted": decode(term(1, [MIDDLE], gate(invert=True))),
    "acts later": decode(term(1, [LAST], gate())),
    "acts later too": decode(term(1, [MIDDLE, LAST], gate())),
    "not alone at its site": decode(SOFT, term(2, SITES)),
    "two at one site": decode(SOFT, term(5, [MIDDLE], gate(seed=101))),
    "prompts": ResolvedSteering((PhaseProgram.of([SOFT]), PhaseProgram.of([term(2, SITES)]))),
    "no gate": both(term(2, SITES)),
}
LOWERED = {  # how many gates become probes of the row, and how many stay; all others: none
    "alone": (1, 0), "beside a row": (1, 0), "beside sums": (1, 0), "two sites": (2, 0), "in both phases": (1, 0),
    "beside gates that stay": (1, 2), "two at one site": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", STEERINGS)
def test_what_is_no_more_than_a_probe_of_a_row_is_lowered_and_nothing_else(name: str) -> None:
    steering = STEERINGS[name]
    asked = len(steering.decode.gated)
    placed = lowered(steering.decode)
    assert (len(placed.probes), len(placed.gated)) == LOWERED.get(name, (0, asked))
    if name not in LOWERED:
        assert placed.row is steering.decode


class Engine:
    """Three sites in modules of their own, with a stream in one part or two, in one of the ways to run them."""

    def __init__(self, dtype: torch.dtype, *, lowers: bool, form: str = "operator", sites=SITES) -> None:
        self.dtype, self.sites = dtype, sites
        self.buffers = SteeringBuffers(
            sites, hidden_size=HIDDEN, max_rows=rows_needed(REQUESTS, GATES), max_tokens=TOKENS, dtype=dtype,
            gates=GATES, max_probes=probes_needed(REQUESTS, GATES), probe_sites=SITES[1:],
            row_monitor=SITES[1:] if lowers else False,
        )  # fmt: skip
        self.runtime = SteeringRuntime(self.buffers, max_requests=REQUESTS, lowers=lowers)
        self.modules = [nn.Module() for _ in sites]
        traced = form != "operator"
        torch._dynamo.reset()  # each engine is traced anew
        for module, site in zip(self.modules, sites, strict=True):
            self.buffers.attach(module, site)
            set_emission(module, Emission(traced=traced, terms=ROWS_ONLY._replace(row_monitor=lowers)))
        backend = "inductor" if form == "compiled" else "eager"
        self.forward = torch.compile(self._forward, backend=backend, fullgraph=True) if traced else self._forward

    def run(self, parts, rests=None) -> torch.Tensor:
        """The streams [S, N, H] that leave the sites, of those that enter them: `parts`, or their sum with `rests`."""
        with torch.no_grad():
            return torch.stack([part.double() for part in self.forward(parts, rests)])

    def _forward(self, parts, rests):
        return [
            emit(module, site.hook, parts[at].clone(), rest=None if rests is None else rests[at], in_place=True)
            for at, (module, site) in enumerate(zip(self.modules, self.sites, strict=True))
        ]


NAMES = list(STEERINGS)[:7]
COUNTS, PROMPT = [1, 3, 2, 1, 4, 2, 2, 2], 5  # the last request is not steered
FIRSTS = [5, 4, 4, 7, 3, 5, 6, 4]


def streams(dtype: torch.dtype, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((3, sum(COUNTS), HIDDEN))).to(dtype) for _ in range(2)]


def due(steerings, whole: np.ndarray) -> np.ndarray:
    """float64: what each token receives at each site, `whole` [S, N, H] being the stream that enters it."""
    out, token = np.zeros_like(whole), 0
    for steering, first, number in zip(steerings, FIRSTS, COUNTS, strict=True):
        for position in range(first, first + number):
            program = steering and (steering.prefill if position < PROMPT else steering.decode)
            for one in program.all_terms if program else ():
                factor = 1.0
                if one.gate is not None:
                    score = whole[SITES.index(one.gate.site), token] @ one.gate.probe.block[0].astype(np.float64)
                    with np.errstate(over="ignore"):
                        factor = 1 / (1 + np.exp(-one.gate.sharpness * (score - one.gate.threshold)))
                    factor = float(score > one.gate.threshold) if one.gate.hard else factor
                    factor = 1 - factor if one.gate.invert else factor
                for site, direction in one.vector.directions.items():
                    out[SITES.index(site), token] += one.scale * factor * direction.astype(np.float64)
            token += 1
    return out


@pytest.mark.parametrize(
    ("form", "dtype", "split"),
    [*product(["operator", "traced"], ROUNDING, [False, True]), ("compiled", torch.bfloat16, True)],
)
def test_a_lowered_gate_does_what_it_does_in_a_lane(form: str, dtype: torch.dtype, split: bool) -> None:
    parts, rests = streams(dtype)
    whole = parts.double() + rests.double() if split else parts.double()
    for names in (NAMES, list(STEERINGS)[7:])[: 1 if form == "compiled" else 2]:
        steerings = [*(STEERINGS[name] for name in names), None]
        outs = []
        for lowers in (True, False) if form != "compiled" else (True,):  # how lanes compile is tested elsewhere
            engine = Engine(dtype, lowers=lowers, form=form)
            for number, steering in enumerate(steerings):
                engine.runtime.admit(str(number), steering)
            engine.runtime.step([str(number) for number in range(8)], FIRSTS, COUNTS, [PROMPT] * 8)
            outs.append(engine.run(parts, rests if split else None).numpy())
            np.testing.assert_array_equal(outs[-1][:, -2:], parts[:, -2:].double())  # not steered: to the bit
        added = due(steerings, whole.numpy())
        expected = parts.double().numpy() + added
        scale = ROUNDING[dtype] * (np.abs(expected) + 4 * np.abs(added).max(axis=-1, keepdims=True)) + 2e-6
        assert (np.abs(outs[0] - expected) <= scale).all()
        assert (np.abs(outs[-1] - expected) <= scale).all()
        assert np.abs(outs[0] - parts.double().numpy()).max() > 0.5  # it does something


def test_a_batch_whose_gates_are_all_lowered_has_none_and_sites_without_content_rest() -> None:
    engine = Engine(torch.float32, lowers=True)
    engine.runtime.admit("a", STEERINGS["alone"])
    engine.runtime.step(["a"], [5], [1], [5])
    assert [state.resting for state in engine.buffers.states] == [True, False, True]
    assert engine.runtime._gates.idle


def small(scale: float, site: Site, behind: ResolvedGate | None = None) -> Term:
    return Term(SteeringVector({site: np.full(HIDDEN, 1.0, np.float32)}), scale, gate=behind)


@pytest.mark.parametrize(("plain", "behind"), list(product([3e4, 1.0, 1e-4, 1e-7], repeat=2)))
def test_neither_sum_loses_digits_to_the_other(plain: float, behind: float) -> None:
    """A float16 row has one unit: where the sums are too far apart, each keeps a row of its own."""
    engine = Engine(torch.float16, lowers=True)
    engine.runtime.admit("a", decode(small(plain, FIRST), small(behind, MIDDLE, gate(threshold=-1e9, sharpness=1.0))))
    engine.runtime.step(["a"], [5], [1], [5])
    out = engine.run(torch.zeros(3, 1, HIDDEN, dtype=torch.float16)).numpy()[:, 0, 0]
    np.testing.assert_allclose(out[:2], [plain, behind], rtol=2.0**-10, atol=2.0**-25)
    rows = engine.buffers.table.double() * float(engine.buffers.row_gate[0])
    assert engine.runtime.rows_in_use == (1 if max(plain, behind) / min(plain, behind) < 2**16 else 2)
    for site, due in ((0, plain), (1, behind)):
        if engine.runtime.rows_in_use == 1:
            assert float(rows[site, engine.buffers.index[0], 0]) == pytest.approx(due, rel=2.0**-10)


@given(st.lists(st.sampled_from(sorted(STEERINGS)), max_size=REQUESTS), st.booleans())
def test_the_rows_and_probes_that_requests_hold_are_known_beforehand(names: list[str], lowers: bool) -> None:
    engine = Engine(torch.float32, lowers=lowers)
    for number, name in zip(count(), names):
        engine.runtime.admit(str(number), STEERINGS[name])
    held = [contents_of(STEERINGS[name], lowers=lowers) for name in names]
    assert engine.runtime.rows_in_use == len(set().union(*(one.rows for one in held)))
    assert engine.runtime._gates.probes_in_use == len(set().union(*(one.probes for one in held)))
    for name, one in zip(names, held, strict=True):  # and never more than tables are made for
        phases = STEERINGS[name].prefill, STEERINGS[name].decode
        assert len(one.rows) <= 2 + sum(len(program.gated) for program in phases)
    for number in range(len(names)):
        engine.runtime.release(str(number))
    assert engine.runtime.rows_in_use == engine.runtime._gates.probes_in_use == 0


def test_equal_content_behind_another_gate_or_none_never_shares_a_row() -> None:
    engine = Engine(torch.float32, lowers=True)
    asked = {
        "a": decode(SOFT), "b": decode(term(1, [MIDDLE], gate(threshold=0.4))), "c": decode(term(1, [MIDDLE])),
        "d": decode(SOFT), "e": ResolvedSteering((PhaseProgram.of([term(1, [MIDDLE])]), PhaseProgram.of([SOFT]))),
    }  # fmt: skip
    for name, steering in asked.items():
        engine.runtime.admit(name, steering)
    engine.runtime.step(list(asked), [5, 5, 5, 5, 4], [1, 1, 1, 1, 2], [5] * 5)
    rows = engine.buffers.index[:6].tolist()
    assert rows[0] == rows[3] == rows[5]
    assert rows[2] == rows[4]
    assert len(set(rows)) == 3


def test_a_row_that_is_reused_loses_its_probe_and_one_that_comes_back_keeps_it() -> None:
    engine = Engine(torch.float32, lowers=True)
    parts = streams(torch.float32)[0][:, :1]
    found = []
    for name in ("alone", "no gate", "alone"):  # preempted, and back again
        engine.runtime.admit("a", STEERINGS[name])
        engine.runtime.step(["a"], [5], [1], [5])
        found.append(engine.run(parts).numpy())
        engine.runtime.release("a")
    np.testing.assert_array_equal(found[0], found[2])
    for seed in range(rows_needed(REQUESTS, GATES)):
        engine.runtime.admit("a", decode(term(200 + seed, SITES)))
        engine.runtime.step(["a"], [5], [1], [5])
    assert not engine.buffers.row_probes.any()
    assert not engine.buffers.row_monitor_active.any()


def test_reports_and_totals_name_a_lowered_gate_and_count_its_prompt_alone() -> None:
    engine = Engine(torch.float32, lowers=True)
    named = ResolvedGate.of(vector(100, (MIDDLE,)), 0.3, 0.8, label="anger")
    steering = both(term(1, [MIDDLE], named), term(6, [LAST], gate(invert=True)))
    for name, one in (("a", steering), ("b", decode(SOFT)), ("c", decode(SOFT))):
        engine.runtime.admit(name, one, owner="answer" if name == "c" else name)
    engine.runtime.step(["a", "b", "c"], [3, 5, 5], [4, 1, 1], [5, 5, 5])
    engine.run(streams(torch.float32)[0][:, :6])
    by_gate = {use.gate: use for use in engine.runtime.gate_report("a")}
    assert {(use.probe, use.tokens, use.lowered) for use in by_gate.values()} == {
        ("anger", 2, 1), (gate().probe.digest.hex()[:12], 4, 0)
    }  # fmt: skip
    (use,) = engine.runtime.gate_report("b")
    assert (use.gate, use.tokens, use.mean, use.above_half, use.lowered) == (gate().digest.hex(), 0, 0.0, 0, 1)
    for name in "abc":
        engine.runtime.release(name)
    assert [use.lowered for use in engine.runtime.gate_report("answer")] == [1]
    assert not engine.runtime._gates.meters._owner  # nothing is kept of requests that are gone but their sums
    assert {use.probe: (use.tokens, use.lowered) for use in engine.runtime.gate_totals()} == {
        "anger": (2, 1), "(inline)": (4, 2)
    }  # fmt: skip


def test_stages_agree_wherever_the_probe_is() -> None:
    digests = []
    for sites, threshold in ((SITES, 0.3), (SITES[:1], 0.3), (SITES[1:2], 0.3), (SITES[2:], 0.3), (SITES, 0.4)):
        engine = Engine(torch.float32, lowers=True, sites=sites)
        engine.runtime.admit("a", decode(term(1, [MIDDLE], gate(threshold=threshold)), term(2, [FIRST, LAST])))
        engine.runtime.step(["a"], [5], [1], [5])
        digests.append(engine.runtime.digest())
        engine.run(torch.zeros(len(sites), 1, HIDDEN))
        assert len(engine.runtime.gate_report("a")) == (MIDDLE in sites)
    assert len(set(digests[:4])) == 1
    assert digests[4] != digests[0]


def test_lowering_does_not_change_how_many_gates_a_request_may_have() -> None:
    engine = Engine(torch.float32, lowers=True)
    steps = [term(10 + number, [MIDDLE], gate(seed=100 + number)) for number in range(GATES + 1)]
    engine.runtime.admit("a", decode(*steps[:GATES]))
    with pytest.raises(SteeringError, match=r"brings 4 in a phase; the buffers hold 3"):
        engine.runtime.admit("b", decode(*steps))


def test_a_request_with_probes_of_the_callers_keeps_its_gates_in_lanes() -> None:
    engine = Engine(torch.float32, lowers=True)
    engine.runtime.admit("a", decode(SOFT, term(2, [LAST])), probes=[gate(LAST, 102)])
    engine.runtime.step(["a"], [5], [1], [5])
    assert engine.buffers.gates.slab[0].any()
    assert engine.buffers.row_monitor_active[:, 0].tolist() == [False, False, True]
    with pytest.raises(SteeringError, match=r"probes: one is read at post_block:0; in these buffers rows have probes"):
        engine.runtime.admit("b", decode(SOFT), probes=[gate(FIRST)])


def test_what_would_multiply_a_lowered_gate_is_refused() -> None:
    with pytest.raises(SteeringError, match="monitor: would multiply what gates let through"):
        Engine(torch.float32, lowers=True).runtime.set_monitor(gate())
    buffers = SteeringBuffers(
        SITES, hidden_size=HIDDEN, max_rows=rows_needed(2, 1), max_tokens=8, dtype=torch.float32, gates=1,
        max_probes=probes_needed(2, 1), row_monitor=SITES[:2],
    )  # fmt: skip
    with pytest.raises(SteeringError, match="row_monitor: rows have no probes at post_block:1, where gates read"):
        SteeringRuntime(buffers, max_requests=2, lowers=True)
