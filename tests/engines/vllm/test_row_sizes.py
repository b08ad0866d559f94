"""How much of an addition arrives, measured on runners that stand in for vLLM's, with models that keep sizes or not."""

import importlib
import logging
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.engines.vllm.worker import layers as steered_layers
from trimtab.engines.vllm.worker import worker as worker_module
from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.boundaries import LayerBoundary
from trimtab.engines.vllm.worker.conventions import convention_of
from trimtab.engines.vllm.worker.layers import steered_layer_class
from trimtab.engines.vllm.worker.row_sizes import require_full_size, tolerance
from trimtab.engines.vllm.worker.single_runs import require_single_runs
from trimtab.engines.vllm.worker.slot_check import require_live_slots
from trimtab.errors import SteeringError
from trimtab.ops import Emission, SlotForm, SteeringBuffers, set_emission
from trimtab.sites import HookPoint, Site

WIDTH, MOST, LAYERS = 48, 16, 4
PRE, POST = HookPoint.PRE_ATTN, HookPoint.POST_BLOCK
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Branch(nn.Module):
    """A norm, and weights whose answer may be much larger than the stream."""

    def __init__(self, seed: int, gain: float = 3.0) -> None:
        super().__init__()
        self.weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) * gain / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() / x.float().square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return torch.nn.functional.silu(normed @ self.weight).to(x)


class Split(nn.Module):
    def __init__(self, seed: int, gain: float = 3.0) -> None:
        super().__init__()
        self.branch = Branch(seed, gain)

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return self.branch(residual), residual


class ScalesInside(Split):
    """As `Split`, but for a scale that reading this source does not show."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        def shrunk(stream: Tensor) -> Tensor:
            return stream.mul(0.5)

        residual = shrunk(hidden_states) if residual is None else shrunk(hidden_states + residual)
        return self.branch(residual), residual


class Whole(nn.Module):
    scale = 1.0

    def __init__(self, seed: int, gain: float = 3.0) -> None:
        super().__init__()
        self.branch = Branch(seed, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x + self.branch(x))


class Scaled(Whole):
    scale = 0.25  # by the model's own definition, as in Gemma 4


class Normed(Whole):
    """A post-norm layer: its stream keeps no size."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(x)
        return x / x.float().norm(dim=-1, keepdim=True).to(x)


class Model(nn.Module):
    """Layers in a loop. Unless told otherwise it goes around their hooks, as a compiled graph does."""

    def __init__(self, layers: list[nn.Module], between: Callable[[int, Any], Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.do_not_compile = False
        self._between = between

    def forward(self, stream: Tensor) -> Tensor:
        state: tuple[Any, ...] = (stream, None) if isinstance(self.layers[0], Split) else (stream,)
        for index, layer in enumerate(self.layers):
            out = layer(*state) if self.do_not_compile else layer.forward(*state)
            state = out if isinstance(out, tuple) else (out,)
            if self._between is not None:
                state = tuple(self._between(index, part) for part in state)
        return state[0] if len(state) == 1 else state[0] + state[1]


class Runner:
    intermediate_tensors = None
    supports_mm_inputs = False
    is_first_pp_rank = True
    serves = False  # whether passes are asked for that replay graphs, as those that serve

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs_embeds = SimpleNamespace(gpu=torch.zeros(1))
        self.connector_off: list[bool] = []
        self.kv_connector = SimpleNamespace(set_disabled=self.connector_off.append)
        self.inputs = torch.randn(MOST, WIDTH, generator=generator).to(dtype)
        self.model, self.passes, self.longest = model, 0, MOST

    def get_model(self) -> Model:
        return self.model

    def execute_model(self, tokens: int) -> Tensor:
        return self.model(self.inputs[:tokens].clone())

    @torch.inference_mode()
    def _dummy_run(self, tokens: int, **options: Any) -> tuple[Tensor]:
        assert self.serves or options["is_profile"]  # no graph is replayed
        assert self.serves or options["skip_eplb"]
        assert tokens <= self.longest
        self.passes += 1
        self.kv_connector.set_disabled(True)
        result = self.execute_model(tokens)
        self.kv_connector.set_disabled(False)
        return (result,)


def config(batched_tokens: int) -> Any:
    return SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=batched_tokens, max_num_seqs=MOST))


