"""Microseconds per layer that gates add to a compiled stack: none in use, and in use by every token.

    PYTHONPATH=src python3 benchmarks/gates.py --json benchmarks/results/gates.json

The stack is that of `ops.py` (matmul, residual add, steering, RMSNorm; 8 layers), compiled, replayed as a CUDA graph.
The probe is read at one layer (the first), as an engine with one probe site does, and at every layer for comparison.
Each token of the batch has its own row, and its own probe where gates are in use.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_timing import captured, machine, microseconds
from trimtab.ops import ROWS_ONLY, Emission, SteeringBuffers, emit, set_emission
from trimtab.sites import HookPoint, Site

LAYERS, PROBES = 8, 257
POST = HookPoint.POST_BLOCK
DTYPE = torch.bfloat16


class Stack(nn.Module):
    """What a decoder with a split stream does around a site: matmul, residual add, RMSNorm."""

    def __init__(self, width: int, buffers: SteeringBuffers | None, probing: range) -> None:
        super().__init__()
        weights = torch.randn(LAYERS, width, width, device="cuda", dtype=DTYPE) / width**0.5
        self.weights = nn.ParameterList([*weights])
        self.norm = nn.Parameter(torch.ones(width, device="cuda", dtype=DTYPE))
        self.sites = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        for number, module in enumerate(self.sites) if buffers is not None else ():
            assert buffers is not None
            buffers.attach(module, buffers.sites[number])
            set_emission(module, Emission(traced=True, terms=ROWS_ONLY, probing=number in probing))

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for weight, site in zip(self.weights, self.sites, strict=True):
            stream = hidden.float() + residual.float()
            residual = stream.to(DTYPE)
            hidden = (stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)).to(DTYPE) * self.norm
            hidden = hidden @ weight
            residual = emit(site, POST, residual, rest=hidden)
        return hidden, residual


def buffers(width: int, tokens: int, gates: int) -> SteeringBuffers:
    """Eight sites; every token on a plain row of its own, no gate in use."""
    rows = min(tokens, 256)
    made = SteeringBuffers(
        [Site(layer, POST) for layer in range(LAYERS)], hidden_size=width, max_rows=1 + rows, max_tokens=tokens,
        dtype=DTYPE, device="cuda", gates=gates, max_probes=PROBES,
    )  # fmt: skip
    made.table[:, 1:].normal_(std=1e-2)
    made.any_active.fill_(True)
    made.index.copy_(1 + torch.arange(tokens, device="cuda") % rows)
    if made.gates is not None:
        made.gates.probe_table[1:].normal_(std=width**-0.5)
    return made


def use_gates(made: SteeringBuffers, used: int) -> None:
    """Give each token `used` gates: rows of their own, probes of their own at the first site."""
    state = made.gates
    assert state is not None
    tokens, rows = len(made.token_slab), made.table.shape[1] - 1
    number = torch.arange(tokens, device="cuda")
    for slot in range(used):
        state.rows[:, slot] = 1 + (number + 1 + slot) % rows
        state.probes[:, slot] = 1 + ((number + 64 * slot) % (PROBES - 1)).int()
        state.sites[:, slot] = 1
        state.params[:, slot] = torch.tensor([0.5, 0.1, 2.0, 0.0], device="cuda")


@torch.no_grad()
def measure(width: int, tokens: int) -> dict[str, Any]:
    """One record: microseconds per layer of each variant."""
    hidden, residual = (torch.randn(tokens, width, device="cuda", dtype=DTYPE) for _ in range(2))
    graphs, kept = {}, []
    variants = [("stock", None, 0, range(0)), ("rows", 0, 0, range(0))]
    for gates in (1, 4):
        variants += [(f"G={gates}, none used", gates, 0, range(1)), (f"G={gates}, all used", gates, gates, range(1))]
        variants += [(f"G={gates}, none used, every layer probing", gates, 0, range(LAYERS))]
    for name, gates, used, probing in variants:
        made = None if gates is None else buffers(width, tokens, gates)
        if made is not None and used:
            use_gates(made, used)
        torch._dynamo.reset()
        model = torch.compile(Stack(width, made, probing), fullgraph=True)
        model(hidden, residual)
        graphs[name] = captured(lambda m=model: m(hidden, residual))
        kept.append((made, model))
    return {"H": width, "N": tokens} | microseconds(graphs, LAYERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 2048])
    options = parser.parse_args()
    records = [measure(width, tokens) for width in options.widths for tokens in options.tokens]
    for record in records:
        base = record["rows"]
        print(
            f"H={record['H']} N={record['N']}: stock {record['stock']:.2f}, rows {base - record['stock']:+.2f} us/layer"
        )
        for name, value in record.items():
            if name.startswith("G="):
                print(f"    {name}: {value - base:+.2f} us/layer over rows")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
