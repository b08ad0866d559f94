"""What a request may bring to the buffers of an engine, whoever else is there."""

from collections.abc import Sequence

from trimtab.errors import SteeringError
from trimtab.ops.buffers import SteeringBuffers
from trimtab.program import ResolvedSteering
from trimtab.runtime.slot_rows import check_slots


def check_admission(request_id: str, steering: ResolvedSteering, buffers: SteeringBuffers) -> None:
    """Raise SteeringError where these buffers cannot hold a vector's width, the gates, the slots or the spans."""
    width = buffers.table.shape[2]
    vectors = (vector for program in steering.programs for vector in program.vectors)
    probes = (one.probe for gate in steering.gates for one in gate.members)
    widths = {vector.hidden_size for vector in (*vectors, *probes)}
    if others := sorted(widths.union(one.hidden_size for slot in steering.slots for one in slot.vectors) - {width}):
        raise SteeringError("vector", f"request {request_id!r} brings width {others[0]}; the model's is {width}")
    served = 0 if buffers.gates is None else buffers.gates.count
    if (most := max(program.lane_count for program in steering.programs)) > served:
        raise SteeringError("gates", f"request {request_id!r} brings {most} in a phase; the buffers hold {served}")
    check_slots(request_id, steering, buffers)
    if steering.spans is not None and buffers.spans is None:
        raise SteeringError("spans", f"request {request_id!r} brings some; the buffers hold none: give `span_requests`")


def check_past(request_id: str, steering: ResolvedSteering, tokens: Sequence[int] | None, upto: int) -> None:
    """Raise SteeringError where a request's tokens decide, it begins at position `upto`, and fewer are given."""
    by_ids = steering.spans is not None and steering.spans.decided_by_tokens
    if by_ids and len(tokens or ()) < upto:
        said = f"begins at position {upto}, and is steered by the ids before it; {len(tokens or ())} are given"
        raise SteeringError("tokens", f"request {request_id!r} {said}")
