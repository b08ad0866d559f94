"""What a steered engine refuses at start, and what it refuses of requests that came around the front end."""

import importlib
import traceback

import torch

from support import HIDDEN, SCRATCH, engine, generate, random_prompts, random_spec, report, tiny_model
from trimtab.engines.vllm.carried import MARK
from trimtab.ops.gate_buffers import decides, gate_count
from trimtab.program.codec import encode


def main() -> None:
    folder, _ = tiny_model()
    cohere, _ = tiny_model("cohere")
    starts = {
        "hook point of another family": lambda: engine(cohere, steering={"hook_points": ["post_block", "post_attn"]}),
        "layer that does not exist": lambda: engine(folder, steering={"layers": "2-9"}),
        "setting that does not exist": lambda: engine(folder, steering={"layer": "2"}),
        "memory that is no memory": lambda: engine(folder, steering={"table_memory": "a lot"}),
        "scheduler of another kind": lambda: engine(folder, steering={}, scheduler_cls=_own_scheduler()),
        "missing vector file": lambda: engine(folder, steering={"vectors": {"calm": "/nowhere/calm.safetensors"}}),
        "unsupported mode": lambda: engine(folder, steering={}, cpu_offload_gb=1),
        "model that is not steered": lambda: _without_attaching(folder),
        "prefix cache that passes ours by": lambda: _without_keys(folder),
        "site without effect": lambda: _without_adding(folder),
        "layer that scales its stream": lambda: _scaling_inside(folder),
        "monitor without effect": lambda: _without_monitoring(folder),
        "gates without effect": lambda: _with_gates(folder, gate_count=lambda original: lambda module, hook: 0),
        "slots without effect": lambda: _with_slots(folder, slot_form=lambda original: lambda module, hook: None),
        "slots that read nothing": lambda: _with_slots(folder, slot_op_args=_blind),
        "gates that never shut": lambda: _with_gates(folder, gate_op_args=_open_all),
    }
    refused = {name: _refusal(start) for name, start in starts.items()}
    llm = engine(folder, steering=GATES)
    attached = llm.llm_engine.model_executor.driver_worker.worker._trimtab.attachment
    roles = {
        str(site): [gate_count(module, site.hook), decides(module, site.hook)]
        for site, module in attached.modules.items()
    }
    report({"refused": refused, "doors": _doors(llm), "gates": roles, "unconfigured": _unconfigured(folder)})


def _refusal(start):
    try:
        start()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "started"


def _own_scheduler():
    """A scheduler that may run requests without asking whether they have rows."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    class OwnScheduler(AsyncScheduler):
        def schedule(self, *args, **kwargs):
            return super().schedule(*args, **kwargs)

    return OwnScheduler


def _without_attaching(folder):
    """A worker that loads its model in a way that trimtab does not see."""
    from vllm.v1.worker.gpu_worker import Worker

    patched = Worker.load_model
    Worker.load_model = patched.__wrapped__
    try:
        return engine(folder, steering={})
    finally:
        Worker.load_model = patched


def _without_keys(folder):
    """An engine core whose block hasher is vLLM's own."""
    from vllm.v1.core import kv_cache_utils

    from trimtab.engines.vllm import plugin

    plugin.register()
    patched = kv_cache_utils.generate_block_hash_extra_keys
    kv_cache_utils.generate_block_hash_extra_keys = patched.__wrapped__
    try:
        return engine(folder, steering={}, enable_prefix_caching=True)
    finally:
        kv_cache_utils.generate_block_hash_extra_keys = patched


def _without_adding(folder):
    """A model that runs, but past the addition in layer 2, as one does that was compiled before it was steered."""
    from trimtab.engines.vllm.worker import layers

    original = layers.SteeredLayer.forward
    seen = []

    def forward(self, *args, **kwargs):
        seen.append(self) if self not in seen else None
        if seen.index(self) != 2:
            return original(self, *args, **kwargs)
        return super(layers.SteeredLayer, self).forward(*args, **kwargs)

    layers.SteeredLayer.forward = forward
    try:
        return engine(folder, steering={})
    finally:
        layers.SteeredLayer.forward = original


def _scaling_inside(folder):
    """A layer class that halves its stream where no reading of its source shows it, in layer 2 alone."""
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward

    def forward(self, positions, hidden_states, residual):
        def halved(stream):
            return stream.mul(0.5) if ".2." in self.self_attn.attn.layer_name else stream

        hidden_states, residual = original(self, positions, hidden_states, residual)
        return hidden_states, halved(residual)

    LlamaDecoderLayer.forward = forward
    try:
        return engine(folder, steering={})
    finally:
        LlamaDecoderLayer.forward = original


