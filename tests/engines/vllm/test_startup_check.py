"""The start-up check on a runner that stands in for vLLM's: a pipeline stage that adds to its input in place."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from response_formulas import FORMULAS
from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.response_check import CASES
from trimtab.engines.vllm.worker.slot_check import require_live_slots
from trimtab.engines.vllm.worker.startup_check import require_live_sites
from trimtab.errors import SteeringError
from trimtab.ops import Emission, SlotForm, SteeringBuffers, set_emission
from trimtab.ops.emit import emit
from trimtab.responses import RESPONSES, Stage
from trimtab.sites import HookPoint, Site

WIDTH, MOST = 16, 8
SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in (2, 3)]


class Runner:
    """A stage whose layers add to the stream where it lies, as fused norms do on a GPU, and that ends in a norm."""

    def __init__(self, layers: list[nn.Module], first: bool, deaf: bool) -> None:
        with torch.inference_mode():
            residual, embeddings = torch.zeros(2, MOST, WIDTH, dtype=layers[0].steering_table_post_block.dtype)
        self.intermediate_tensors = None if first else SimpleNamespace(tensors={"residual": residual})
        self.inputs_embeds = SimpleNamespace(gpu=embeddings)
        self.supports_mm_inputs = self.is_first_pp_rank = first
        self.model_state = SimpleNamespace(dummy_inputs_embeds=lambda tokens: embeddings[:tokens])
        self._layers, self._deaf = layers, deaf
        self._start = torch.linspace(-1, 2, WIDTH).to(embeddings.dtype)

    def model(self, stream: Tensor) -> Tensor:
        stream += self._start
        for layer in self._layers:
            steered = emit(layer, HookPoint.POST_BLOCK, stream)
            stream.copy_(stream if self._deaf and layer is self._layers[-1] else steered)
            stream += 0.1 * torch.tanh(stream.flip(-1))
        return stream / (1 + stream.norm(dim=-1, keepdim=True))

    def get_model(self) -> nn.Module:
        return nn.ModuleList(self._layers)

    def execute_model(self, tokens: int) -> Tensor:
        received = self.intermediate_tensors
        return self.model((self.inputs_embeds.gpu if received is None else received.tensors["residual"])[:tokens])

    @torch.inference_mode()
    def _dummy_run(self, tokens: int, **options: Any) -> tuple[Tensor]:
        return (self.execute_model(tokens),)


def attached(buffers: SteeringBuffers) -> list[nn.Module]:
    layers = [nn.Module() for _ in SITES]
    for layer, site in zip(layers, SITES, strict=True):
        buffers.attach(layer, site)
        set_emission(layer, Emission(eager=True))
    return layers


def worker_of(layers: list[nn.Module], first: bool = False, deaf: bool = False) -> Any:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MOST))
    return SimpleNamespace(model_runner=Runner(layers, first, deaf), vllm_config=config)


def check(v2: bool, first: bool = False, deaf: bool = False, unmonitored: bool = False) -> None:
    buffers = SteeringBuffers(
        SITES, hidden_size=WIDTH, max_rows=4, max_tokens=MOST, dtype=torch.float32, gates=2, max_probes=3,
        probe_sites=SITES[:1], row_monitor=SITES[:1],
    )  # fmt: skip
    layers = attached(buffers)
    if unmonitored:  # as a graph without the term, or with a flag of its own
        layers[0].register_buffer("steering_table_post_block_monitor_row_active", torch.zeros(1, dtype=torch.bool))
    before = [tensor.clone() for layer in layers for tensor in layer.buffers()]
    for state in buffers.states:
        state.resting = True  # as after a warm-up that ran real steps
    worker = worker_of(layers, first, deaf)
    require_live_sites(worker, Attachment(buffers, dict(zip(SITES, layers, strict=True)), tuple(SITES[:1])), v2)
    assert all(state.resting for state in buffers.states)
    for old, new in zip(before, (tensor for layer in layers for tensor in layer.buffers()), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["later stage", "first stage, given embeddings"])
def test_what_a_run_leaves_in_its_input_does_not_hide_the_next_canary(v2: bool, first: bool) -> None:
    check(v2, first)


@pytest.mark.parametrize("v2", [False, True])
def test_a_site_whose_result_the_stage_drops_is_named(v2: bool) -> None:
    with pytest.raises(SteeringError, match="no effect at post_block:3"):
        check(v2, deaf=True)


@pytest.mark.parametrize("v2", [False, True])
def test_a_site_at_which_a_rows_probe_does_nothing_is_named(v2: bool) -> None:
    with pytest.raises(SteeringError, match=r"steering\.row_monitor: a row's probe has no effect at post_block:2"):
        check(v2, unmonitored=True)


def test_an_engine_that_does_not_join_gates_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("trimtab.ops.emit")
    original = module.gate_op_args

    def alone(*given: Any) -> Any:
        args = original(*given)
        return args._replace(gate_params=args.gate_params * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))

    monkeypatch.setattr(module, "gate_op_args", alone)
    with pytest.raises(
        SteeringError, match=r"steering\.gates: steering behind an open gate has no effect at post_block:3"
    ):
        check(v2=False)


SLOTTED = SlotForm(2, ("clip",), True)
EVERY = SLOTTED._replace(responses=tuple(RESPONSES))
LOOKING_BACK = SLOTTED._replace(responses=("clip", "replace", "norm", "keep_norm"))


def break_slots(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Spoil what a site makes of its slots, in one of the ways in which a graph may be wrong."""
    module = importlib.import_module("trimtab.ops.emit")
    original = module.slot_op_args

    def spoilt(layer: nn.Module, hook: HookPoint, steered: Tensor, *streams: Tensor | None) -> Any:
        args = original(layer, hook, steered, *streams)
        if fault == "none":
            return args._replace(slot_rows=torch.zeros_like(args.slot_rows))
        if fault == "second slot":
            return args._replace(slot_mix=args.slot_mix * torch.tensor([[1.0], [0.0]]))
        if fault == "reads nothing":
            return args._replace(slot_params=args.slot_params * (torch.arange(args.slot_params.shape[-1]) > 0))
        return args._replace(slot_codes=args.slot_codes * torch.tensor([1, 0], dtype=torch.int32))  # no gates

    monkeypatch.setattr(module, "slot_op_args", spoilt)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("gates", [0, 2])