def check(
    layers: list[nn.Module],
    *,
    hooks: tuple[HookPoint, ...] = (POST,),
    between: Callable[[int, Any], Any] | None = None,
    dtype: torch.dtype = torch.float32,
    v2: bool = False,
    first: int = 0,
    spoil: Callable[[Runner], None] = lambda runner: None,
    batched_tokens: int = MOST,
    slots: SlotForm | None = None,
    required: Callable[[Any, Attachment, bool], None] = require_full_size,
    kind: Callable[..., "Model"] = Model,
) -> Runner:
    """Steer layers and measure; see that all is as before. `first` is the number of the stage's first layer."""
    held = {first + i: LayerBoundary.of(layer) for i, layer in enumerate(layers)}
    sites = [Site(index, hook) for index in held for hook in hooks]
    buffers = SteeringBuffers(sites, hidden_size=WIDTH, max_rows=4, max_tokens=MOST, dtype=dtype, slots=slots)
    for site in sites:
        layer = held[site.layer].layer
        if not isinstance(layer, steered_layers.SteeredLayer):
            layer.__class__ = steered_layer_class(type(layer), held[site.layer].convention)
        buffers.attach(layer, site)
        set_emission(layer, Emission(eager=True))
    for state in buffers.states:
        state.resting = True  # as after a warm-up that ran real steps
    runner = Runner(kind(layers, between), dtype)
    runner.longest, runner.serves = batched_tokens, slots is not None or required is started
    spoil(runner)
    worker = SimpleNamespace(model_runner=runner, vllm_config=config(batched_tokens))
    attachment = Attachment(buffers, {site: held[site.layer].layer for site in sites}, (), held)
    try:
        required(worker, attachment, v2)
    finally:
        assert buffers.slots is None or not buffers.slots.slab.any()
        assert all(state.resting for state in buffers.states)
        assert not buffers.table.any()
        assert not buffers.any_active.any()
        assert not buffers.index.any()
        assert not runner.model.do_not_compile
        assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    return runner


def started(worker: Any, attachment: Attachment, v2: bool) -> None:
    """All that is checked at a start, in its order."""
    runner, original = worker.model_runner, worker_module.is_v2
    worker._trimtab = worker_module.WorkerSteering(SimpleNamespace(), attachment, None, None)  # type: ignore[arg-type]
    try:
        worker_module.is_v2 = lambda asked: v2 and asked is runner
        worker_module.after_warm_up(worker)
    finally:
        worker_module.is_v2 = original