def _without_monitoring(folder):
    """A model that adds, but past its monitor, as one does that was compiled before there was one."""
    from trimtab import Probe
    from trimtab.sites import HookPoint, Site

    path = SCRATCH / "monitor.safetensors"
    Probe.at(Site(2, HookPoint.POST_BLOCK), [1.0] * HIDDEN).save(path)
    monitor = {"monitor": {"probe": str(path), "threshold": 0.0}}
    return _with_gates(folder, monitor, gate_count=lambda original: lambda module, hook: 0)


GATES = {"gates": 2, "probe_layers": [1]}


def _with_gates(folder, settings=GATES, **faults):
    """A model with gates of which some function of `emit` is not what it should be."""
    emit = importlib.import_module("trimtab.ops.emit")
    originals = {name: getattr(emit, name) for name in faults}
    for name, fault in faults.items():
        setattr(emit, name, fault(originals[name]))
    try:
        return engine(folder, steering=settings)
    finally:
        for name, original in originals.items():
            setattr(emit, name, original)


def _with_slots(folder, **faults):
    return _with_gates(folder, {"slots": 2, "slot_layers": "1-2", "kinds": ["clamp", "swap"]}, **faults)


def _blind(original):
    def slot_op_args(*args):
        given = original(*args)
        return given._replace(slot_params=given.slot_params * (torch.arange(given.slot_params.shape[-1]) > 0))

    return slot_op_args


def _open_all(original):
    def gate_op_args(*args):
        given = original(*args)
        threshold = given.gate_params[..., 1:2]
        return given._replace(gate_params=torch.cat([given.gate_params[..., :1], threshold * 0 - 1e30,
                                                     given.gate_params[..., 2:]], dim=-1))  # fmt: skip

    return gate_op_args


def _doors(llm):
    """Requests handed to the engine core as they are, as a producer would that bypasses the front end."""
    from vllm import SamplingParams

    core = llm.llm_engine.engine_core.engine_core
    good = random_spec(1, layers=[0])
    answers = {}
    for name, extra in (
        ("no mark", None),
        ("no mark, and a spec", {"steering": good}),
        ("a spec as users write it", {MARK: True, "steering": good}),
        ("nonsense", {MARK: True, "steering": 7}),
        ("a broken wire form", {MARK: True, "steering": _wire(good) | {"programs": [[[0, 1.0]]] * 2, "vectors": []}}),
        ("a wire form for a site that is not served", {MARK: True, "steering": _wire(good, "mlp_in")}),
        ("a wire form", {MARK: True, "steering": _wire(good)}),
    ):
        request = _engine_core_request(SamplingParams(max_tokens=2, extra_args=extra))
        answers[name] = _refusal(lambda request=request: core.preprocess_add_request(request))
    request = _engine_core_request(SamplingParams(max_tokens=1))  # as vLLM makes them for rejected transfers of KV
    answers["a request that ends at once"] = "started"
    if hasattr(request, "abort_immediately"):
        request.abort_immediately = True
        answers["a request that ends at once"] = _refusal(lambda: core.preprocess_add_request(request))
    request = _engine_core_request(SamplingParams(max_tokens=2, extra_args={MARK: True, "steering": _wire(good)}))
    admitted, _ = core.preprocess_add_request(request)
    carried = admitted.sampling_params.extra_args["steering"]
    return {
        "refused": answers,
        "carried keys": sorted(carried),
        "still answers": len(generate(llm, random_prompts([5]), [good])[0]),
    }


def _wire(spec, hook="post_block"):
    from trimtab import Steering
    from trimtab.sites import HookPoint, ModelSites, Site

    model = ModelSites(64, 4, frozenset({Site(0, HookPoint.POST_BLOCK)}))
    wire = encode(Steering.parse(spec).resolve({}, model))
    wire["vectors"][0]["sites"] = [[0, hook]]
    return wire


def _engine_core_request(params):
    import inspect

    from vllm.v1.engine import EngineCoreRequest

    known = {
        "request_id": "direct", "prompt_token_ids": [5, 6, 7], "mm_features": None, "sampling_params": params,
        "pooling_params": None, "arrival_time": 0.0, "lora_request": None, "cache_salt": None,
        "data_parallel_rank": None, "eos_token_id": None,
    }  # fmt: skip
    names = inspect.signature(EngineCoreRequest).parameters
    return EngineCoreRequest(**{name: value for name, value in known.items() if name in names})


def _unconfigured(folder):
    """An engine without steering, with trimtab installed."""
    from vllm import SamplingParams

    llm = engine(folder)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    layer = worker.model_runner.get_model().model.layers[0]
    core = llm.llm_engine.engine_core.engine_core
    request = _engine_core_request(SamplingParams(max_tokens=2, extra_args={"other": 1}))
    core.preprocess_add_request(request)
    return {
        "layer": type(layer).__module__,
        "buffers": [name for name, _ in layer.named_buffers() if "steering" in name],
        "wrapped": [name for name in ("_prepare_inputs", "_update_states") if name in worker.model_runner.__dict__],
        "answers": len(generate(llm, random_prompts([5]), [None])[0]),
    }


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        raise
