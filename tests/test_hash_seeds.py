"""What processes must agree on does not depend on the order in which one of them iterates its sets."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from trimtab.errors import SteeringError
from trimtab.program.codec import decode, encode
from trimtab.program.lowering import contents_of
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.serving.binding import least_share
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.vectors import Probe, SteeringVector

WIDTH, LAYERS = 4, 6
SITES = frozenset(Site(layer, hook) for layer in range(LAYERS) for hook in HookPoint)
MODEL = ModelSites(WIDTH, LAYERS, SITES, GateLimits(4, SITES, stages=(3,)))
SLOTTED = replace(MODEL, slots=SlotLimits(4, SITES, frozenset({"ablate", "clamp", "scale", "swap"})))
FEWER = replace(MODEL, slots=SlotLimits(4, frozenset(sorted(SITES)[:20]), frozenset({"ablate", "clamp"})))
NARROW = ModelSites(WIDTH, LAYERS, frozenset(site for site in SITES if site.layer < 2), GateLimits(4, SITES))


def vector(seed: int) -> SteeringVector:
    rng = np.random.default_rng(seed)
    return SteeringVector({site: rng.standard_normal(WIDTH) for site in sorted(SITES)[seed::3]})


VECTORS = {f"v{seed}": vector(seed) for seed in range(3)}
PROBES = {name: Probe.at(Site(0, HookPoint.PRE_ATTN), [1.0, 2.0, seed, 0.5]) for seed, name in enumerate("abcd")}
MONITOR = ResolvedGate.of(Probe.at(Site(2, HookPoint.MLP_IN), [1.0, 0.0, -1.0, 0.0]).vector, 0.5, 2.0)


def spec(*seeds: int, **more: Any) -> Steering:
    steps = [{"kind": "add", "vector": f"v{seed % 3}", "scale": 1.0 + seed, **more} for seed in seeds]
    for step, name in zip(steps[::2], "dacb", strict=False):
        step |= {"layers": [0, 2], "phase": "decode", "gate": {"probe": name, "threshold": 0.25}}
    return Steering.parse({"interventions": steps})


def slotted(*more: dict[str, Any]) -> Steering:
    gate = {"probe": "c", "threshold": 0.5}
    steps = [
        {"kind": "ablate", "vector": "v0", "layers": [0, 2], "gate": gate},
        {"kind": "clamp", "vector": "v1", "min": 1},
        {"kind": "clamp", "vector": vector(1) * -2.0, "max": 3},
        {"kind": "clamp", "vector": "v2", "max": 2},
    ]
    return Steering.parse({"interventions": [*steps, {"kind": "add", "vector": "v2"}, *more]})


def told() -> dict[str, Any]:
    """Everything that two processes are to agree on, as JSON."""
    steering = spec(4, 1, 3, 2, 0, 5, 7)
    resolved = steering.resolve(VECTORS, MODEL, PROBES)
    found: dict[str, Any] = {"set": [str(site) for site in SITES]}
    turned = SteeringVector.from_block(VECTORS["v0"].sites, VECTORS["v0"].block[:, ::-1])
    slots = slotted({"kind": "swap", "vector": "v0", "to": turned}).resolve(VECTORS, SLOTTED, PROBES)
    programs = {"plain": resolved, "monitored": behind(resolved, MONITOR)}
    programs |= {"slots": slots, "monitored slots": behind(slots, MONITOR)}
    for name, one in programs.items():
        wire = msgspec.msgpack.encode(encode(one))
        by_digest = {v.digest: v for v in (*VECTORS.values(), *(probe.vector for probe in PROBES.values()))}
        back = decode(msgspec.msgpack.decode(wire), by_digest)
        rows = [total.row(total.sites).tobytes().hex() for phase in Phase
                for total in (back.program(phase), *(item.total for item in back.program(phase).gated))
                if total.row_key]  # fmt: skip
        found[name] = {
            "identity": [back.identity(phase) for phase in Phase],
            "sites": list(map(str, back.sites)),
            "gates": [gate.digest.hex() for gate in back.gates],
            "wire": wire.hex(),
            "rows": rows,
            "held": sorted(key.hex() for key in contents_of(back, lowers=True).rows),
            "lanes": [program.lanes for program in back.programs],
        }
    share = least_share(resolved, spec(1, 2, 3).resolve(VECTORS, MODEL, PROBES))
    assert share is not None
    found["share"] = [share.left, share.phase, str(share.site)]
    clash = slotted({"kind": "scale", "vector": "v1", "factor": 2}, {"kind": "ablate", "vector": "v0"})
    for asked, model in (
        (steering, NARROW), (steering, ModelSites(WIDTH, LAYERS, SITES, GateLimits(2, SITES))), (clash, SLOTTED),
        (clash, FEWER), (slotted(), FEWER),
    ):  # fmt: skip
        try:
            found["refused"] = asked.resolve(VECTORS, model, PROBES)
        except SteeringError as error:
            found.setdefault("errors", []).append(str(error))
    return found


def test_processes_resolve_name_send_and_judge_a_spec_alike() -> None:
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        code = "import json, test_hash_seeds; print(json.dumps(test_hash_seeds.told()))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert found[0].pop("set") != found[1].pop("set")  # else nothing was tried
    assert found[0] == found[1]
    assert len(found[0]["errors"]) == 5
