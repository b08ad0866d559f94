"""The exchanged classes, on small modules that follow each convention."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.engines.vllm.worker.attach import _place
from trimtab.engines.vllm.worker.conventions import Convention
from trimtab.engines.vllm.worker.layers import steered_branch_class, steered_join_class, steered_layer_class
from trimtab.ops import SlotForm, SteeringBuffers
from trimtab.responses import CLIP
from trimtab.sites import HookPoint, Site

H, N = 8, 5


class Split(nn.Module):
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return 2 * residual, residual


class First(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return 3 * hidden_states, hidden_states


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def buffers_for(*hooks: HookPoint, slots: SlotForm | None = None) -> SteeringBuffers:
    """One row, row 1, that adds 1, 2, ... at the sites in order; every other token uses it."""
    buffers = SteeringBuffers(
        [Site(0, hook) for hook in hooks], hidden_size=H, max_rows=3, max_tokens=16, dtype=torch.float32, slots=slots
    )
    for place in range(len(buffers.sites)):
        buffers.table[place, 1] = place + 1.0
        buffers.any_active[place] = True
    buffers.index[:N:2] = 1
    return buffers


def steer(layer: nn.Module, convention: Convention, *hooks: HookPoint) -> nn.Module:
    buffers = buffers_for(*hooks)
    layer.__class__ = steered_layer_class(type(layer), convention)
    for site in buffers.sites:
        buffers.attach(layer, site)
    return layer


def added(amount: float) -> Tensor:
    return amount * (torch.arange(N) % 2 == 0).float()[:, None].expand(N, H)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, H, generator=torch.Generator().manual_seed(0))


def test_a_split_stream_gets_the_addition_in_its_residual(x: Tensor) -> None:
    layer = steer(Split(), Convention.SPLIT, HookPoint.POST_BLOCK)
    hidden, residual = layer(torch.arange(N), x, x)
    torch.testing.assert_close(hidden, 4 * x)
    torch.testing.assert_close(residual, 2 * x + added(1))


def test_a_stream_in_the_first_element_gets_it_there_and_the_rest_is_left_alone(x: Tensor) -> None:
    layer = steer(First(), Convention.FIRST, HookPoint.POST_BLOCK)
    hidden, rest = layer(x, None)
    torch.testing.assert_close(hidden, 3 * x + added(1))
    torch.testing.assert_close(rest, x)


@pytest.mark.parametrize("shape", [(N, H), (1, N, H)])
def test_a_whole_stream_gets_it_with_or_without_a_batch_dimension(x: Tensor, shape: tuple[int, ...]) -> None:
    layer = steer(Whole(), Convention.WHOLE, HookPoint.POST_BLOCK)
    torch.testing.assert_close(layer(x.reshape(shape)), (3 * x + added(1)).reshape(shape))


@pytest.mark.parametrize("by_name", [False, True])
def test_the_entering_stream_is_the_residual_except_in_the_first_layer(x: Tensor, by_name: bool) -> None:
    layer = steer(Split(), Convention.SPLIT, HookPoint.PRE_ATTN)

    def call(hidden: Tensor, residual: Tensor | None) -> Any:
        if by_name:
            return layer(positions=torch.arange(N), hidden_states=hidden, residual=residual)
        return layer(torch.arange(N), hidden, residual)

    torch.testing.assert_close(call(x, 2 * x)[1], 3 * x + added(1))
    torch.testing.assert_close(call(x, None)[1], x + added(1))


def test_the_inputs_of_a_layer_are_not_written_to(x: Tensor) -> None:
    layer = steer(Split(), Convention.SPLIT, HookPoint.PRE_ATTN, HookPoint.POST_BLOCK)
    before = x.clone()
    layer(torch.arange(N), x, x)
    assert torch.equal(x, before)


def test_a_branch_is_steered_at_its_input_its_output_or_both(x: Tensor) -> None:
    buffers = buffers_for(HookPoint.MLP_IN, HookPoint.MLP_OUT)
    branch = Branch()
    branch.__class__ = steered_branch_class(Branch, HookPoint.MLP_IN, (HookPoint.MLP_OUT,))
    for site in buffers.sites:
        buffers.attach(branch, site)
    torch.testing.assert_close(branch(x), 2 * (x + added(1)) + added(2))
    torch.testing.assert_close(branch(x=x), 2 * (x + added(1)) + added(2))


class Join(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x + residual), x + residual


@pytest.mark.parametrize("probed", [False, True])
def test_where_the_attention_is_added_the_whole_stream_is_read_and_its_output_is_steered(
    x: Tensor, probed: bool
) -> None:
    site = Site(0, HookPoint.POST_ATTN)
    buffers = SteeringBuffers(
        [site], hidden_size=H, max_rows=3, max_tokens=16, dtype=torch.float32, gates=1, max_probes=2
    )
    buffers.table[0, 1] = 1.0
    buffers.any_active[0] = True
    rest = -3 * x
    open_for = torch.zeros(N, dtype=torch.bool)
    if probed:
        assert buffers.gates is not None
        buffers.gates.probe_table[1] = torch.linspace(-1, 1, H)
        buffers.gates.rows[:N, 0], buffers.gates.probes[:N, 0], buffers.gates.sites[:N, 0] = 1, 1, 1
        buffers.gates.params[:N, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
        open_for = (x + rest) @ buffers.gates.probe_table[1] > 0
        assert torch.all(open_for != (x @ buffers.gates.probe_table[1] > 0))  # the output alone says the opposite
    else:
        buffers.index[:N:2] = 1
        open_for[::2] = True
    norm = Join()
    norm.__class__ = steered_join_class(Join)
    buffers.attach(norm, site)
    due = x + rest + open_for.float()[:, None]
    for found, wanted in zip(norm(x.clone(), rest.clone()), (torch.tanh(due), due), strict=True):
        torch.testing.assert_close(found, wanted)


class Joined(nn.Module):
    """A layer of the form whose source shows where its attention ends and what adds it to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.mlp = Branch(), Join(), Branch()

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = self.attention(hidden_states)
        hidden_states, residual = self.norm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


