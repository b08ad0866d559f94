"""What slots did is added up per request, phase and slot, whatever stands beside it at a site, or behind its tokens."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_model import SITES, vector
from slots_model import FORM, TILTED, VECTORS, Ask, make_slot_buffers, steering

from trimtab.ops import slot_uses as uses_of_slots
from trimtab.program import PhaseProgram, ResolvedSteering
from trimtab.program.norms import keeping_norm
from trimtab.runtime import SteeringRuntime

TOKENS = 40
ASKED = [
    [Ask(VECTORS[0]), Ask(TILTED[0], 0.5, -1.0, 0.25, sites=SITES[1:])],
    [Ask(VECTORS[2], sites=SITES[:1]), Ask(VECTORS[1], sites=SITES[1:2]), Ask(VECTORS[0], sites=SITES[2:])],
    [Ask(VECTORS[3], to=VECTORS[1], sites=SITES[::2]), Ask(VECTORS[2])],
    [],
]


def run(buffers, runtime, batch, rng):
    """A pass over (name, first position, tokens, prompt) in which the device finds some corrections; what it found."""
    names, *numbers = zip(*batch, strict=True)
    runtime.step(list(names), *map(np.array, numbers))
    found = rng.standard_normal(buffers.slots.corrections.shape).astype(np.float32)
    found[rng.random(found.shape) < 0.25] = 0.0
    buffers.slots.corrections.copy_(torch.from_numpy(found))
    for site in range(len(buffers.slots.sites)):  # as a site that rests has it, or padding
        idle = (buffers.slots.places[site, buffers.index] == 0).numpy().T
        buffers.slots.corrections[site][torch.from_numpy(idle)] = float("nan")
    return found


def counted(due, buffers, one, found, place, first, count, prompt):
    """Add to `due` what one request's tokens must be said to have: a slot of a program at each of its sites."""
    for token, position in enumerate(range(first, first + count), start=place):
        phase = int(position >= prompt)
        slots = one.programs[phase].slots
        for position_of_site, site in enumerate(buffers.slots.sites):
            acting = [slot for slot in slots if site in slot.at]
            for k, slot in enumerate(acting):
                c = float(found[position_of_site, k, token])
                due[("prefill", "decode")[phase], slot.digest.hex()] += np.array([1, abs(c), c != 0])


def told(runtime, owner):
    return {(use.phase, use.slot): (use.measured, use.total, use.moved) for use in runtime.slot_report(owner)}


def assert_told(reports, due):
    total = defaultdict(lambda: np.zeros(3))
    for report in reports:
        for key, numbers in report.items():
            total[key] += numbers
    assert {key for key, numbers in total.items() if numbers[0]} == set(due)
    for key, numbers in due.items():
        np.testing.assert_allclose(total[key], numbers, rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1 << 21, 16]))
@settings(max_examples=40, deadline=None)
def test_each_correction_is_counted_for_its_request_phase_and_slot(seed, at_once):
    """On two stages of a pipeline, whose reports are added; owners have several requests; some go while it is so."""
    rng = np.random.default_rng(seed)
    stages = [make_slot_buffers(24, sites=sites) for sites in (SITES, SITES[:2], SITES[2:])]
    runtimes = [SteeringRuntime(buffers, max_requests=4) for buffers in stages]
    due = [defaultdict(lambda: np.zeros(3)) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uses_of_slots, "AT_ONCE", at_once)
        requests = {}
        for born in range(12):
            if len(requests) == 4 or (requests and rng.random() < 0.3):
                gone = rng.choice(sorted(requests))
                del requests[gone]
                for runtime in runtimes:
                    runtime.release(gone)
            one = steering(*(ASKED[index] for index in rng.integers(0, len(ASKED), 2)))
            requests[f"r{born}"] = (one, born % 3, int(rng.integers(1, 6)), 0)
            for runtime in runtimes:
                runtime.admit(f"r{born}", one, owner=f"owner {born % 3}")
            batch = [("stranger", 0, 2, 1)]
            for name in sorted(requests, key=lambda _: rng.random()):
                one, owner, prompt, first = requests[name]
                batch.append((name, first, int(rng.integers(1, 7)), prompt))
            states = [rng.bit_generator.state for _ in stages]
            for number, (buffers, runtime) in enumerate(zip(stages, runtimes, strict=True)):
                rng.bit_generator.state = states[number]
                found, place = run(buffers, runtime, batch, rng), 0
                for name, first, count, prompt in batch:
                    if name in requests and number != 0:
                        one, owner, *_ = requests[name]
                        counted(due[owner], buffers, one, found, place, first, count, prompt)
                    place += count
            for name, first, count, prompt in batch[1:]:
                requests[name] = (*requests[name][:2], prompt, first + count)
        for owner in range(3):
            assert_told([told(runtime, f"owner {owner}") for runtime in runtimes[1:]], due[owner])
            assert {key: numbers[0] for key, numbers in told(runtimes[0], f"owner {owner}").items() if numbers[0]} == {
                key: numbers[0] for key, numbers in due[owner].items()
            }


