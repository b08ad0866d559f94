"""Whether a request finds room in the tables of an engine at all."""

from trimtab.errors import SteeringError
from trimtab.program.lowering import contents_of
from trimtab.program.resolved import ResolvedSteering
from trimtab.sites import Room


def check_room(steering: ResolvedSteering, room: Room | None, field: str) -> None:
    """Raise `SteeringError` at `field` where a request needs more than there is; None is room for any.

    The message holds what `max_rows` an engine would need, row 0 included: tables have as many rows of probes as that,
    or all that its requests can use.
    """
    if room is None:
        return
    needed = contents_of(steering, lowers=room.lowers)
    for what, keys, held in (("table rows", needed.rows, room.rows), ("probes", needed.probes, room.probes)):
        if len(keys) > held:
            raise SteeringError(
                field,
                f"needs {len(keys)} {what} at one time, and this engine has {held}: interventions with equal gates and "
                "phases share one, and so do equal directions of slots; or start it with a larger `table_memory`, or "
                f"with `max_rows` of at least {len(keys) + 1}",
            )
