"""Timing of GPU work inside CUDA graphs: what `ops.py` measures with."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph, run twice before capture so that everything is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def microseconds(
    graphs: Mapping[str, torch.cuda.CUDAGraph], calls: int, *, rounds: int = 7, budget_ms: float = 1.5
) -> dict[str, float]:
    """Microseconds per call of each graph of `calls` calls: the median of rounds in which all take turns."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    repeats = {name: max(2, int(budget_ms / max(_elapsed_ms(graph, 3) / 3, 1e-3))) for name, graph in graphs.items()}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(1e3 * _elapsed_ms(graph, repeats[name]) / repeats[name] / calls)
    return {name: statistics.median(values) for name, values in samples.items()}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def _elapsed_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