@pytest.fixture
def buffers():
    return make_slot_buffers(24)


@pytest.fixture
def runtime(buffers):
    return SteeringRuntime(buffers, max_requests=4)


def test_more_slots_than_act_at_a_site_are_told_apart():
    """Each acts at a site of its own, where it is the first."""
    buffers = make_slot_buffers(24, form=FORM._replace(count=1))
    one = SteeringRuntime(buffers, max_requests=1)
    asked = [Ask(along, sites=(site,)) for along, site in zip(VECTORS, SITES, strict=False)]
    one.admit("a", steering(asked))
    one.step(["a"], [0], [1], [9])
    for site, number in enumerate((1.0, -2.0, 4.0)):
        buffers.slots.corrections[site, 0, 0] = number
    by_slot = {use.slot: (use.measured, use.total) for use in one.slot_report("a") if use.phase == "prefill"}
    assert by_slot == {ask.slot.digest.hex(): (1, size) for ask, size in zip(asked, (1.0, 2.0, 4.0), strict=True)}


def test_equal_slots_of_one_program_are_told_of_once_and_one_that_keeps_norms_is_not():
    buffers = make_slot_buffers(24, form=FORM._replace(responses=("clip", "keep_norm")))
    runtime = SteeringRuntime(buffers, max_requests=4)
    swap = Ask(VECTORS[3], to=VECTORS[1]).slot
    program = keeping_norm(PhaseProgram.of([], [swap, swap]), False)
    assert len(program.slots) == 3
    runtime.admit("a", ResolvedSteering((program, program)))
    runtime.step(["a"], [0], [2], [9])
    buffers.slots.corrections[:, :, :2] = 0.5
    used = [use for use in runtime.slot_report("a") if use.measured]
    assert [(use.slot, use.measured, use.total, use.moved) for use in used] == [
        (swap.digest.hex(), 2 * len(SITES), len(SITES) * 1.0, 2 * len(SITES))
    ]


def test_requests_without_slots_are_measured_nowhere_and_nothing_is_launched_for_them(buffers, runtime, monkeypatch):
    monkeypatch.setattr("trimtab.runtime.slot_meters.slot_uses", None)  # it is not called
    runtime.admit("a", steering([], terms=[(vector(1), 1.0)]))
    for _ in range(2):
        runtime.step(["a"], [0], [2], [9])
    assert runtime.slot_report("a") == ()
    assert not runtime._slot_meters._owner


def test_a_pass_that_was_not_planned_does_not_change_what_the_last_one_counted(buffers, runtime):
    runtime.admit("a", steering([Ask(VECTORS[0])]))
    runtime.step(["a"], [0], [4], [9])
    buffers.slots.corrections[:, :, :4] = 0.75
    runtime.before_unplanned_pass()
    buffers.slots.corrections.fill_(9.0)
    (use,) = (use for use in runtime.slot_report("a") if use.measured)
    assert (use.measured, use.total) == (4 * len(SITES), 3.0 * len(SITES))
    runtime.before_unplanned_pass()
    assert use in runtime.slot_report("a")


def test_what_slots_did_is_summed_before_their_row_is_given_to_others():
    buffers = make_slot_buffers(max_rows=3)
    runtime = SteeringRuntime(buffers, max_requests=9)
    for name, sites in (("a", SITES), ("b", SITES[1:])):
        runtime.admit(name, steering([Ask(VECTORS[0] if name == "a" else VECTORS[1], sites=sites)]))
        runtime.step([name], [0], [2], [9])
        buffers.slots.corrections[:, :, :2] = 0.5
        runtime.release(name)
    for name, sites in (("a", SITES), ("b", SITES[1:])):
        (use,) = (use for use in runtime.slot_report(name) if use.measured)
        assert (use.measured, use.total) == (2 * len(sites), 1.0 * len(sites))
        assert {type(value) for value in vars(use).values()} == {str, int, float}  # as every encoder knows them
