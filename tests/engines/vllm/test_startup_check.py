"""The start-up check on a runner that stands in for vLLM's: a pipeline stage that adds to its input in place."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.startup_check import require_live_sites
from trimtab.errors import SteeringError
from trimtab.ops import Emission, SteeringBuffers, set_emission
from trimtab.ops.emit import emit
from trimtab.sites import HookPoint, Site

WIDTH, MOST = 16, 8
SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in (2, 3)]


class Runner:
    """A stage whose layers add to the stream where it lies, as fused norms do on a GPU, and that ends in a norm."""

    def __init__(self, layers: list[nn.Module], first: bool, deaf: bool) -> None:
        with torch.inference_mode():
            residual, embeddings = torch.zeros(2, MOST, WIDTH)
        self.intermediate_tensors = None if first else SimpleNamespace(tensors={"residual": residual})
        self.inputs_embeds = SimpleNamespace(gpu=embeddings)
        self.supports_mm_inputs = self.is_first_pp_rank = first
        self.model_state = SimpleNamespace(dummy_inputs_embeds=lambda tokens: embeddings[:tokens])
        self._layers, self._deaf = layers, deaf

    def model(self, stream: Tensor) -> Tensor:
        for layer in self._layers:
            steered = emit(layer, HookPoint.POST_BLOCK, stream)
            stream.copy_(stream if self._deaf and layer is self._layers[-1] else steered)
            stream += 0.1 * torch.tanh(stream.flip(-1))
        return stream / (1 + stream.norm(dim=-1, keepdim=True))

    def execute_model(self, tokens: int) -> Tensor:
        received = self.intermediate_tensors
        return self.model((self.inputs_embeds.gpu if received is None else received.tensors["residual"])[:tokens])

    @torch.inference_mode()
    def _dummy_run(self, tokens: int, **options: Any) -> tuple[Tensor]:
        return (self.execute_model(tokens),)


def check(v2: bool, first: bool = False, deaf: bool = False, unmonitored: bool = False) -> None:
    buffers = SteeringBuffers(
        SITES, hidden_size=WIDTH, max_rows=4, max_tokens=MOST, dtype=torch.float32, gates=2, max_probes=3,
        probe_sites=SITES[:1], row_monitor=SITES[:1],
    )  # fmt: skip
    layers = [nn.Module() for _ in SITES]
    for layer, site in zip(layers, SITES, strict=True):
        buffers.attach(layer, site)
        set_emission(layer, Emission(eager=True))
    if unmonitored:  # as a graph without the term, or with a flag of its own
        layers[0].register_buffer("steering_table_post_block_monitor_row_active", torch.zeros(1, dtype=torch.bool))
    before = [tensor.clone() for layer in layers for tensor in layer.buffers()]
    for state in buffers.states:
        state.resting = True  # as after a warm-up that ran real steps
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MOST))
    worker = SimpleNamespace(model_runner=Runner(layers, first, deaf), vllm_config=config)
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
