"""What tests of kinds share: a model that serves everything, streams, and what a resolved spec makes of them.

`done` follows the formula of docs/kinds.md in float64 and knows nothing of slots as devices hold them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from response_formulas import FORMULAS
from trimtab.program import PhaseProgram, ResolvedSteering
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.spec.kinds import DECLARED, KINDS
from trimtab.vectors.vector import SteeringVector

H = 8
LAYERS = 6
SITES = frozenset(Site(layer, hook) for layer in range(LAYERS) for hook in HookPoint)
NAMED = frozenset(str(kind.model_fields["kind"].default) for kind in KINDS)
MODEL = ModelSites(H, LAYERS, SITES, GateLimits(4, SITES), slots=SlotLimits(8, SITES, NAMED | DECLARED.keys()))
HERE = Site(2, HookPoint.POST_BLOCK)

Row = npt.NDArray[np.float64]


def vector(seed: int = 0, sites: tuple[Site, ...] = (HERE,), scale: float = 1.0) -> SteeringVector:
    """Normal numbers, others at each site."""
    random = np.random.default_rng(seed)
    return SteeringVector({site: random.normal(size=H) * scale for site in sites})


def resolve(
    *steps: Mapping[str, Any], names: Mapping[str, SteeringVector] | None = None, model: ModelSites = MODEL
) -> ResolvedSteering:
    """The programs of a spec with these interventions."""
    return Steering.parse({"interventions": list(steps)}).resolve(names or {}, model)


def unit(direction: Any) -> Row:
    """A float32 direction at length 1, in float64."""
    values = np.asarray(direction, np.float32).astype(np.float64)
    return values / np.sqrt((values**2).sum())


def done(program: PhaseProgram, stream: Row, site: Site = HERE) -> Row:
    """A stream [H] at `site` behind the ungated part of a program, whose sets have members with exact directions."""
    added = stream.astype(np.float64)
    for term in program.terms:
        if site in term.vector.directions:
            added = added + term.scale * term.vector.directions[site].astype(np.float64)
    left, moves, rows = added.copy(), [], []
    for slot in program.slots:
        if site not in slot.at or slot.gate is not None:
            continue
        bias, own = slot.at[site]
        read = slot.read.values((site,))[0]
        seen = [read @ added + bias] + ([] if slot.second is None else [slot.second.values((site,))[0] @ added])
        move = FORMULAS[slot.response](*seen, *own)
        if slot.write is None:
            moves.append(move)
            rows.append(read)
        else:
            left += move * slot.write.values((site,))[0]
    if rows:  # the least change of the stream by which each projection moves as it is asked to
        left += np.linalg.lstsq(np.array(rows), np.array(moves), rcond=None)[0]
    return left
