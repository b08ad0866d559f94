"""`route`: which program each token of a request with spans receives, whatever an engine does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from route_cases import Device, alone, run, widest
from spans_model import Life, due, random_spans

from trimtab.ops import span_buffers
from trimtab.ops.route import route, route_args, route_reference
from trimtab.ops.span_buffers import SpanBuffers
from trimtab.program import spans as said
from trimtab.program.spans import Between, IdSet, Spans
from trimtab.runtime.span_lines import ring_after, span_line
from trimtab.sites import Phase


@pytest.mark.parametrize("seed", range(8))
def test_every_token_has_the_records_of_the_program_that_is_due_over_random_schedules(seed: int) -> None:
    seen = run(seed, 250, route_reference, (torch.int32, torch.int64)[seed % 2])
    assert seen[0] > 1000
    assert seen[1] > 400
    assert seen[2] > 100


def test_the_interpreted_kernel_decides_as_is_due_over_random_schedules() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "interpreted_route.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "4 schedules are as due"


@pytest.mark.parametrize("first", [0, 1, 3, 5, 64, 2000])
def test_a_request_with_as_many_of_everything_as_there_can_be_is_decided_in_passes_of_any_length(first: int) -> None:
    spans, rng = widest(5), np.random.default_rng(first)
    text: list[int] = []
    while len(text) < 2090:
        text += [*range(16, 0, -1)] if rng.random() < 0.1 else [int(rng.integers(0, 200))]
        text += [101] * 16 if rng.random() < 0.05 else []
    upto = first + 90
    expected = [due(spans, text, position) for position in range(first, upto)]
    assert len(set(expected)) > 20
    assert alone(spans, text, first, upto, route) == expected
    assert alone(spans, text, upto - 1, upto, route) == expected[-1:]


def test_a_step_may_compute_so_many_tokens_in_vain() -> None:
    """The longest sequence, and whether one has opened, are found again behind that many drafts."""
    sequence = tuple(range(10, 26))
    spans = Spans(1, (0, 1), (0, 1), ((0,), (1, 2, 1, 2)), (Phase.PREFILL, Phase.DECODE, Phase.DECODE),
                  (Between((sequence,)), IdSet(((99, 100),))))  # fmt: skip
    opened = [0, *range(9), *sequence]
    for text in ([*opened, 7, 7], [*opened[:-1], 25, 7], [*opened[:-2], 7, 25, 7]):
        last = len(text) - 3  # the step before the last two tokens computes it, and drafts
        for drafts in (0, 1, span_buffers.MOST_DRAFTS):
            device = Device(np.random.default_rng(0))
            life = Life("a", 1, text, spans)
            device.join(life, 0)
            for first, tokens in ((0, text[:last]), (last, [text[last], *[50] * drafts]), (last + 1, text[-2:])):
                count = len(tokens)
                device.words[:count, 1] = device.slots["a"]
                positions = torch.arange(first, first + count)
                args = route_args(device.buffers, device.words, device.gates, positions, torch.tensor(tokens))
                route(args, count)
            expected = [due(spans, text, position) for position in (last + 1, last + 2)]
            assert device.buffers.decided[:2].tolist() == expected, (text, drafts)


def test_what_is_no_token_of_such_a_request_is_left_as_it_is() -> None:
    device = Device(np.random.default_rng(0), 1)
    for tensor in (device.words, device.gates):
        tensor.random_(0, 99)
    device.words[:40, 1] = 0
    before = [tensor.clone() for tensor in (device.words, device.gates, device.buffers.decided, device.buffers.rings)]
    device.words[40:, 1] = before[0][40:, 1] = 1
    positions = torch.full((40,), -3)
    route(route_args(device.buffers, device.words, device.gates, positions, positions), 40)
    after = (device.words, device.gates, device.buffers.decided, device.buffers.rings)
    assert all(map(torch.equal, before, after))


def test_fewer_positions_or_ids_than_tokens_are_refused() -> None:
    buffers, words = SpanBuffers(1, max_tokens=8), torch.zeros(8, 8, dtype=torch.int64)
    for positions, ids in ((3, 8), (8, 3)):
        args = route_args(buffers, words, words[:, :0], torch.zeros(positions), torch.zeros(ids))
        with pytest.raises(ValueError, match=f"4 tokens, but {positions} positions and {ids} ids"):
            route(args, 4)


def test_the_device_holds_as_many_of_everything_as_a_request_may_have() -> None:
    assert span_buffers.RUNS == said.MOST_RUNS
    assert span_buffers.PROGRAMS == said.MOST_PROGRAMS
    assert span_buffers.KINDS == said.MOST_KINDS == span_buffers.RUN_KIND
    assert span_buffers.ATOMS == said.MOST_ATOMS
    assert 2**said.MOST_ATOMS == span_buffers.NUMBERS
    assert span_buffers.ID_RANGES == said.MOST_ID_RANGES
    assert 2 * said.MOST_SEQUENCES == span_buffers.SEQUENCES
    assert said.LONGEST_SEQUENCE == span_buffers.LENGTH
    assert said.POSITIONS_BELOW == span_buffers.POSITIONS_BELOW == 2**31 // span_buffers.RUN_KIND


@pytest.mark.parametrize("seed", range(50))
def test_what_was_computed_elsewhere_leaves_the_ring_that_computing_it_here_leaves(seed: int) -> None:
    """As far as it is ever read: what atoms are behind the last token, and the ids of those that they look back to."""
    rng = np.random.default_rng(seed)
    prompt = int(rng.integers(1, 90))
    spans = random_spans(rng, prompt)
    text = [int(token) for token in rng.integers(0, 3, prompt + 60)]
    upto = int(rng.integers(1, len(text)))
    device = Device(rng)
    device.join(Life("a", prompt, text, spans), 0)
    device.words[:upto, 1] = slot = device.slots["a"]
    route(route_args(device.buffers, device.words, device.gates, torch.arange(upto), torch.tensor(text)), upto)
    if spans.atoms:
        computed, told = device.buffers.rings[slot].numpy(), ring_after(spans, text, upto)
        last = [position % 64 for position in range(max(0, upto - 64), upto)]
        np.testing.assert_array_equal(computed[0, last], told[0, last])
        answers = [position % 64 for position in range(max(prompt, upto - 64), upto)]
        np.testing.assert_array_equal(computed[1, answers], told[1, answers])


def test_a_line_is_as_long_as_the_page_says() -> None:
    bare, gated = (span_buffers.span_record(gates).itemsize for gates in (0, 4))
    assert (bare, gated) == (21792, 28448)
    assert SpanBuffers(256, max_tokens=8192, gates=4).nbytes == 257 * (28448 + 512) + 4 * 8192
    most = [SpanBuffers(1024, max_tokens=8192, gates=gates).nbytes / 2**20 for gates in (0, 4)]
    assert [*map(round, most)] == [22, 28]  # as docs/serving.md has it
    line = span_line(span_buffers.span_record(0), widest(5), np.zeros((32, 8), np.int64))
    assert line.nbytes == bare