@pytest.mark.parametrize("read", [False, True])
def test_only_where_something_reads_the_addition_moves_to_the_norm_behind_the_attention(x: Tensor, read: bool) -> None:
    layer, buffers = Joined(), buffers_for(HookPoint.POST_ATTN)
    placed = _place(layer, {HookPoint.POST_ATTN}, reads_join=read)
    assert placed == {HookPoint.POST_ATTN: layer.norm if read else layer.attention}
    assert type(layer.attention) is Branch or not read
    assert type(layer.norm) is Join or read
    buffers.attach(placed[HookPoint.POST_ATTN], buffers.sites[0])
    hidden, residual = layer(x, x.clone())
    torch.testing.assert_close(residual, 3 * x + added(1))
    torch.testing.assert_close(hidden, 2 * torch.tanh(3 * x + added(1)))


@pytest.mark.parametrize("read", [False, True])
def test_the_attention_branch_is_read_before_what_is_added_behind_it_and_steered_before_the_norm(
    x: Tensor, read: bool
) -> None:
    """A slot at `attn_out` takes a direction out of the branch alone, whether or not something reads at `post_attn`."""
    hooks = (HookPoint.ATTN_OUT, HookPoint.POST_ATTN)
    layer, buffers = Joined(), buffers_for(*hooks, slots=SlotForm(1, ("clip",), False))
    placed = _place(layer, set(hooks), reads_join=read)
    assert placed == {HookPoint.ATTN_OUT: layer.attention, HookPoint.POST_ATTN: layer.norm if read else layer.attention}
    for site in buffers.sites:
        buffers.attach(placed[site.hook], site)
    unit = torch.nn.functional.normalize(torch.linspace(-1, 2, H), dim=0)
    assert buffers.slots is not None
    buffers.table[0, 1], buffers.table[0, 2] = 0.0, unit  # the row adds at `post_attn` alone
    buffers.slots.rows[0, 1, 0, 0] = 2
    buffers.slots.codes[0, 1, 0, 0] = CLIP.code
    buffers.slots.params[0, 1, 0, :5] = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    buffers.slots.mix[0, 1, 0, 0] = 1.0
    residual = x.roll(1, 0)
    branch = 2 * x
    branch[::2] -= (branch[::2] @ unit)[:, None] * unit
    due = branch + residual + added(2)
    hidden, leaving = layer(x, residual.clone())
    torch.testing.assert_close(leaving, due)
    torch.testing.assert_close(hidden, 2 * torch.tanh(due))


def test_results_are_steered_in_place_and_inputs_are_not(x: Tensor) -> None:
    """A layer's result is its own; what a branch is given may be read by others too."""

    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.given, self.made = x, 2 * x
            return self.made

    for base, convention in ((Keeps, Convention.WHOLE), (Split, Convention.SPLIT)):
        layer = steer(base(), convention, HookPoint.POST_BLOCK)
        results = layer(x) if convention is Convention.WHOLE else layer(torch.arange(N), x, x)
        stream = results if convention is Convention.WHOLE else results[1]
        torch.testing.assert_close(stream, 2 * x + added(1))
        if convention is Convention.WHOLE:
            assert layer.made.data_ptr() == stream.data_ptr()
    branch, buffers = Keeps(), buffers_for(HookPoint.MLP_IN, HookPoint.MLP_OUT)
    branch.__class__ = steered_branch_class(Keeps, HookPoint.MLP_IN, (HookPoint.MLP_OUT,))
    for site in buffers.sites:
        buffers.attach(branch, site)
    before = x.clone()
    out = branch(x)
    assert torch.equal(x, before)
    assert branch.made.data_ptr() == out.data_ptr()


def test_other_instances_of_the_class_are_untouched(x: Tensor) -> None:
    steer(Whole(), Convention.WHOLE, HookPoint.POST_BLOCK)
    assert torch.equal(Whole()(x), 3 * x)


def test_a_steered_class_is_made_once_and_can_be_found_by_name() -> None:
    import trimtab.engines.vllm.worker.layers as module

    made = steered_layer_class(Whole, Convention.WHOLE)
    assert steered_layer_class(Whole, Convention.WHOLE) is made
    assert getattr(module, made.__qualname__) is made
    assert made.__module__ == module.__name__
    assert steered_layer_class(Whole, Convention.FIRST) is not made
