"""Runs another scenario on CUDA devices: `python on_gpu.py parity V2 graphs 48 [tp]`. Prints one line.

Arguments: scenario (parity, gates or monitor); runner (V1 or V2); eager, graphs (full CUDA graphs for decode) or
piecewise; number of requests; tp or pp for two ranks on two devices. The oracle stays on the CPU in float32, so
attention must multiply in float32 on the device too.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path


def main(scenario: str, runner: str, mode: str, requests: int, ranks: str = "") -> int:
    scratch = Path(tempfile.mkdtemp(prefix="trimtab-gpu-"))
    os.environ |= {
        "TRIMTAB_TEST_SCRATCH": str(scratch),
        "TRIMTAB_TEST_REPORT": str(scratch / "report.json"),
        "TRITON_F32_DEFAULT": "ieee",
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0",
    }
    import support

    support._COMMON.update(num_attention_heads=2, num_key_value_heads=1)  # kernels want heads of 32 values and more
    engine = support.engine

    def on_device(folder, *, mode="eager", **options):
        options = {"attention_config": {"backend": "TRITON_ATTN"}, "gpu_memory_utilization": 0.03, **options}
        if mode == "piecewise":
            options["compilation_config"] = {"mode": 3, "cudagraph_mode": "PIECEWISE"}
        return engine(folder, mode=mode, **options)

    support.engine = on_device
    module = importlib.import_module("parallel" if ranks and scenario == "parity" else scenario)
    module.engine = on_device
    if ranks:
        module.parallel(ranks, requests, mode)
    else:
        module.main(mode, requests)
    case = f"{scenario:7} {runner} {mode:9} {ranks and ranks + ' '}"
    return _told(case, json.loads((scratch / "report.json").read_text()))


def _told(case: str, outcome: dict) -> int:
    """Print what was found; 1 if an answer differed, a total is wrong or a kernel was compiled late."""
    compared = ("mixed", "unsteered", "again", "alone", "reloaded", "chunked", "preempted")
    compared += ("next turn", "pre_attn", "mlp_out", "slots", "slots again", "slots alone")
    found = {name: len(outcome[name]) for name in compared if name in outcome or name == "mixed"}
    counts = {name: outcome[name] for name in outcome if name.startswith("differs") or name.startswith("steered")}
    totals = "" if "totals" not in outcome else "right" if outcome["totals"] == outcome["tokens"] else "WRONG"
    statuses = [*outcome["status"], *outcome.get("slots status", [])]
    late = sum(rank["late_variants"] for rank in statuses)
    print(
        f"{case}answers that differ: {_plain(found)}; {_plain(counts) + '; ' if counts else ''}"
        f"preemptions {outcome.get('preemptions', '-')}; {totals and f'gate totals {totals}; '}"
        f"late variants {late}",
        flush=True,
    )
    return int(any(found.values()) or totals == "WRONG" or late > 0)


def _plain(numbers: dict) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4], int(sys.argv[4]), *sys.argv[5:]))
