"""What an engine's worker warms before it captures graphs: all that its layers will launch, and it is counted."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from kernel_recorders import Recorders

from trimtab.engines.vllm.patches.patching import put_on
from trimtab.engines.vllm.patches.worker import WORKER
from trimtab.engines.vllm.worker import worker as worker_module
from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.warmup import require_warm, warm_up_kernels
from trimtab.errors import SteeringError
from trimtab.ops import ROWS_ONLY, Emission, SlotForm, SteeringBuffers, emit, set_emission
from trimtab.ops.warmup import late_variants, warmed_launches
from trimtab.sites import HookPoint, Site

POST = HookPoint.POST_BLOCK
SITES = [Site(layer, POST) for layer in range(3)]
WIDTH = 64
CAPTURED = [1, 2, 4, 8]
LONGEST = 32
SIZES = 7  # the captured ones, 16, 17 and the longest
CONFIG = SimpleNamespace(
    compilation_config=SimpleNamespace(cudagraph_capture_sizes=CAPTURED),
    scheduler_config=SimpleNamespace(max_num_batched_tokens=LONGEST),
)


def attached(
    dtype: torch.dtype = torch.bfloat16, *, row_monitor: bool = False, responses: tuple[str, ...] = ("clip",)
) -> Attachment:
    """Three layers; probes of gates are read at layer 1, and there rows may have probes."""
    buffers = SteeringBuffers(
        SITES, hidden_size=WIDTH, max_rows=5, max_tokens=LONGEST, dtype=dtype, gates=2, max_probes=3,
        probe_sites={SITES[1]}, row_monitor={SITES[1]} if row_monitor else False,
        slots=SlotForm(2, responses, writes=False), slot_sites=SITES[1:],
    )  # fmt: skip
    terms = ROWS_ONLY._replace(row_monitor=row_monitor)
    modules: dict[Site, nn.Module] = {}
    for site in SITES:
        modules[site] = nn.Module()
        buffers.attach(modules[site], site)
        set_emission(modules[site], Emission(terms=terms))
    return Attachment(buffers, modules, (SITES[1],))


def serve(attachment: Attachment, dtype: torch.dtype) -> None:
    """Layers that keep the stream in one part and in two, steered in place and not, at every captured size."""
    for tokens in (*CAPTURED, LONGEST):
        for module in attachment.modules.values():
            for rest in (None, torch.zeros(tokens, WIDTH, dtype=dtype)):
                for in_place in (False, True):
                    emit(module, POST, torch.zeros(tokens, WIDTH, dtype=dtype), rest=rest, in_place=in_place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_warm_engine_compiles_nothing_in_service(kernels: Recorders, dtype: torch.dtype) -> None:
    attachment, late = attached(dtype), late_variants()
    warm_up_kernels(CONFIG, attachment)
    keys = kernels.keys
    serve(attachment, dtype)
    assert kernels.keys == keys
    assert late_variants() == late
    assert [bool(launched) for launched in keys] == [
        True,
        False,
        True,
        True,
    ]  # no engine uses the site monitor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_with_the_row_monitor_nothing_is_compiled_late_whether_a_row_has_a_probe_or_none(
    kernels: Recorders, dtype: torch.dtype
) -> None:
    attachment, late = attached(dtype, row_monitor=True), late_variants()
    warm_up_kernels(CONFIG, attachment)
    keys = kernels.keys
    for monitored in (False, True):
        attachment.buffers.row_monitor_active[1] = monitored
        launched = len(kernels.apply.launches)
        serve(attachment, dtype)
        scored = [launch for launch in kernels.apply.launches[launched:] if launch["ROW_MONITOR"]]
        assert {launch["p_hidden_states"].dtype for launch in scored} == {dtype, torch.float32}  # one part, and two
    assert kernels.keys == keys
    assert late_variants() == late


@pytest.mark.parametrize("row_monitor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_where_slots_look_back_what_is_steered_in_float32_is_warm_too(
    kernels: Recorders, dtype: torch.dtype, row_monitor: bool
) -> None:
    attachment = attached(dtype, row_monitor=row_monitor, responses=("clip", "replace"))
    late = late_variants()
    warm_up_kernels(CONFIG, attachment)
    keys, launched = kernels.keys, len(kernels.slots.launches)
    serve(attachment, dtype)
    assert kernels.keys == keys
    assert late_variants() == late
    served = kernels.slots.launches[launched:]
    assert {(launch["p_steered"].dtype, launch["p_hidden_states"].dtype) for launch in served} == {
        (torch.float32, dtype)
    }
    written = {launch["p_out"].dtype for launch in kernels.apply.launches}
    assert written == {dtype, torch.float32}  # slots act at two of the layers


def test_what_was_warmed_is_a_number(kernels: Recorders) -> None:
    attachment = attached()
    assert warmed_launches(attachment.modules.values()) == {}
    warm_up_kernels(CONFIG, attachment)
    assert warmed_launches(attachment.modules.values()) == {
        "apply_gates_kernel": 2 * SIZES * 4,  # from layer 1 on; adding and only deciding, one part and two
        "apply_slots_kernel": 2 * SIZES * 2,  # where slots can act; one part and two
        "apply_steering_kernel": 3 * SIZES * 2,  # out of place and in place
    }


def test_the_row_monitor_is_warmed_for_a_stream_in_two_parts_too(kernels: Recorders) -> None:
    attachment = attached(row_monitor=True)
    warm_up_kernels(CONFIG, attachment)
    assert warmed_launches(attachment.modules.values())["apply_steering_kernel"] == 3 * SIZES * 2 + 1 * SIZES


def test_an_engine_that_is_not_warm_does_not_start(kernels: Recorders) -> None:
    attachment = attached()
    with pytest.raises(SteeringError, match="kernels of post_block:0, post_block:1, post_block:2 were not warmed"):
        require_warm(attachment)
    warm_up_kernels(CONFIG, attachment)
    require_warm(attachment)


@pytest.mark.parametrize(("kernel", "layer"), [("apply_gates_kernel", 1), ("apply_slots_kernel", 2)])
def test_a_kernel_that_was_left_out_of_warm_up_is_noticed(kernels: Recorders, kernel: str, layer: int) -> None:
    attachment = attached()
    warm_up_kernels(CONFIG, attachment)
    del attachment.buffers.states[layer].warmed[kernel]
    with pytest.raises(SteeringError, match=f"kernels of post_block:{layer} were not warmed"):
        require_warm(attachment)


def kept(attachment: Any) -> worker_module.WorkerSteering:
    return worker_module.WorkerSteering(SimpleNamespace(start_monitor=None), attachment, None, None)  # type: ignore[arg-type]


def test_the_worker_warms_before_it_captures(kernels: Recorders, monkeypatch: pytest.MonkeyPatch) -> None:
    attachment, calls = attached(), []

    def capture() -> str:
        calls.append(sum(warmed_launches(attachment.modules.values()).values()))
        return "captured"

    worker: Any = SimpleNamespace(
        vllm_config=CONFIG, model_runner=object(), compile_or_warm_up_model=capture, _trimtab=kept(attachment)
    )
    monkeypatch.setattr(worker_module, "require_live_sites", lambda *args: calls.append("checked"))
    monkeypatch.setattr(worker_module, "require_live_slots", lambda *args: calls.append("slots checked"))
    put_on(worker, WORKER, worker)
    assert worker.compile_or_warm_up_model() == "captured"
    assert calls == [126, "checked", "slots checked"]

    monkeypatch.setattr(worker_module, "warm_up_kernels", lambda *args: None)
    worker._trimtab = kept(attached())
    with pytest.raises(SteeringError, match="not warmed"):
        worker.compile_or_warm_up_model()
