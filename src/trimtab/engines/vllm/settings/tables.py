"""How many rows the steering tables of an engine have: decided once, where it is configured, and read from the stamp.

Tables for the worst case, every request of the largest batch with gates of its own, would be gigabytes. They take a
share of the device's memory instead; requests whose rows do not fit wait for others to end (`core.row_pool`).
"""

import logging
import re
from collections import Counter
from typing import Any, NamedTuple

from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.engines.vllm.settings.slots import most_slots, slot_form
from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import probes_needed, rows_needed
from trimtab.sites import ModelSites, Room

DEFAULT_SHARE = 0.01  # of the device's memory
UNKNOWN_DEVICE = 256 << 20  # bytes for tables where no device can be asked for its memory
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}

_SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})")

logger = logging.getLogger("vllm.trimtab")


class Tables(NamedTuple):
    """The tables of one rank, row 0 of each included; `nbytes` are those of the rank with most sites."""

    rows: int
    probes: int
    nbytes: int
    lowers: bool = False  # whether gates are probes of rows where they are no more than that

    @property
    def room(self) -> Room:
        """What requests can hold at one time."""
        return Room(self.rows - 1, self.probes - 1, self.lowers)


def parse_memory(value: float | str) -> float | int:
    """A share of the device's memory as a float in (0, 1), or a size such as "512 MiB" in bytes. Raises ValueError."""
    if isinstance(value, str) and (size := _SIZE.fullmatch(value.strip())):
        return int(float(size[1]) * UNITS[size[2]])
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0.0 < share < 1.0:
        raise ValueError("give a share of the device's memory between 0 and 1, such as 0.01, or a size such as 512MiB")
    return share


def decide_tables(
    vllm_config: Any, model: ModelSites, memory: float | int, max_rows: int | None, lowers: bool = False
) -> Tables:
    """The tables of an engine that serves `model`, in a share of memory or a size (`parse_memory`), or of `max_rows`.

    Without `max_rows` never less than one request whose interventions have a slot each at most can need, and never more
    than the largest batch of such can. Interventions of several slots (`most_slots`) may need more: a request that
    never fits is refused when it is admitted (`program.room`). An engine that `lowers` gates has probes of rows beside
    them, wherever probes are read.
    """
    from trimtab.ops.sizes import row_bytes, rows_within  # only here: it brings torch along

    dtype, gates = vllm_config.model_config.dtype, model.gates.per_token
    stages, monitored, slotted = (
        Counter(model.gates.stage(site.layer) for site in sites)
        for sites in (model.sites, model.gates.read_sites if lowers else (), model.slots.sites)
    )
    form = slot_form(model.slots)
    each = max(
        row_bytes(
            sites, model.hidden_size, dtype, probes=gates > 0, row_monitor_sites=monitored[stage], slots=form,
            slot_sites=slotted[stage],
        )
        for stage, sites in stages.items()
    )  # fmt: skip
    requests = int(vllm_config.scheduler_config.max_num_seqs)
    rows = max_rows
    if rows is None:
        slots = most_slots(model.slots), 0 if form is None else form.rows
        least, most = rows_needed(1, gates, *slots), rows_needed(requests, gates, *slots)
        rows = rows_within(_budget(memory, most * each), each, least=least, most=most)
    return Tables(rows, min(rows, probes_needed(requests, gates)), rows * each, lowers)


def described(tables: Tables) -> str:
    """For people: `2048 rows for requests in 512.1 MiB of each device`."""
    return f"{tables.room.rows} rows for requests in {tables.nbytes / (1 << 20):.1f} MiB of each device"


def stamped_tables(stamp: dict[str, Any] | None) -> Tables:
    """What was decided when the configuration was stamped. Raises `SteeringError` for one that was not."""
    try:
        return Tables(**(stamp or {})["tables"])
    except (KeyError, TypeError):
        raise SteeringError(SETTINGS_KEY, "the configuration was not prepared by this trimtab") from None


def _budget(memory: float | int, worst: int) -> int:
    """Bytes for tables; `worst` are those of the worst case, where it does not matter what the device has."""
    if isinstance(memory, int):
        return memory
    total = _device_memory()
    if total is not None:
        return int(memory * total)
    if worst > UNKNOWN_DEVICE:
        logger.warning(
            "No device can be asked here for its memory: steering tables take %d MiB. Set `table_memory` to a size, "
            "such as 512MiB, for more.", UNKNOWN_DEVICE >> 20,
        )  # fmt: skip
    return UNKNOWN_DEVICE


def _device_memory() -> int | None:
    """Bytes of one device; None where none can be asked. vLLM asks NVML where there is one, which starts no CUDA."""
    try:
        from vllm.platforms import current_platform

        return int(current_platform.get_device_total_memory()) or None
    except Exception as error:  # whatever a platform without a device raises
        logger.debug("the device's memory is not known: %r", error)
        return None
