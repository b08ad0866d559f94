"""The names in a spec, and what can be wrong with them beside that nobody gave them."""

from collections.abc import Iterator

from trimtab.errors import SteeringError
from trimtab.serving.registry import ProbeRegistry, VectorRegistry
from trimtab.spec import Steering


def check_fixed(default: Steering, vectors: VectorRegistry, probes: ProbeRegistry) -> None:
    """Raise `SteeringError` where a server's default names what can change while the server runs."""
    for path, name, registry in _named(default, vectors, probes):
        if name not in registry.start and name in registry.vectors():
            raise SteeringError(
                f"steering.{path}",
                f"the server's default spec names the {registry.what} {name!r}, which was registered at run time and "
                f"may change; give it at start, by --steering-{registry.what}s",
            )


def check_known(steering: Steering, vectors: VectorRegistry, probes: ProbeRegistry) -> None:
    """Raise `SteeringError` where a name is unknown that a damaged registry may have held."""
    for path, name, registry in _named(steering, vectors, probes):
        if (trouble := registry.trouble(name)) and name not in registry.vectors():
            raise SteeringError(path, f"the {registry.what} {name!r} is not known here; it may be lost: {trouble}")


def _named(
    steering: Steering, vectors: VectorRegistry, probes: ProbeRegistry
) -> Iterator[tuple[str, str, VectorRegistry | ProbeRegistry]]:
    """Where `steering` names something, what it names, and where that is looked up."""
    for index, step in enumerate(steering.interventions):
        for field, source in step.sources.items():
            if isinstance(source, str):
                yield f"interventions[{index}].{field}", source, vectors
        for where, gate in step.gates.items():
            if isinstance(gate.probe, str):
                yield f"interventions[{index}].{where}.probe", gate.probe, probes
