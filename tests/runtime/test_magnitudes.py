"""However small or large a request's numbers are: what a token receives is their sum, or the request is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from magnitude_cases import HALF_STEP, SITES, WIDTH, Ask, Engine, assorted, check, gate, numbers

from trimtab import Steering
from trimtab.errors import SteeringError
from trimtab.ops import ROWS_ONLY, Emission, emit, set_emission
from trimtab.program import PhaseProgram, Term
from trimtab.program.codec import decode, encode
from trimtab.sites import HookPoint, ModelSites, Phase
from trimtab.vectors import SteeringVector

DTYPES = list(HALF_STEP)
MODEL = ModelSites(WIDTH, len(SITES), frozenset(SITES))
HOOK = HookPoint.POST_BLOCK

asks = st.builds(
    lambda seed, power, added, spread, sign, threshold: Ask(
        numbers(np.random.default_rng(seed), 10.0**power, spread), sign * added / 10.0**power, threshold
    ),
    seed=st.integers(0, 1000),
    power=st.floats(-30, 30),
    added=st.floats(-8, 4).map(lambda power: 10.0**power),
    spread=st.floats(0, 12),
    sign=st.sampled_from([1.0, -1.0]),
    threshold=st.sampled_from([None, None, 0.5, -2.0]),
)


def emitted(engine: Engine) -> list[torch.Tensor]:
    return [emit(layer, HOOK, engine.stream) for layer in engine.layers]


@given(st.lists(st.lists(asks, min_size=1, max_size=3), min_size=1, max_size=4), st.sampled_from(DTYPES))
@settings(max_examples=150, deadline=None)
def test_a_token_receives_what_was_asked_for_to_one_rounding_of_the_row(
    requests: list[list[Ask]], dtype: torch.dtype
) -> None:
    check(emitted(Engine(requests, dtype)), requests, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_graphs_and_the_operator_add_the_same(dtype: torch.dtype) -> None:
    requests = assorted(11)
    engine = Engine(requests, dtype)
    for layer in engine.layers:
        set_emission(layer, Emission(traced=True, terms=ROWS_ONLY))

    @torch.compile(fullgraph=True)
    def forward(stream: torch.Tensor) -> list[torch.Tensor]:
        return [emit(layer, HOOK, stream) for layer in engine.layers]

    check(forward(engine.stream), requests, dtype)


def test_interpreted_kernels_add_the_same() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "interpreted_magnitudes.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "3 dtypes equal the oracle"


@given(
    st.floats(-44, 38.4),
    st.floats(-44, 38.5),
    st.sampled_from([1.0, -1.0]),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_any_vector_at_any_scale_is_added_or_refused_where_it_stands(
    power: float, factor: float, sign: float, seed: int, dtype: torch.dtype
) -> None:
    block = numbers(np.random.default_rng(seed), 10.0**power, 3.0)
    scale = sign * 10.0**factor
    content = {"post_block": {str(site.layer): row for site, row in zip(SITES, block, strict=True)}}
    added = float(abs(block).max()) * abs(scale)
    steering = Steering.parse({"interventions": [{"kind": "add", "vector": content, "scale": scale}]})
    if added > 65504 or added < 2.0**-110:
        with pytest.raises(SteeringError, match=r"interventions\[0\]\.(scale|vector): (values reach|adds)"):
            steering.resolve({}, MODEL)
        return
    steering.resolve({}, MODEL)
    check(emitted(Engine([[Ask(block, scale)]], dtype)), [[Ask(block, scale)]], dtype)


@pytest.mark.parametrize("size", [1e-44, 1e-36, 3e-7, 1.0, 1e30])
def test_equal_vectors_whose_scales_add_up_beyond_float32_are_one_vector(size: float) -> None:
    """Two scales of 3e38 are 6e38, which only float64 holds; on 1e-36 that is 600."""
    block = np.full((len(SITES), WIDTH), size, np.float32)
    scale = min(3e38, 300 / size)
    vector = SteeringVector(dict(zip(SITES, block, strict=True)))
    spec = {"interventions": [{"kind": "add", "vector": "v", "scale": scale}] * 2}
    resolved = Steering.parse(spec).resolve({"v": vector}, MODEL)
    assert np.isfinite(np.float32(resolved.decode.coefficient))
    assert decode(encode(resolved), {vector.digest: vector}) == resolved
    for dtype in DTYPES:
        check(emitted(Engine([[Ask(block, scale)] * 2], dtype)), [[Ask(block, 2 * scale)]], dtype)


@pytest.mark.parametrize("scales", [[3e38] * 2, [1e308] * 4, [float("inf")], [float("nan")], [1e-60], [5e-324]])
def test_a_program_that_no_device_can_compute_cannot_be_made(scales: list[float]) -> None:
    vector = SteeringVector({SITES[0]: np.ones(WIDTH)})
    with pytest.raises(SteeringError, match=r"values reach|adds"):
        PhaseProgram.of(Term(vector, scale) for scale in scales)
    wire = encode(Steering.parse({"interventions": [{"kind": "add", "vector": vector}]}).resolve({}, MODEL))
    wire["programs"][1] = [[0, scale] for scale in scales]
    with pytest.raises(SteeringError, match=r"wire\.programs\[1\]"):
        decode(wire, {})


def test_a_term_without_digits_is_refused_beside_one_that_has_them() -> None:
    one, other = (SteeringVector({SITES[0]: np.full(WIDTH, number)}) for number in (1.0, 2.0))
    with pytest.raises(SteeringError, match="adds 2e-60 at most"):
        PhaseProgram.of([Term(one, 1.0), Term(other, 1e-60)])


def test_terms_that_cancel_leave_the_digits_of_what_is_left() -> None:
    rng = np.random.default_rng(5)
    large, rest = numbers(rng, 3.0, 0.2), numbers(rng, 1e-5, 4.0)
    large[:, ::2], rest[:, 1::2] = 0.0, 0.0
    for dtype in DTYPES:
        asked = [Ask(large, 1.0), Ask(large + rest, -1.0)]
        check(emitted(Engine([asked], dtype)), [asked], dtype)
    exact = PhaseProgram.of(Term(SteeringVector({SITES[0]: row}), 1.0) for row in (large[0], -large[0]))
    assert (exact.unit, exact.row(SITES).any()) == (1.0, False)
    ghost = PhaseProgram.of(
        Term(SteeringVector({SITES[0]: [number] * (WIDTH - 1) + [last]}), 1.0) for number, last in ((1, 1e-40), (-1, 0))
    )
    assert ghost.coefficient == 2.0**-126  # a normal number, though what is left would need a smaller one


def test_sites_of_one_row_share_its_unit_and_lose_less_than_float16_has_numbers_for() -> None:
    block = np.zeros((len(SITES), WIDTH), np.float32)
    block[0], block[1] = 60000.0, np.geomspace(1e-9, 1e-3, WIDTH)
    received = emitted(Engine([[Ask(block, 1.0)]], torch.float16))
    smallest = 2.0**-24
    assert (abs(received[1][0].double().numpy() - block[1]) <= np.maximum(2.0**-11 * block[1], smallest / 2)).all()


def test_what_a_monitor_multiplies_is_of_any_magnitude_too() -> None:
    requests = [[Ask(ask.numbers, ask.scale)] for ask in (asked[0] for asked in assorted(3))]
    behind = [[Ask(ask.numbers, ask.scale / (1.0 + np.exp(0.5)))] for (ask,) in requests]
    for dtype in DTYPES:
        engine = Engine(requests, dtype)
        engine.runtime.set_monitor(gate(0.5))
        count = len(requests)
        engine.runtime.step([f"r{n}" for n in range(count)], np.full(count, 6), np.ones(count, int), np.full(count, 3))
        first, second = emitted(engine)
        check([first], behind, dtype)
        check([second], [[Ask(ask.numbers[::-1], ask.scale)] for (ask,) in requests], dtype)


@given(st.lists(asks, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_specs_that_add_the_same_numbers_have_one_identity_and_others_do_not(asked: list[Ask]) -> None:
    def identity(asked: list[Ask]) -> str:
        steps = [{"kind": "add", "vector": as_vector(ask.numbers), "scale": ask.scale} for ask in asked]
        return Steering.parse({"interventions": steps}).identity(Phase.DECODE)

    def as_vector(block: np.ndarray) -> SteeringVector:
        return SteeringVector(dict(zip(SITES, block, strict=True)))

    halves = [Ask(ask.numbers, ask.scale / 2) for ask in asked]
    assert identity([*asked]) == identity([*halves, *halves])
    nudged = [Ask(ask.numbers, ask.scale * (1 + 2.0**-20)) for ask in asked]
    assert identity(nudged) != identity(asked) or identity(asked) == ""
