"""Whether a request finds room in the tables of an engine at all."""

from trimtab.errors import SteeringError
from trimtab.program.lowering import contents_of
from trimtab.program.resolved import ResolvedSteering
from trimtab.sites import Room


def check_room(steering: ResolvedSteering, room: Room | None, field: str) -> None:
    """Raise `SteeringError` at `field` where a request needs more than there is; None is room for any."""
    if room is None:
        return
    needed = contents_of(steering, lowers=room.lowers)
    for what, keys, held in (("table rows", needed.rows, room.rows), ("probes", needed.probes, room.probes)):
        if len(keys) > held:
            raise SteeringError(
                field,
                f"needs {len(keys)} {what} at one time, and this engine has {held}: interventions with equal gates and "
                "phases share one; or start it with a larger `table_memory` (or `max_rows`, where that is set)",
            )
