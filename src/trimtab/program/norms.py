"""Specs that keep the norm of the stream: each token leaves a site at which something was done as long as it came."""

from trimtab.program.programs import PhaseProgram
from trimtab.program.slots import Numbers, Slot
from trimtab.responses import KEEP_NORM


def keeping_norm(program: PhaseProgram, if_grown: bool) -> PhaseProgram:
    """`program` with a slot that acts last at each of its sites, where a token's norm is then what it was before
    anything of ours; with `if_grown` only where it is larger."""
    if not program.sites:
        return program
    numbers = Numbers.of(0.0, float(if_grown))
    last = Slot(KEEP_NORM.name, None, None, tuple((site, numbers) for site in program.sites), kind="keep_norm")
    return PhaseProgram.of(program.all_terms, (*program.slots, last))
