"""What tokens come to behind one spec of each kind, beside the identities of these specs, as `outcomes.json` has them.

State on disk outlives a release and is found by identity, so arithmetic that changes must change identities. They hold
numbers for that, which nothing but a person raises: `CONSTANTS` says which. To record what is meant to be:

    PYTHONPATH=src:tests python tests/outcomes.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kinds_cases import MODEL, H
from trimtab.ops import ROWS_ONLY, Emission, SlotForm, SteeringBuffers, emit, set_emission
from trimtab.program import ResolvedSteering
from trimtab.responses import RESPONSES
from trimtab.runtime import SteeringRuntime
from trimtab.sites import HookPoint, Phase, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector, VectorMetadata

RECORDED = Path(__file__).with_suffix(".json")
SITES = (Site(1, HookPoint.PRE_ATTN), Site(1, HookPoint.POST_ATTN), Site(1, HookPoint.POST_BLOCK))
TOKENS = 3  # of each phase
CLOSE = 1e-5  # orders of float32 sums differ by less, and changes of arithmetic by more

CONSTANTS = {
    "added": ('b"trimtab program 2\\0"', "program/programs.py"),
    "slots": ('b"trimtab slot 1\\0"', "program/slots.py"),
    "gates": ('b"trimtab gate 1\\0"', "program/resolved_gate.py"),
    "joint gates": ('f"trimtab joint gate 1\\0', "program/joint_gate.py"),
}
"""What is to be raised where tokens come out otherwise behind specs of a group, and where below `src/trimtab`."""


def row(seed: int, length: float = 1.0) -> list[float]:
    """H numbers of three decimals, by a formula: no generator's stream lasts as long as state on a disk."""
    return [round(length * float(np.sin(seed + 1.7 * place * (1 + seed % 3))), 3) for place in range(H)]


def at(seed: int, *sites: Site, length: float = 1.0) -> dict[str, Any]:
    """An inline vector: other numbers at each site."""
    chosen = sites or SITES
    hooks = {site.hook.value: {str(site.layer): row(seed + 10 * index, length)} for index, site in enumerate(chosen)}
    assert len(hooks) == len(chosen)
    return hooks


def dosed() -> SteeringVector:
    extra = {f"stream_norm.{site.hook.value}.{site.layer}": str(3.0 + number) for number, site in enumerate(SITES)}
    rows = {site: np.array(row(5 + number), np.float32) for number, site in enumerate(SITES)}
    return SteeringVector(rows, VectorMetadata(extra=extra))


SOFT = {"probe": at(21, SITES[0]), "threshold": 0.25, "sharpness": 1.5}
HARD = {"probe": at(22, SITES[0]), "threshold": 0.5, "hard": True}
ADD = {"kind": "add", "vector": at(1), "scale": 1.25}
ABLATE = {"kind": "ablate", "vector": at(2), "strength": 0.75}
FEATURE = {"kind": "feature", "encoder": at(3, SITES[1]), "decoder": at(4, SITES[1]), "bias": 0.25}

