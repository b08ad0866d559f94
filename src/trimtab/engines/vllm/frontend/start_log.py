"""What a steered server says of itself in the log when it starts: one block that an operator can check."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.settings.tables import described, stamped_tables
from trimtab.serving.admin_key import HEADER, VARIABLE, admin_key
from trimtab.serving.registry import Registry
from trimtab.serving.server_default import ServerDefault
from trimtab.sites import SlotLimits, site_order
from trimtab.spec.joint_gate import JointGate
from trimtab.vectors.dose import says_norms
from trimtab.vectors.probe import Probe
from trimtab.vectors.stream_norms import doubt_of_model
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import summary

MOST_NAMES = 64  # of a kind, each on a line of its own

logger = logging.getLogger("vllm.trimtab")


def log_start(front_end: FrontEnd, settings: SteeringSettings, served: str = "") -> None:
    """Log what requests are steered with, who may change it, and what may be of another model than the one `served`."""
    logger.info("%s", "\n".join(start_block(front_end, settings)))
    for doubt in doubts(front_end, served):
        logger.warning("Steering: %s", doubt)


def doubts(front_end: FrontEnd, served: str) -> Iterator[str]:
    """What a dose would be counted in, and says that it is of another model."""
    norms, vectors = front_end.norms, front_end.registry.start
    measured = {} if norms is None else {"norms": norms.base_model}
    measured |= {f"vectors.{name}": vectors[name].metadata.base_model for name in vectors if says_norms(vectors[name])}
    for field, base_model in measured.items():
        if (doubt := doubt_of_model(base_model, served)) is not None:
            yield f"{field}: {doubt}"


def start_block(front_end: FrontEnd, settings: SteeringSettings) -> Iterator[str]:
    """The lines of the block."""
    sites = [str(site) for site in sorted(front_end.model.sites, key=site_order)]
    yield f"Steering is on at {len(sites)} sites: {summary(sites)}"
    if settings.stamp is not None:
        yield f"  tables: {described(stamped_tables(settings.stamp))}"
    yield f"  slots: {_slots(front_end.model.slots)}"
    yield from _names(front_end.registry, settings.vectors)
    yield from _names(front_end.probes, settings.probes)
    if settings.norms is not None and front_end.norms is not None:
        yield f"  norms: of {len(front_end.norms.by_site)} sites ({Path(settings.norms).name})"
    yield f"  default: {'none' if front_end.default is None else json.dumps(_short(front_end.default))}"
    yield f"  monitor: {'none' if front_end.monitor is None else json.dumps(front_end.monitor.shown)}"
    if admin_key() is None:
        yield f"  names can be registered and deleted by whoever may send requests; {VARIABLE} sets a key for that"
    else:
        yield f"  names can be registered and deleted with the administrator's key, in the header {HEADER}"


def _slots(limits: SlotLimits) -> str:
    """Which kinds are served besides adding, and where."""
    if not limits.count:
        return "none, so requests can add and nothing else; --steering-slots N declares some"
    sites = [str(site) for site in sorted(limits.sites, key=site_order)]
    return f"{limits.count} at each of {len(sites)} sites, for {', '.join(sorted(limits.kinds))}: {summary(sites)}"


def _names(registry: Registry[Any], files: Any) -> Iterator[str]:
    entries = registry.entries()
    yield f"  {registry.what}s: {len(entries) or 'none'}"
    for entry in entries[:MOST_NAMES]:
        origin = Path(files[entry.name]).name if entry.name in files else "registered at run time"
        yield f"    {entry.name} {entry.content.digest.hex()} ({origin})"
    if len(entries) > MOST_NAMES:
        yield f"    and {len(entries) - MOST_NAMES} more"


def _short(default: ServerDefault) -> dict[str, Any]:
    """The default as JSON, with the digest of each inline content in its place."""

    def named(source: str | SteeringVector | Probe) -> str:
        return source if isinstance(source, str) else f"inline {source.digest.hex()}"

    steps = []
    for step in default.spec.interventions:
        fields = {field.partition("[")[0] for field in step.sources}
        plain = step.model_dump(mode="json", exclude={*fields, "gate"}, exclude_none=True)
        plain |= {field: named(source) for field, source in step.sources.items()}
        if step.gate is not None:
            members = [
                {"probe": named(gate.probe), **gate.model_dump(mode="json", exclude={"probe"}, exclude_defaults=True)}
                for gate in step.gate.members.values()
            ]
            plain["gate"] = {step.gate.join: members} if isinstance(step.gate, JointGate) else members[0]
        steps.append(plain)
    kept = {"keep_norm": default.spec.keep_norm} if default.spec.keep_norm else {}
    return {"interventions": steps, **kept, "binding": default.binding}
