"""Slots on a GPU: numbers, variants, and graphs that follow every change of their buffers."""

import numpy as np
import pytest
import torch
from ops_oracle import TOLERANCE
from slots_cases import POST, assert_noted, explained, slotted
from torch import nn

from trimtab.ops import ROWS_ONLY, Emission, emit, set_emission
from trimtab.ops.warmup import late_variants, warmup_apply_slots_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [1, 100, 4096, 8192, 16384, 16400])  # the last takes the reference
def test_the_operator_is_the_formula(dtype: torch.dtype, width: int) -> None:
    for tokens, slots, gates, split in ((1, 1, 0, False), (7, 4, 2, True), (300, 3, 1, True), (9, 9, 0, False)):
        case = slotted(tokens, width, slots=slots, gates=gates, dtype=dtype, seed=tokens, device="cuda")
        steered, rest = (torch.randn(tokens, width, device="cuda").to(dtype) for _ in range(2))
        steered[case.buffers.index[:tokens] == 0] = float("nan")
        args = case.args(steered, rest if split else None)
        expected, told = explained(args)
        torch.ops.trimtab.apply_slots_(*args)
        scale = 1 + np.abs(np.nan_to_num(expected)).max(initial=0.0)
        found, rtol = steered.double().cpu().numpy(), TOLERANCE[dtype]["rtol"]
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=5e-6 * scale)
        assert_noted(args, told, rtol=1e-3, atol=1e-4)


def test_warm_up_leaves_nothing_to_compile_in_service() -> None:
    case = slotted(300, 192, slots=2, gates=1, dtype=torch.bfloat16, device="cuda")
    assert warmup_apply_slots_kernel([case.module], [1, 2, 16, 17]) == 2
    assert warmup_apply_slots_kernel([case.module], [1, 2, 16, 17, 300]) == 0
    before = late_variants()
    for tokens in (1, 2, 15, 16, 17, 256, 300):
        steered, rest = (torch.zeros(tokens, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        torch.ops.trimtab.apply_slots_(*case.args(steered, rest))
        torch.ops.trimtab.apply_slots_(*case.args(steered))
    assert late_variants() == before


class Site(nn.Module):
    """A site with a norm behind it; the stream is kept in one part or in two."""

    def __init__(self, site: nn.Module, split: bool) -> None:
        super().__init__()
        self.site, self.split = site, split

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = emit(self.site, POST, hidden, rest=residual if self.split else None)
        stream = out.float() + residual.float()
        return out, (stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


@pytest.mark.parametrize(("slots", "split"), [(1, False), (4, True)])
@torch.no_grad()
def test_a_captured_graph_of_the_traced_form_follows_every_change_and_agrees_with_the_kernel(
    slots: int, split: bool
) -> None:
    case = slotted(17, 2048, slots=slots, device="cuda")
    site, buffers = Site(case.module, split), case.buffers
    set_emission(case.module, Emission(traced=True, terms=ROWS_ONLY))
    torch._dynamo.reset()
    compiled = torch.compile(site, fullgraph=True, dynamic=True)
    hidden, rest = (torch.randn(17, 2048, device="cuda") for _ in range(2))
    compiled(hidden, rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        traced = compiled(hidden, rest)
    for seed in range(4):
        other = slotted(17, 2048, slots=slots, seed=seed).buffers
        assert buffers.slots is not None
        assert other.slots is not None
        buffers.table.copy_(other.table)
        buffers.slots.slab.copy_(other.slots.slab)
        buffers.index.copy_(other.index)
        hidden.copy_(torch.randn(17, 2048))
        graph.replay()
        set_emission(case.module, Emission())
        expected = site(hidden, rest)
        set_emission(case.module, Emission(traced=True, terms=ROWS_ONLY))
        for found, wanted in zip(traced, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert (traced[0] - hidden).abs().max() > 1e-2
