"""`trimtab doctor` in a vLLM that has changed, or on engines that would be refused. Arguments: which."""

import contextlib
import io
import json
import sys
import traceback

from support import SCRATCH, report, tiny_model


def doctor(*arguments: str) -> dict:
    """Exit code, standard output as a whole, and as JSON."""
    from trimtab.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["doctor", *arguments, "--json"])
    return {"code": code, **json.loads(out.getvalue())}


def changed() -> dict:
    """Targets that are gone, take something else, or were there before us; a module that is gone; another version."""
    import vllm
    import vllm.v1.engine.core as core
    import vllm.v1.worker.gpu_model_runner as runner
    import vllm.v1.worker.worker_base as base

    del core.EngineCore.preprocess_add_request
    runner.GPUModelRunner._prepare_inputs = lambda self, something_else: None
    base.WorkerBase.trimtab_status = lambda self: "theirs"
    sys.modules["vllm.v1.engine.output_processor"] = None
    version = vllm.__version__
    vllm.__version__ = "0.40.1"
    try:
        return {"changed": doctor(), "theirs": base.WorkerBase.trimtab_status(None)}
    finally:
        vllm.__version__ = version


def flags() -> dict:
    """Engines of a tiny model, by the flags that they would be started with."""
    model, _ = tiny_model()
    default = SCRATCH / "default.json"
    default.write_text('{"interventions": [{"kind": "add", "vector": "nobody"}]}')
    connector = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    cases = {
        "none": [],
        "fine": ["--steering-layers", "0-2", "--enable-steering", "--port", "9000", "--tensor-parallel-size", "2"],
        "modes": ["--cpu-offload-gb", "1", "--kv-transfer-config", json.dumps(connector)],
        "modes and settings": ["--cpu-offload-gb", "1", "--steering-layers", "2-9"],
        "rows": ["--steering-max-rows", "2"],
        "slots": ["--steering-kinds", "clamp"],
        "a kind": ["--steering-slots", "1", "--steering-kinds", "clmap"],
        "a file": ["--steering-vectors", "calm=/nowhere.gguf"],
        "a default": ["--steering-default", str(default)],
        "a flag": ["--steering-colour", "red"],
        "a value": ["--steering-hook-points", "sideways"],
        "no steering": ["--max-model-len", "100000000"],
    }  # fmt: skip
    return {name: doctor("--model", model, *given) for name, given in cases.items()}


if __name__ == "__main__":
    try:
        report({"changed": changed, "flags": flags}[sys.argv[1]]())
    except Exception:
        traceback.print_exc()
        raise
