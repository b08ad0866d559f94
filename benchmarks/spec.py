"""Host cost of a request's steering: reading, checking, naming and sending it.

    python benchmarks/spec.py

What slots come to "again" was done before with the same vectors, or with another strength of them; "its key" is all
that an engine takes of a form that it has read. A model of 32 layers of width 4096; times are the best of several
repeats of many calls: noise only ever adds.
"""

import base64
import json
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trimtab.program.codec import decode, encode
from trimtab.serving.memo import key_of
from trimtab.sites import HookPoint, ModelSites, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

HIDDEN, LAYERS = 4096, 32
SITES = frozenset(Site(layer, hook) for layer in range(LAYERS) for hook in HookPoint)
MODEL = ModelSites(HIDDEN, LAYERS, SITES, slots=SlotLimits(4, SITES, frozenset({"ablate"})))
SET = 4  # vectors that are ablated together


def inline(block: np.ndarray, dtype: str) -> dict[str, Any]:
    raw = {
        "float16": lambda: block.astype("<f2").tobytes(),
        "float32": lambda: block.astype("<f4").tobytes(),
        "bfloat16": lambda: (block.view(np.uint32) >> 16).astype("<u2").tobytes(),
    }[dtype]()
    data = base64.b64encode(raw).decode()
    body = {"dtype": dtype, "shape": [LAYERS, HIDDEN], "layer_indices": list(range(LAYERS)), "data": data}
    return {"interventions": [{"kind": "add", "vector": {"post_block": body}, "scale": 1.5}]}


def slots(measure: Callable[[str, Callable[[], object], int], None]) -> None:
    """Vectors that are ablated at each layer: one, and some together."""
    random = np.random.default_rng(1)
    sites = [Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS)]

    def vectors() -> dict[str, SteeringVector]:
        blocks = random.standard_normal((SET, LAYERS, HIDDEN)).astype(np.float32)
        return {f"v{i}": SteeringVector.from_block(sites, block) for i, block in enumerate(blocks)}

    def asked(count: int, strength: float) -> Steering:
        steps = [{"kind": "ablate", "vector": f"v{i}", "strength": strength} for i in range(count)]
        return Steering.parse({"interventions": steps})

    known = vectors()
    by_digest = {vector.digest: vector for vector in known.values()}
    numbers = (1.0 + i / 65536 for i in range(65536))
    for count in (1, SET):
        what, again = f"ablate {count}", asked(count, 1.0)
        resolved = again.resolve(known, MODEL)
        wire = encode(resolved)
        measure(f"{what}, again: resolve", partial(again.resolve, known, MODEL), 1)
        more = iter([asked(count, next(numbers)) for _ in range(201)])
        measure(f"{what}, other strength: resolve", lambda more=more: next(more).resolve(known, MODEL), 1)
        measure(f"{what}, again: encode", partial(encode, resolved), 20)
        measure(f"{what}, again: decode", partial(decode, wire, by_digest), 1)
        measure(f"{what}, the same form: its key", partial(key_of, wire), 20)


def main() -> None:
    block = np.random.default_rng(0).standard_normal((LAYERS, HIDDEN)).astype(np.float32)
    calm = SteeringVector.from_block([Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS)], block)
    vectors, by_digest = {"calm": calm}, {calm.digest: calm}
    table = Table("what", "microseconds")

    def measure(what: str, call: Callable[[], object], number: int) -> None:
        call()
        table.add_row(what, f"{min(timeit.repeat(call, number=number, repeat=200)) / number * 1e6:.1f}")

    for what, more in (("registered name", {}), ("registered name, narrowed", {"layers": [10, 11, 12, 13]})):
        spec = {"interventions": [{"kind": "add", "vector": "calm", "scale": 1.5} | more]}
        steering = Steering.parse(spec)
        measure(f"{what}: parse", lambda spec=spec: Steering.parse(spec), 20)
        measure(f"{what}: resolve", lambda steering=steering: steering.resolve(vectors, MODEL), 20)
    resolved = Steering.parse(spec).resolve(vectors, MODEL)
    wire = encode(resolved)
    measure("registered name: encode", lambda: encode(resolved), 20)
    measure("registered name: decode", lambda: decode(wire, by_digest), 20)
    for dtype in ("float16", "float32", "bfloat16"):
        spec = inline(block, dtype)
        measure(f"inline {dtype}: parse and resolve", lambda spec=spec: Steering.parse(spec).resolve({}, MODEL), 1)
    text = json.dumps(inline(block, "float16"))
    measure("inline float16 in a JSON text: parse and resolve", lambda: Steering.parse(text).resolve({}, MODEL), 1)
    sent = Steering.parse(spec).resolve({}, MODEL)
    sent_wire = encode(sent)
    measure("inline: encode", lambda: encode(sent), 1)
    measure("inline: decode", lambda: decode(sent_wire, {}), 1)
    slots(measure)
    Console().print(table)


if __name__ == "__main__":
    main()
