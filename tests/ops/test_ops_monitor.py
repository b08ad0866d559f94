"""The cross-layer monitor as engines use it: at one hook point, on the whole stream, and nowhere else in the graph."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.ops import ROWS_ONLY, Emission, SteeringBuffers, emit, set_emission
from trimtab.sites import HookPoint, Site

PRE, POST = HookPoint.PRE_ATTN, HookPoint.POST_BLOCK
H, N = 16, 6
SITES = [Site(layer, hook) for layer in range(3) for hook in (PRE, POST)]
AT = Site(1, PRE)
PLAIN = Emission(traced=True, terms=ROWS_ONLY)
MONITORED = PLAIN._replace(cross_layer=True, monitor_at=AT.hook)


class Stack(nn.Module):
    """Three layers of two hook points, in each of which the stream is `value + rest`."""

    def __init__(self, monitored: bool, dtype: torch.dtype = torch.float32, *, traced: bool = True) -> None:
        super().__init__()
        self.buffers_ = SteeringBuffers(SITES, hidden_size=H, max_rows=3, max_tokens=8, dtype=dtype)
        self.layers = nn.ModuleList(nn.Module() for _ in range(3))
        for site in SITES:
            layer = self.layers[site.layer]
            self.buffers_.attach(layer, site)
            mode = MONITORED if monitored and site.layer == AT.layer else PLAIN
            set_emission(layer, mode._replace(traced=traced))

    def forward(self, value: Tensor, rest: Tensor) -> list[Tensor]:
        return [emit(self.layers[s.layer], s.hook, value, rest=rest if s.hook is PRE else None) - value for s in SITES]


def steered(stack: Stack) -> tuple[Tensor, Tensor]:
    """Fill a stack's buffers: token i is a decode token where i is odd. Returns the two parts of the stream."""
    random = torch.Generator().manual_seed(0)
    buffers = stack.buffers_
    buffers.any_active.fill_(True)
    buffers.table[:, 1:].copy_(torch.randn(len(SITES), 2, H, generator=random))
    buffers.index[:N] = torch.tensor([1, 1, 2, 2, 0, 0])
    buffers.decode_mask[:N] = torch.tensor([0.0, 1.0] * 3)
    at = buffers.sites.index(AT)
    buffers.monitor_probe[at].copy_(torch.randn(H, generator=random) / 4)
    buffers.monitor_params[at].copy_(torch.tensor([0.2, 1.5, 1.0]))
    buffers.monitor_active[at] = True
    dtype = buffers.table.dtype
    return torch.randn(N, H, generator=random).to(dtype), torch.randn(N, H, generator=random).to(dtype)


def due(stack: Stack, value: Tensor, rest: Tensor) -> np.ndarray:
    buffers = stack.buffers_
    at = buffers.sites.index(AT)
    x = value.double().numpy() + rest.double().numpy()
    y = 1 / (1 + np.exp(-1.5 * (x @ buffers.monitor_probe[at].double().numpy() - np.float32(0.2))))
    rows = buffers.table.double().numpy()[:, buffers.index[:N].numpy()]
    decode = buffers.decode_mask[:N].numpy()
    late = np.array([place >= at for place in range(len(SITES))])
    return rows * np.where(late[:, None] & (decode > 0), y, 1.0)[:, :, None]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_one_hook_point_reads_the_whole_stream_and_gates_what_follows(compiled: bool, traced: bool) -> None:
    torch._dynamo.reset()
    stack = Stack(True, traced=traced)
    value, rest = steered(stack)
    run = torch.compile(stack, fullgraph=True) if compiled else stack
    for _ in range(2):
        stack.buffers_.row_gate.fill_(1.0)
        with torch.no_grad():
            found = torch.stack(run(value, rest)).double().numpy()
        np.testing.assert_allclose(found, due(stack, value, rest), atol=1e-5)
    assert not stack.buffers_.token_scales.any()


def test_the_score_of_two_half_precision_parts_is_not_rounded_to_half_precision() -> None:
    stack = Stack(True, torch.bfloat16)
    value, rest = steered(stack)
    value, rest = 256 * value, 0.3 * rest  # their sum in bfloat16 would lose most of the second part
    at = stack.buffers_.sites.index(AT)
    stack.buffers_.monitor_params[at, 1] = 0.01
    stack(value, rest)
    score = (value.double() + rest.double()) @ stack.buffers_.monitor_probe[at].double()
    y = torch.sigmoid(0.01 * (score - 0.2))
    np.testing.assert_allclose(stack.buffers_.row_gate[1:N:2].double(), y[1::2], rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_token_that_nobody_steers_keeps_its_factors_whatever_it_holds(compiled: bool) -> None:
    torch._dynamo.reset()
    stack = Stack(True)
    value, rest = steered(stack)
    value[0::2] = torch.nan
    run = torch.compile(stack, fullgraph=True) if compiled else stack
    with torch.no_grad():
        run(value, rest)
    assert stack.buffers_.row_gate[0:N:2].tolist() == [1.0] * 3
    assert bool((stack.buffers_.row_gate[1:N:2] < 1.0).all())


def graph_of(stack: Stack, layer: int) -> str:
    """What a compiler is given for one layer, as code."""
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append(module.code)
        return module.forward

    def forward(value: Tensor, rest: Tensor) -> list[Tensor]:
        return [emit(stack.layers[layer], hook, value, rest=rest) for hook in (PRE, POST)]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(forward, backend=backend, fullgraph=True)(torch.zeros(N, H), torch.zeros(N, H))
    (code,) = seen
    return code


def test_only_the_monitors_own_layer_is_traced_otherwise_than_without_a_monitor() -> None:
    monitored, plain = Stack(True), Stack(False)
    for layer in (0, 2):
        assert graph_of(monitored, layer) == graph_of(plain, layer)
    assert "sigmoid" not in graph_of(plain, 1)
    assert graph_of(monitored, 1).count("torch.sigmoid(") == 1
    assert "token_scales" not in graph_of(monitored, 1).partition("sigmoid")[2], "there is no tier to gate"


def test_an_engine_without_a_monitor_has_the_emission_that_it_had() -> None:
    assert Emission()._asdict() | {"terms": None} == {
        "traced": False, "terms": None, "cross_layer": False, "monitor_at": None, "eager": False,
    }  # fmt: skip
