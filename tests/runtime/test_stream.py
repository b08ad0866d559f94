"""Random lives of requests, against the obvious model: every token receives what its request asked for its position."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from runtime_model import HIDDEN, SITES, Request, make_buffers, received, vector

from trimtab.runtime import SteeringRuntime

MAX_REQUESTS, MAX_TOKENS = 3, 48

VECTORS = [vector(seed, sites) for seed, sites in enumerate([SITES, SITES[:1], SITES[1:], SITES[2:], SITES])]

scales = st.sampled_from([0.1, 1.0, -2.5, 1e-3, 300.0])
asked = st.lists(st.tuples(st.sampled_from(VECTORS), scales), max_size=3)


class Engine(RuleBasedStateMachine):
    """A small scheduler: chunked prefill, prefix hits, speculation, preemption with recompute, padding."""

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def start(self, dtype):
        self.dtype = dtype
        self.buffers = [make_buffers(MAX_REQUESTS, max_tokens=MAX_TOKENS, dtype=dtype) for _ in range(2)]
        self.runtimes = [SteeringRuntime(buffers, max_requests=MAX_REQUESTS) for buffers in self.buffers]
        self.requests: list[Request] = []
        self.born = 0

    def call(self, method, *args, **kwargs):
        for runtime in self.runtimes:
            getattr(runtime, method)(*args, **kwargs)

    def pick(self, data, running):
        candidates = [request for request in self.requests if request.running == running]
        return data.draw(st.sampled_from(candidates)) if candidates else None

    @rule(prefill=asked, decode=asked, prompt=st.integers(1, 9), same=st.integers(0, 3), data=st.data())
    def arrive(self, prefill, decode, prompt, same, data):
        self.born += 1
        self.requests.append(Request(f"r{self.born}", prefill, decode if same else prefill, prompt))
        self.run(data)

    @rule(data=st.data())
    def resume(self, data):
        self.run(data)

    def run(self, data):
        """Admit a waiting request; part of what it must compute may be found in the prefix cache."""
        request = self.pick(data, running=False)
        if request is None or sum(r.running for r in self.requests) >= MAX_REQUESTS:
            return
        request.computed = data.draw(st.integers(0, request.length - 1))
        request.running = True
        self.call("admit", request.name, request.steering)

    @rule(data=st.data(), finished=st.booleans())
    def leave(self, data, finished):
        """A request finishes, or is preempted and will compute its tokens again."""
        if request := self.pick(data, running=True):
            request.running = False
            self.call("release", request.name)
            if finished:
                self.requests.remove(request)

    @rule(data=st.data(), steps=st.integers(1, 4))
    def work(self, data, steps):
        for _ in range(steps):
            self.step(data, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 2)))

    def step(self, data, padding, strangers):
        batch: list[tuple[Request | None, int, int]] = []
        for request in data.draw(st.permutations([r for r in self.requests if r.running])):
            if data.draw(st.integers(0, 5)) == 5:
                continue  # some running requests sit a step out
            speculated = data.draw(st.integers(0, 2))
            count = min(request.length - request.computed + speculated, 13)
            batch.append((request, request.computed, max(1, count - data.draw(st.integers(0, 6)))))
        for _ in range(strangers):  # requests without steering, and the segments that pad a graph
            batch.insert(data.draw(st.integers(0, len(batch))), (None, data.draw(st.integers(0, 9)), 2))
        tokens = sum(count for _, _, count in batch)
        as_array = np.asarray if data.draw(st.booleans()) else (lambda values: np.asarray(values, np.int32))
        self.call(
            "step",
            [request.name if request else "" for request, _, _ in batch],
            as_array([first for _, first, _ in batch]),
            as_array([count for _, _, count in batch]),
            as_array([request.prompt if request else 5 for request, _, _ in batch]),
            padded_tokens=data.draw(st.sampled_from([None, tokens + padding])),
        )
        due = [
            request.due(position) if request else np.zeros((len(SITES), HIDDEN))
            for request, first, count in batch
            for position in range(first, first + count)
        ]
        decode = [
            request is not None and position >= request.prompt
            for request, first, count in batch
            for position in range(first, first + count)
        ]
        self.check(due, decode)
        for request, _, count in batch:
            if request:  # rejected speculated tokens are computed again
                request.computed += data.draw(st.integers(1, count))
                request.length = max(request.length, request.computed + (request.computed >= request.prompt))

    def check(self, due, decode):
        expected = np.zeros((MAX_TOKENS, len(SITES), HIDDEN))
        expected[: len(due)] = due if due else 0.0
        # each row and each gate is rounded once: to float32, rows then to the table's dtype
        tolerance = 2e-7 if self.dtype == torch.float32 else 2.0**-8
        largest = max((abs(scale) for r in self.requests for _, scale in (*r.prefill, *r.decode)), default=1.0)
        np.testing.assert_allclose(received(self.buffers[0]), expected, rtol=tolerance, atol=tolerance * largest * 4)
        steered = self.buffers[0].index.numpy() != 0
        mask = self.buffers[0].decode_mask.numpy()
        assert all(mask[i] == decode[i] for i in range(len(due)) if steered[i])
        assert not self.buffers[0].token_scales.any()
        running = [request for request in self.requests if request.running]
        for site, flag in zip(SITES, self.buffers[0].any_active[:, 0].tolist(), strict=True):
            position = SITES.index(site)
            assert flag or not any(r.due(p)[position].any() for r in running for p in (0, r.prompt))
            assert not flag or any(site in v.directions for r in running for v, _ in (*r.prefill, *r.decode))
            resting = self.buffers[0].states[position].resting
            assert not (resting and any(sums[position].any() for sums in due))
            assert resting or any(site in v.directions for r in running for v, _ in (*r.prefill, *r.decode))

    @invariant()
    def twins_agree_and_row_zero_is_zero(self):
        if not hasattr(self, "buffers"):
            return
        first, second = self.buffers
        assert self.runtimes[0].digest() == self.runtimes[1].digest()
        assert torch.equal(first.table, second.table)
        assert torch.equal(first.token_slab, second.token_slab)
        assert torch.equal(first.any_active, second.any_active)
        assert not first.table[:, 0].any()
        assert self.runtimes[0].rows_in_use <= 2 * sum(request.running for request in self.requests)

    def teardown(self):
        if not hasattr(self, "buffers"):
            return
        for request in self.requests:
            self.call("release", request.name)
        self.call("step", [], [], [], [])
        assert self.runtimes[0].rows_in_use == 0
        assert not received(self.buffers[0]).any()
        assert not self.buffers[0].any_active.any()


TestStream = Engine.TestCase
TestStream.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