SLOTTED = {"slots": SlotForm(2, ("clip",), False), "required": require_live_slots}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hooks", [(POST,), (PRE, POST)], ids=str)
@pytest.mark.parametrize("kind", [Split, Whole, Normed])
def test_slots_that_read_the_whole_stream_are_no_fault(
    kind: Any, hooks: tuple[HookPoint, ...], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="vllm.trimtab"):
        check(made(kind), hooks=hooks, dtype=dtype, **SLOTTED)
    assert not caplog.records


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_that_reads_a_part_of_the_stream_is_refused_by_site(
    dtype: torch.dtype, v2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emitting = importlib.import_module("trimtab.ops.emit")
    original = emitting.slot_op_args
    monkeypatch.setattr(
        emitting,
        "slot_op_args",
        lambda module, hook, steered, rest, hidden: original(module, hook, steered, None, hidden),
    )
    with pytest.raises(SteeringError, match=r"leaves a part of it, at post_block:0 \(-?0\.\d+\), post_block:1 "):
        check(made(Split), dtype=dtype, v2=v2, **SLOTTED)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_that_reads_a_part_of_what_a_layer_is_given_is_refused_by_site(
    dtype: torch.dtype, v2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = steered_layers.emit

    def partly(module: nn.Module, hook: HookPoint, stream: Tensor, rest: Tensor | None = None, **other: Any) -> Tensor:
        return original(module, hook, stream, rest=None if hook is PRE else rest, **other)

    monkeypatch.setattr(steered_layers, "emit", partly)
    with pytest.raises(SteeringError, match="a slot reads a part of the stream at pre_attn:1, pre_attn:2, pre_attn:3:"):
        check(made(Split), hooks=(PRE, POST), dtype=dtype, v2=v2, **SLOTTED)


def made(kind: Callable[..., nn.Module], gain: float = 3.0) -> list[nn.Module]:
    return [kind(seed, gain) for seed in range(LAYERS)]


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hooks", [(POST,), (PRE,), (PRE, POST)], ids=str)
@pytest.mark.parametrize("kind", [Split, Whole, Scaled, Normed])
def test_a_healthy_model_starts(
    kind: Any, hooks: tuple[HookPoint, ...], dtype: torch.dtype, v2: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="vllm.trimtab"):
        check(made(kind), hooks=hooks, dtype=dtype, v2=v2)
    assert not caplog.records  # everything was measured


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Split, Whole])
def test_branches_that_drown_the_stream_are_no_fault(kind: Any, dtype: torch.dtype) -> None:
    for gain in (30.0, 300.0):
        check(made(kind, gain), hooks=(PRE, POST), dtype=dtype)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Split, Whole])
def test_a_stream_that_is_scaled_behind_the_addition_is_refused_by_site(
    kind: Any, dtype: torch.dtype, v2: bool
) -> None:
    def between(index: int, part: Tensor) -> Tensor:
        return 0.5 * part if index == 1 else part

    with pytest.raises(SteeringError, match=r"arrives at another size .* at post_block:1 \(0\.(5|49)\d* times\):"):
        check(made(kind), between=between, dtype=dtype, v2=v2)


def test_a_scale_of_less_than_a_tenth_is_seen() -> None:
    with pytest.raises(SteeringError, match=r"post_block:2 \(1\.07 times\)"):
        check(made(Whole), between=lambda index, part: 1.07 * part if index == 2 else part, dtype=torch.bfloat16)


@pytest.mark.parametrize("hook", [PRE, POST])
@pytest.mark.parametrize("kind", [Split, Whole, Scaled])
def test_a_row_that_is_added_twice_is_refused_by_site(
    kind: Any, hook: HookPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = steered_layers.emit

    def twice(module: nn.Module, at: HookPoint, stream: Tensor, **options: Any) -> Tensor:
        out = original(module, at, stream, **options | {"in_place": False})
        return out + (out - stream) if at is hook else out

    monkeypatch.setattr(steered_layers, "emit", twice)
    sites = ", ".join(rf"{hook}:{layer} \((2|1\.99|2\.0\d*) times\)" for layer in range(LAYERS))
    with pytest.raises(SteeringError, match=sites):
        check(made(kind), hooks=(PRE, POST))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 2])
def test_a_layer_that_scales_a_stream_in_two_parts_is_refused_by_number(at: int, dtype: torch.dtype) -> None:
    layers = made(Split)
    layers[at] = ScalesInside(at)
    with pytest.raises(
        SteeringError, match=rf"ScalesInside cannot be steered: layer {at} hands on 0\.(5|49)\d* times the"
    ):
        check(layers, dtype=dtype)