STEPS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "added": {
        "add": [ADD],
        "a sum": [ADD, {"kind": "add", "vector": at(6), "scale": -0.5}],
        "in each phase": [ADD | {"phase": "prefill"}, {"kind": "add", "vector": at(6), "phase": "decode"}],
        "dose": [{"kind": "add", "vector": dosed(), "scale": 0.3, "unit": "dose"}],
    },
    "slots": {
        "norm": [{"kind": "add", "vector": at(1), "scale": 0.4, "unit": "norm"}],
        "ablate": [ABLATE],
        "clamp": [{"kind": "clamp", "vector": at(2), "min": -0.5, "max": 1.0, "strength": 0.8}],
        "scale": [{"kind": "scale", "vector": at(2), "factor": 2.5}],
        "swap": [{"kind": "swap", "vector": at(2), "to": at(7)}],
        "rotate by": [{"kind": "rotate", "vector": at(2), "plane": at(7), "by": 40.0}],
        "rotate to": [{"kind": "rotate", "vector": at(2), "plane": at(7), "to": 40.0, "adaptive": True}],
        "lowrank": [{"kind": "lowrank", "read": [at(2), at(7)], "write": [at(8), at(9)], "bias": [0.5, -1.0]}],
        "feature": [FEATURE | {"architecture": "relu", "scale": 2.0, "add": 0.5, "max": 6.0}],
        "feature set": [FEATURE | {"architecture": "jumprelu", "threshold": 0.75, "set": 3.0, "only_if_active": True}],
        "gated feature": [
            FEATURE | {"architecture": "gated", "gate_bias": 0.5, "gain": 1.5, "scale": 0.5},
        ],
        "replace": [{"kind": "replace", "vector": at(8), "amount": 0.6}],
        "a set": [ABLATE, {"kind": "clamp", "vector": at(7), "value": 2.0}, ADD],
        "keep_norm": [ADD],
        "keep_norm if grown": [ADD, ABLATE],
        "all at once": [
            {"kind": "replace", "vector": at(8), "amount": 0.6},
            ADD,
            ABLATE,
            {"kind": "swap", "vector": at(3), "to": at(7)},
            {"kind": "rotate", "vector": at(4), "plane": at(9), "by": 15.0},
        ],
    },
    "gates": {
        "soft": [ADD | {"gate": SOFT}],
        "hard": [ADD | {"gate": HARD}],
        "inverted": [ADD | {"gate": SOFT | {"invert": True}}],
        "before a slot": [ABLATE | {"gate": SOFT}],
        "two": [ADD | {"gate": SOFT}, ABLATE | {"gate": HARD}],
    },
    "joint gates": {
        "all": [ADD | {"gate": {"all": [SOFT, HARD]}}],
        "any": [ABLATE | {"gate": {"any": [SOFT, HARD]}}],
    },
}

MORE = {"keep_norm": {"keep_norm": True}, "keep_norm if grown": {"keep_norm": "if_grown"}}


def resolved(group: str, case: str) -> ResolvedSteering:
    return Steering.parse({"interventions": STEPS[group][case], **MORE.get(case, {})}).resolve({}, MODEL)


def identities(steering: ResolvedSteering) -> dict[str, str]:
    return {phase.value: steering.identity(phase) for phase in Phase}


def outcomes(steering: ResolvedSteering) -> np.ndarray:
    """Float64 [tokens, H]: streams behind all sites, by the operators' reference in float32, prompt first."""
    form = SlotForm(8, tuple(RESPONSES), True)
    buffers = SteeringBuffers(
        SITES, hidden_size=H, max_rows=40, max_tokens=TOKENS, dtype=torch.float32, slots=form, gates=4, max_probes=8
    )
    modules = []
    for site in SITES:
        modules.append(nn.Module())
        buffers.attach(modules[-1], site)
        set_emission(modules[-1], Emission(terms=ROWS_ONLY))
    runtime = SteeringRuntime(buffers, max_requests=1)
    runtime.admit("one", steering)
    left = []
    for first in (0, TOKENS):
        runtime.step(["one"], np.array([first]), np.array([TOKENS]), np.array([TOKENS]))
        stream = torch.tensor([row(31 + first + token, 4.0) for token in range(TOKENS)])
        for site, module in zip(SITES, modules, strict=True):
            stream = emit(module, site.hook, stream)
        left.append(stream.double().numpy())
    return np.concatenate(left)


def record() -> None:
    """Write what this code makes of every case."""
    told = {}
    for group, cases in STEPS.items():
        for case in cases:
            steering = resolved(group, case)
            rows = [[float(f"{number:.7g}") for number in token] for token in outcomes(steering)]
            told[case] = {"identity": identities(steering), "tokens": rows}
    RECORDED.write_text(json.dumps(told, indent=1).replace("\n    ", " ").replace("\n   ]", "]") + "\n")


if __name__ == "__main__":
    record()
