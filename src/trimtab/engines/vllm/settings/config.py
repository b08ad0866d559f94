"""Settings of the vLLM engine: what `additional_config["steering"]` may say, and what it comes to for one model.

vLLM hashes `additional_config` into the keys of its compile caches, so the settings are stamped with everything that
shapes the compiled graph: an artifact of an unsteered or differently steered run is then never loaded.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.engines.vllm.settings.content import load_one, loaded, require_same
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY, is_configured
from trimtab.engines.vllm.settings.monitor import MonitorSettings, check_reach
from trimtab.engines.vllm.settings.slots import checked_kinds, slot_limits
from trimtab.engines.vllm.settings.tables import DEFAULT_SHARE, decide_tables, parse_memory, stamped_tables
from trimtab.engines.vllm.settings.travelling import Travelling
from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.sites import MOST_SLOTS_DECLARED, GateLimits, HookPoint, ModelSites, OwnGate, Site, SlotLimits
from trimtab.vectors.probe import Probe
from trimtab.vectors.stream_norms import StreamNorms
from trimtab.vectors.vector import SteeringVector
from trimtab.version import __version__, code_version
from trimtab.wording import with_suggestions

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class SteeringSettings(BaseModel):
    """Validated settings. All have defaults: `{}` means every layer, at `post_block`, for any spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vectors: dict[str, str] = Field(default_factory=dict)  # name -> file, loaded at start
    layers: str | list[int] | None = None  # "8-24", "0,4,8-11" or numbers; None is all
    hook_points: tuple[HookPoint, ...] = (HookPoint.POST_BLOCK,)
    table_memory: float | str = DEFAULT_SHARE  # for the tables: a share of the device's memory, or a size: "512MiB"
    max_rows: int | None = Field(default=None, ge=3)  # rows of each table, row 0 included, whatever that takes
    probes: dict[str, str] = Field(default_factory=dict)  # name -> file, loaded at start; each site is a probe site
    probe_layers: str | list[int] | None = None  # further probe sites: these layers at the hook points
    gates: int = Field(default=4, ge=0, le=16)  # different gates per phase of a request, where there is a probe site
    slots: int = Field(default=0, ge=0, le=MOST_SLOTS_DECLARED)  # on one token at one site; 0 serves no kind but adding
    slot_layers: str | list[int] | None = None  # where slots can act, at the hook points; None is wherever is steered
    kinds: tuple[str, ...] | None = None  # of intervention that slots serve; None is `slots.DEFAULT_KINDS`
    row_monitor: bool = False  # gates of new tokens are run as probes of table rows where they are no more than that
    monitor: MonitorSettings | None = None  # before all steering of decode tokens that stands behind no gate
    norms: str | None = None  # a vector file whose metadata hold norms of the stream, for doses; loaded at start
    default: dict[str, Any] | None = None  # a spec that the front end adds to every request
    backend: Literal["auto", "traced", "triton"] = "auto"
    stamp: dict[str, Any] | None = None  # written by trimtab

    @field_validator("hook_points", mode="after")
    @classmethod
    def _some_hook_point(cls, hooks: tuple[HookPoint, ...]) -> tuple[HookPoint, ...]:
        if not hooks:
            raise ValueError("name at least one hook point")
        return tuple(hook for hook in HookPoint if hook in hooks)

    @field_validator("kinds", mode="after")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if kinds is None else checked_kinds(kinds)

    @field_validator("table_memory", mode="after")
    @classmethod
    def _some_memory(cls, value: float | str) -> float | str:
        parse_memory(value)
        return value

    @staticmethod
    def parse(value: Any) -> "SteeringSettings":
        """The settings that `value` (a mapping, or True for the defaults) describes. Raises `SteeringError`."""
        if value is True:
            return SteeringSettings()
        if not isinstance(value, Mapping):
            raise SteeringError(SETTINGS_KEY, f"got {type(value).__name__}, want an object with settings")
        try:
            return SteeringSettings.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join([SETTINGS_KEY, *map(str, first["loc"])])
            if first["type"] == "extra_forbidden":  # what it says is not repeated: it may be a key
                where = MonitorSettings if first["loc"][0] == "monitor" else SteeringSettings
                known = sorted(where.model_fields.keys() - {"stamp"})
                hint = with_suggestions(first["loc"][-1], known)
                raise SteeringError(path, f"unknown setting{hint}; the settings are {', '.join(known)}") from None
            raise SteeringError(path, f"{first['msg']} (got {first.get('input')!r:.80})") from None

    @staticmethod
    def of(vllm_config: Any) -> "SteeringSettings | None":
        """The settings of an engine; None where steering is not configured. Raises `SteeringError`.

        Of a configuration that was stamped they are one object in all of this process, which reads their files once.
        """
        if not is_configured(vllm_config):
            return None
        given = vllm_config.additional_config
        if not isinstance(given, Travelling):
            return SteeringSettings.parse(given[SETTINGS_KEY])
        if given.settings is None:
            given.settings = SteeringSettings.parse(given[SETTINGS_KEY])
        settings: SteeringSettings = given.settings
        return settings

    def chosen_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers to steer in a model of `num_layers`. Raises `SteeringError` for layers that it does not have."""
        if self.layers is None:
            return tuple(range(num_layers))
        return _chosen(self.layers, num_layers, "layers")

    def chosen_probe_sites(self, num_layers: int, sites: frozenset[Site]) -> frozenset[Site]:
        """Where probes can be read: the sites of `probes`, and those of `probe_layers`; none where `gates` is 0.

        Raises `SteeringError` for a site that is not among the steered `sites`.
        """
        if not self.gates:
            if self.probes or self.probe_layers is not None:
                raise SteeringError(f"{SETTINGS_KEY}.gates", "is 0, so no probe would be read: leave the probes out")
            return frozenset()
        named = {f"{SETTINGS_KEY}.probes.{name}": probe.site for name, probe in self.start_probes.items()}
        layers = () if self.probe_layers is None else _chosen(self.probe_layers, num_layers, "probe_layers")
        wanted = [(f"{SETTINGS_KEY}.probe_layers", Site(layer, hook)) for layer in layers for hook in self.hook_points]
        for field, site in [*named.items(), *wanted]:
            _check_readable(field, site, sites)
        return frozenset(site for _, site in [*named.items(), *wanted])

    def chosen_slots(self, num_layers: int, sites: frozenset[Site]) -> SlotLimits:
        """Which slots are served among the steered `sites`. Raises `SteeringError` where the settings do not fit."""
        layers = None if self.slot_layers is None else _chosen(self.slot_layers, num_layers, "slot_layers")
        return slot_limits(self.slots, self.kinds, layers, sites)

    @cached_property
    def start_vectors(self) -> dict[str, SteeringVector]:
        """The vectors of `vectors`, loaded once. Raises `SteeringError` naming the one whose file is bad, or does not
        hold what the settings were stamped with."""
        return loaded(self.vectors, SteeringVector.load, "vector", self.stamp)

    @cached_property
    def start_probes(self) -> dict[str, Probe]:
        """The probes of `probes`, loaded once. Raises `SteeringError` as `start_vectors` does."""
        return loaded(self.probes, Probe.load, "probe", self.stamp)

    @cached_property
    def start_monitor(self) -> ResolvedGate | None:
        """The monitor of `monitor`, loaded once. Raises `SteeringError` as `start_vectors` does."""
        if self.monitor is None:
            return None
        monitor = self.monitor.load()
        if self.stamp is not None:
            fault = f"{self.monitor.probe} holds another probe"
            require_same(f"{SETTINGS_KEY}.monitor.probe", fault, monitor.digest, self.stamp.get("monitor"))
        return monitor

    @cached_property
    def start_norms(self) -> StreamNorms | None:
        """The norms of `norms`, read once where requests are taken. Raises `SteeringError` as `start_vectors` does."""
        if self.norms is None:
            return None
        field = f"{SETTINGS_KEY}.norms"
        norms = load_one(self.norms, StreamNorms.load, field)
        if self.stamp is not None:
            require_same(field, f"{self.norms} holds other norms", norms.digest, self.stamp.get("norms"))
        return norms

    @cached_property
    def start_vectors_by_digest(self) -> dict[bytes, SteeringVector]:
        """`start_vectors` and the directions of all probes, as requests refer to them between processes."""
        vectors = [*self.start_vectors.values(), *(probe.vector for probe in self.start_probes.values())]
        if self.start_monitor is not None:
            vectors.append(self.start_monitor.probe)
        return {vector.digest: vector for vector in vectors}

    def read_files(self) -> "SteeringSettings":
        """These settings, with the content of all files at hand. Raises `SteeringError` as `start_vectors` does."""
        _ = self.start_vectors_by_digest, self.start_monitor
        return self


def model_sites(vllm_config: Any, settings: SteeringSettings) -> ModelSites:
    """What the engine serves: the model's width and depth, and the chosen layers at the chosen hook points.

    An engine whose model lacks one of these sites does not start, so whoever serves requests may rely on all of them.
    """
    text = vllm_config.model_config.hf_text_config
    num_layers, hidden_size = int(text.num_hidden_layers), int(vllm_config.model_config.get_hidden_size())
    chosen = settings.chosen_layers(num_layers)
    sites = frozenset(Site(layer, hook) for layer in chosen for hook in settings.hook_points)
    readable = settings.chosen_probe_sites(num_layers, sites)
    stages = _later_stages(vllm_config, num_layers)
    slots = settings.chosen_slots(num_layers, sites)
    count = settings.gates if readable else 0
    room = stamped_tables(settings.stamp).room if settings.stamp else None  # not known before
    if (monitor := settings.start_monitor) is None:
        return ModelSites(hidden_size, num_layers, sites, GateLimits(count, readable, stages), room, slots)
    field, width = f"{SETTINGS_KEY}.monitor.probe", monitor.probe.hidden_size
    if width != hidden_size:
        raise SteeringError(field, f"has width {width}, this model has hidden size {hidden_size}")
    _check_readable(field, monitor.site, sites)
    check_reach(monitor, sites, stages)
    limits = GateLimits(count, readable, stages, OwnGate(monitor.digest, monitor.site))
    return ModelSites(hidden_size, num_layers, sites, limits, room, slots)


def stamped(vllm_config: Any, settings: SteeringSettings) -> SteeringSettings:
    """The settings, and what has been read of them, with the stamp that separates compile caches and lets processes
    compare. One that they bear already counts for nothing.

    Raises `SteeringError` for layers, rows or vector files that cannot be used.
    """
    settings = settings.model_copy(update={"stamp": None})
    model = model_sites(vllm_config, settings)
    if settings.row_monitor and not model.gates.read_sites:
        reason = "no probe can be read here, so there is no gate to run in this way: name `probes` or `probe_layers`"
        raise SteeringError(f"{SETTINGS_KEY}.row_monitor", reason)
    if (norms := settings.start_norms) is not None:
        norms.check(model, f"{SETTINGS_KEY}.norms")
    memory = parse_memory(settings.table_memory)
    stamp = {
        "trimtab": __version__,
        "code": code_version(),
        "layers": sorted({site.layer for site in model.sites}),
        "gates": model.gates.count,
        "probe_sites": sorted(map(str, model.gates.probe_sites)),
        "slots": model.slots.count,
        "slot_sites": sorted(map(str, model.slots.sites)),
        "kinds": sorted(model.slots.kinds),
        "row_monitor": settings.row_monitor,
        "monitor": "" if settings.start_monitor is None else settings.start_monitor.digest.hex(),
        "norms": "" if norms is None else norms.digest.hex(),
        "tables": decide_tables(vllm_config, model, memory, settings.max_rows, settings.row_monitor)._asdict(),
        "vectors": {name: vector.digest.hex() for name, vector in settings.start_vectors.items()},
        "probes": {name: probe.digest.hex() for name, probe in settings.start_probes.items()},
    }
    return settings.model_copy(update={"stamp": stamp})


def _check_readable(field: str, site: Site, sites: frozenset[Site]) -> None:
    """Raise `SteeringError` at `field` where no probe can be read at `site` of an engine that steers `sites`."""
    if site not in sites:
        raise SteeringError(field, f"is read at {site}, which is not among the steered layers and hook points")


def _later_stages(vllm_config: Any, num_layers: int) -> tuple[int, ...]:
    """The first layer of each pipeline stage but the first."""
    stages = int(vllm_config.parallel_config.pipeline_parallel_size)
    if stages == 1:
        return ()
    from vllm.distributed.utils import get_pp_indices

    return tuple(get_pp_indices(num_layers, stage, stages)[0] for stage in range(1, stages))


def _chosen(layers: str | list[int], num_layers: int, field: str) -> tuple[int, ...]:
    chosen = _parse_layers(layers, field) if isinstance(layers, str) else set(layers)
    outside = sorted(layer for layer in chosen if not 0 <= layer < num_layers)
    if outside or not chosen:
        what = f"layers {outside} do not exist" if outside else "no layer given"
        raise SteeringError(f"{SETTINGS_KEY}.{field}", f"{what}; the model has layers 0 to {num_layers - 1}")
    return tuple(sorted(chosen))


def _parse_layers(text: str, field: str) -> set[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise SteeringError(f"{SETTINGS_KEY}.{field}", f"{part.strip()!r} is not a layer or a range such as 8-24")
        chosen.update(range(first, last + 1))
    return chosen