def test_a_layer_behind_all_that_is_steered_may_do_as_it_likes() -> None:
    """What it scales was added at the model's own size."""
    layers = made(Split)
    held = {i: LayerBoundary.of(layer) for i, layer in enumerate([*layers, ScalesInside(9)])}
    assert convention_of(ScalesInside) is held[LAYERS].convention
    buffers = SteeringBuffers([Site(1, POST)], hidden_size=WIDTH, max_rows=4, max_tokens=MOST, dtype=torch.float32)
    layers[1].__class__ = steered_layer_class(Split, held[1].convention)
    buffers.attach(layers[1], Site(1, POST))
    set_emission(layers[1], Emission(eager=True))
    runner = Runner(Model([held[i].layer for i in sorted(held)]), torch.float32)
    worker = SimpleNamespace(model_runner=runner, vllm_config=config(MOST))
    require_full_size(worker, Attachment(buffers, {}, (), held), False)
    assert runner.passes


def test_a_pipeline_stage_measures_its_own_layers() -> None:
    check(made(Split), first=12)
    with pytest.raises(SteeringError, match="layer 13 hands on"):
        check([Split(0), ScalesInside(1)], first=12)


def test_the_last_layer_of_a_stage_is_measured_by_what_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    original = steered_layers.emit

    def halved(module: nn.Module, at: HookPoint, stream: Tensor, **options: Any) -> Tensor:
        out = original(module, at, stream, **options | {"in_place": False})
        return stream + (out - stream) / 2 if module is last else out

    monkeypatch.setattr(steered_layers, "emit", halved)
    layers = made(Whole)
    last = layers[-1]
    with pytest.raises(SteeringError, match=rf"at post_block:{LAYERS - 1} \(0\.5 times\):"):
        check(layers)


def compiled_whole(runner: Runner) -> None:
    runner.model._compiled_call_impl = runner.model.forward  # type: ignore[assignment]


def without_hooks(runner: Runner) -> None:
    model, forward = runner.model, runner.model.forward

    def around(stream: Tensor) -> Tensor:
        told, model.do_not_compile = model.do_not_compile, False
        try:
            return forward(stream)
        finally:
            model.do_not_compile = told

    model.forward = around  # type: ignore[method-assign]


def failing(runner: Runner) -> None:
    def fails(stream: Tensor) -> Tensor:
        raise RuntimeError("this model runs as a graph alone")

    runner.model.forward = fails  # type: ignore[method-assign]


def overflowing(runner: Runner) -> None:
    runner.inputs.fill_(math.inf)


