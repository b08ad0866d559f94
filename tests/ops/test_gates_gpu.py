"""Gates on a GPU: numbers, variants, and graphs that follow every change of their buffers."""

import numpy as np
import pytest
import torch
from gates_cases import SITES, Oracle, gated_stack
from torch import Tensor, nn

from trimtab.ops import ROWS_ONLY, Emission, emit, set_emission
from trimtab.ops.warmup import late_variants, warmup_apply_gates_kernel
from trimtab.sites import HookPoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # one rounding of values of about 4
DECIDED_AT_THE_SECOND = {SITES[1]}


class Chain(nn.Module):
    """The three sites with a norm between them; the stream is kept in two parts."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.sites = nn.ModuleList(modules)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        for module in self.sites:
            residual = emit(module, HookPoint.POST_BLOCK, residual, rest=hidden)
            stream = hidden.float() + residual.float()
            hidden = (stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype).tanh()
            residual = stream.to(residual.dtype)
        return residual


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [1, 100, 4096, 8192, 16384, 16400])  # the last takes the reference
@pytest.mark.parametrize("add", [True, False])
def test_three_sites_in_a_row_give_what_the_formula_says(dtype: torch.dtype, width: int, add: bool) -> None:
    for tokens, gates, split in ((1, 1, False), (7, 4, True), (300, 3, True)):
        stack = gated_stack(tokens, width, gates=gates, dtype=dtype, seed=tokens, device="cuda")
        state, oracle = stack.buffers.gates, Oracle(stack)
        assert state is not None
        state.values.fill_(float("nan"))
        state.gains.fill_(float("nan"))
        for place in range(len(SITES)):
            hidden, rest, steered = (torch.randn(tokens, width, device="cuda").to(dtype) for _ in range(3))
            before = steered.double().cpu().numpy()
            target = steered if add else steered[:0]
            torch.ops.trimtab.apply_gates_(*stack.args(place, target, hidden, rest if split else None))
            stream = hidden.double().cpu().numpy() + (rest.double().cpu().numpy() if split else 0.0)
            expected = before + oracle.added(place, stream) * add
            sure = [token for token in range(tokens) if token not in oracle.near]
            found = steered.double().cpu().numpy()
            np.testing.assert_allclose(found[sure], expected[sure], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        gains = state.gains.cpu().numpy()
        for token, slot in np.ndindex(tokens, gates):
            if token not in oracle.near:
                factor = oracle.factors.get((token, slot), 0.0)
                assert gains[slot, token] == pytest.approx(oracle.params[token, slot, 0] * factor, abs=1e-4)


def test_warm_up_leaves_nothing_to_compile_in_service() -> None:
    stack = gated_stack(300, 192, gates=2, dtype=torch.bfloat16, device="cuda")
    assert warmup_apply_gates_kernel(stack.modules, [1, 2, 16, 17]) == 4
    assert warmup_apply_gates_kernel(stack.modules, [1, 2, 16, 17, 300]) == 0
    before = late_variants()
    for tokens in (1, 2, 15, 16, 17, 256, 300):
        hidden, rest, steered = (torch.zeros(tokens, 192, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for place in range(len(SITES)):
            for target in (steered, steered[:0]):
                torch.ops.trimtab.apply_gates_(*stack.args(place, target, hidden, rest))
                torch.ops.trimtab.apply_gates_(*stack.args(place, target, hidden))
    assert late_variants() == before


@pytest.mark.parametrize("everywhere", [True, False])
@torch.no_grad()
def test_a_captured_graph_of_the_traced_form_follows_every_change_and_agrees_with_the_kernel(everywhere: bool) -> None:
    places = None if everywhere else DECIDED_AT_THE_SECOND
    stack = gated_stack(17, 128, gates=2, dtype=torch.float32, device="cuda", probe_sites=places)
    chain, state = Chain(stack.modules), stack.buffers.gates
    assert state is not None
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, dynamic=True)
    hidden, residual = (torch.randn(17, 128, device="cuda") for _ in range(2))

    def emissions(mode: Emission) -> None:
        for module in stack.modules:
            set_emission(module, mode)

    emissions(Emission(traced=True, terms=ROWS_ONLY))
    compiled(hidden, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        traced = compiled(hidden, residual)
    seen = set()
    for seed in range(4):
        other = gated_stack(17, 128, gates=2, seed=seed).buffers
        assert other.gates is not None
        stack.buffers.table.copy_(other.table)
        state.slab.copy_(other.gates.slab)
        state.probe_table.copy_(other.gates.probe_table)
        if not everywhere:
            state.sites.clamp_(max=1).mul_(2)
            stack.buffers.table[0] = 0  # what a gate lets through acts from its probe's site on
        hidden.copy_(torch.randn(17, 128))
        state.values.fill_(float("nan"))
        state.gains.fill_(float("nan"))
        graph.replay()
        emissions(Emission())
        stack.buffers.any_active.fill_(True)
        torch.testing.assert_close(traced, chain(hidden, residual), rtol=1e-5, atol=1e-5)
        emissions(Emission(traced=True, terms=ROWS_ONLY))
        seen.add(round(float(state.values.nan_to_num().sum()), 4))
    assert len(seen) == 4