def test_an_engine_whose_slots_act_starts_and_is_left_as_new(v2: bool, gates: int) -> None:
    check_slots(v2, gates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gates", [0, 2])
def test_where_slots_look_back_those_of_the_check_act_on_the_stream_that_is_not_rounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gates: int
) -> None:
    module, dtypes = importlib.import_module("trimtab.ops.emit"), set()
    original = module.slot_op_args

    def noted(layer: nn.Module, hook: HookPoint, steered: Tensor, *streams: Tensor | None) -> Any:
        dtypes.add(steered.dtype)
        return original(layer, hook, steered, *streams)

    monkeypatch.setattr(module, "slot_op_args", noted)
    check_slots(False, gates, LOOKING_BACK, dtype)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "a slot has no effect at post_block:2, post_block:3"),
        ("second slot", "a slot has no effect at post_block:3"),
        ("reads nothing", "a slot does not bring the stream to where it was asked at post_block:2, post_block:3"),
        ("no gates", "a shut gate of a slot has no effect at post_block:2, post_block:3"),
    ],
)
def test_an_engine_whose_slots_do_something_else_does_not_start(
    monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    break_slots(monkeypatch, fault)
    with pytest.raises(SteeringError, match=f"steering.slots: {said}: this engine would"):
        check_slots(False, 2)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("rows", [4, 9, 33])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_engine_that_has_every_response_starts(v2: bool, rows: int, count: int, dtype: torch.dtype) -> None:
    check_slots(v2, 0, EVERY._replace(count=count), dtype, rows)


def test_every_response_is_tried_and_what_it_is_to_make_is_what_the_formulas_say() -> None:
    assert {case.response.name for case in CASES} == RESPONSES.keys()
    for case in CASES:
        if case.response.stage is Stage.LOCAL:
            seen = [case.u, case.v][: 1 + case.response.sees_two]
            assert FORMULAS[case.response.name](*seen, *case.numbers) == case.c


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoilt", ["ignored", "twice", *(f"number {n}" for n in range(6)), "digits 1", "digits 2"])
@pytest.mark.parametrize("name", RESPONSES)
def test_an_engine_in_which_one_response_is_wrong_does_not_start_and_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, spoilt: str, dtype: torch.dtype
) -> None:
    response = RESPONSES[name]
    how, number = spoilt.split()[0], int(spoilt.split()[-1]) if " " in spoilt else 0
    if (
        (how == "number" and (number >= len(response.numbers) or name == "keep_norm"))
        or (how == "twice" and response.stage is Stage.LAST)
        or (how == "digits" and not response.reads_float32)
    ):
        return  # nothing to spoil
    module = importlib.import_module("trimtab.ops.emit")
    original = module.slot_op_args

    def wrong(*given: Any) -> Any:
        args = original(*given)
        mine = args.slot_codes[..., 0] == response.code
        if how == "ignored":
            codes = torch.where(mine[..., None], 31, args.slot_codes)
            return args._replace(slot_codes=codes, slot_mix=torch.where(mine[..., None], 0.0, args.slot_mix))
        if how == "twice":
            return args._replace(slot_mix=torch.where(mine[..., None], 2.0, 1.0) * args.slot_mix)
        if how == "digits":
            rows = args.slot_rows.clone()
            rows[..., 1 + number][mine] = 0
            return args._replace(slot_rows=rows)
        params = args.slot_params.clone()
        params[..., 2 + number][mine] = 0.0
        return args._replace(slot_params=params)

    monkeypatch.setattr(module, "slot_op_args", wrong)
    said = f"a response of slots does not do what it should: {name} at post_block:3. This engine"
    if name == "clip":  # which other checks use, too
        said = f"a slot (has no effect|does not bring the stream to where it was asked) at|{said}"
    with pytest.raises(SteeringError, match=f"steering.slots: ({said})"):
        check_slots(False, 0, EVERY, dtype, 33)


def check_slots(
    v2: bool, gates: int, form: SlotForm = SLOTTED, dtype: torch.dtype = torch.float32, rows: int = 5
) -> None:
    buffers = SteeringBuffers(
        SITES, hidden_size=WIDTH, max_rows=rows, max_tokens=MOST, dtype=dtype, gates=gates, max_probes=3,
        probe_sites=SITES[:1], slots=form,
    )  # fmt: skip
    layers = attached(buffers)
    before = [tensor.clone() for layer in layers for tensor in layer.buffers()]
    probed = tuple(SITES[:1] if gates else ())
    require_live_slots(worker_of(layers), Attachment(buffers, dict(zip(SITES, layers, strict=True)), probed), v2)
    for old, new in zip(before, (tensor for layer in layers for tensor in layer.buffers()), strict=True):
        assert torch.equal(old, new)