def spread(runner: Runner) -> None:
    """Tokens that lie on several ranks: each holds half of them."""
    forward = runner.model.forward
    runner.model.forward = lambda stream: forward(stream[: len(stream) // 2])  # type: ignore[method-assign]
    runner.execute_model = lambda tokens: torch.cat([runner.model(runner.inputs[:tokens].clone())] * 2)  # type: ignore[method-assign]


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("spoil", [compiled_whole, without_hooks, failing, overflowing, spread])
def test_where_there_is_no_reading_nothing_is_refused_and_it_is_said(
    spoil: Callable[[Runner], None], v2: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="vllm.trimtab"):
        runner = check([Split(0), ScalesInside(1), Split(2)], spoil=spoil, v2=v2)
    if v2 and runner.connector_off:
        assert not runner.connector_off[-1]
    assert "was not measured" in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


def test_a_branch_that_answers_in_proportion_is_no_reading_and_no_fault() -> None:
    """Without a norm before it, a branch's answer cannot be told from the stream: here it lies across the pattern."""

    class Linear(Split):
        def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            residual = hidden_states if residual is None else hidden_states + residual
            return residual @ self.branch.weight.to(residual), residual

    check([Linear(seed) for seed in range(LAYERS)], hooks=(PRE, POST))


class Looped(Model):
    """Runs its layers twice."""

    def __init__(self, *args: Any, normed: bool) -> None:
        super().__init__(*args)
        self.normed = normed

    def forward(self, stream: Tensor) -> Tensor:
        for _ in range(2):
            stream = super().forward(stream)
            if self.normed:
                stream = (stream.float() / stream.float().square().mean(-1, keepdim=True).sqrt()).to(stream)
        return stream


@pytest.mark.parametrize("slots", [None, SLOTTED["slots"]], ids=["plain", "slots"])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("hooks", [(POST,), (PRE,), (PRE, POST)], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", [Split, Whole, Scaled])
def test_layers_that_run_twice_are_refused_by_class_and_count(
    kind: Any, normed: bool, hooks: tuple[HookPoint, ...], v2: bool, slots: SlotForm | None
) -> None:
    looped = partial(Looped, normed=normed)
    with pytest.raises(
        SteeringError, match=rf"class {kind.__name__} cannot be steered: .* runs them 2 times \(layers 0, 1, 2, 3\)"
    ):
        check(made(kind), hooks=hooks, v2=v2, slots=slots, required=started, kind=looped)


@pytest.mark.parametrize("slots", [None, SLOTTED["slots"]], ids=["plain", "slots"])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("kind", [Split, Whole, Scaled, Normed])
def test_layers_that_run_once_start(
    kind: Any, v2: bool, slots: SlotForm | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="vllm.trimtab"):
        check(made(kind), hooks=(PRE, POST), v2=v2, slots=slots, required=started)
    assert not caplog.records


def test_of_layers_that_run_differently_often_each_is_told() -> None:
    class Uneven(Model):
        def forward(self, stream: Tensor) -> Tensor:
            for layer in (self.layers[i] for i in (0, 1, 1, 2, 2, 2, 3)):
                stream = layer(stream) if self.do_not_compile else layer.forward(stream)
            return stream

    with pytest.raises(SteeringError, match=r"runs them 2 times \(layers 1\), 3 times \(layers 2\), and"):
        check(made(Whole), required=require_single_runs, kind=Uneven)


def test_one_layer_in_two_places_runs_twice() -> None:
    layers = made(Split)
    layers[2] = layers[0]
    with pytest.raises(SteeringError, match=r"Split cannot be steered: .* 2 times \(layers 0, 2\)"):
        check(layers, required=require_single_runs)


def test_loops_of_a_model_that_is_one_compiled_function_are_counted() -> None:
    with pytest.raises(SteeringError, match="2 times"):
        check(made(Whole), required=require_single_runs, kind=partial(Looped, normed=True), spoil=compiled_whole)


def test_loops_are_counted_in_a_pass_that_fails_later() -> None:
    class Failing(Looped):
        def forward(self, stream: Tensor) -> Tensor:
            super().forward(stream)
            raise RuntimeError("this model runs as a graph alone")

    with pytest.raises(SteeringError, match="2 times"):
        check(made(Whole), required=require_single_runs, kind=partial(Failing, normed=False))


def test_a_runner_that_runs_its_model_twice_is_no_fault() -> None:
    def repeated(runner: Runner) -> None:
        once = runner.execute_model

        def twice(tokens: int) -> Tensor:
            once(tokens)
            return once(tokens)

        runner.execute_model = twice  # type: ignore[method-assign]

    check(made(Split), required=require_single_runs, spoil=repeated)


@pytest.mark.parametrize("spoil", [without_hooks, failing])
def test_where_runs_cannot_be_counted_nothing_is_refused_and_it_is_said(
    spoil: Callable[[Runner], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="vllm.trimtab"):
        check(made(Split), required=require_single_runs, spoil=spoil)
    assert "How often layers run was not measured" in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


def test_passes_are_few() -> None:
    runner = check([Whole(seed) for seed in range(LAYERS)])
    assert runner.passes == 6  # of four sites, three rows fit at once


def test_a_pass_is_no_longer_than_the_engine_can_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="vllm.trimtab"):
        check(made(Split), batched_tokens=2)
    assert not caplog.records


def test_the_bound_follows_the_rounding_of_the_stream() -> None:
    assert tolerance(torch.float32) < tolerance(torch.float16) < tolerance(torch.bfloat16) < 0.055
