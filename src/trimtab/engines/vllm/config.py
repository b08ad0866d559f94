"""Settings of the vLLM engine: what `additional_config["steering"]` may say, and what it comes to for one model.

vLLM hashes `additional_config` into the keys of its compile caches, so the settings are stamped with everything that
shapes the compiled graph: an artifact of an unsteered or differently steered run is then never loaded.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import trimtab
from trimtab.engines.vllm.flags import SETTINGS_KEY
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.vectors.vector import SteeringVector

STAMP_SCHEMA = 1  # to be raised by whoever changes what the steered layers compile to

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class SteeringSettings(BaseModel):
    """Validated settings. All have defaults: `{}` means every layer, at `post_block`, for any spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vectors: dict[str, str] = Field(default_factory=dict)  # name -> file, loaded at start
    layers: str | list[int] | None = None  # "8-24", "0,4,8-11" or numbers; None is all
    hook_points: tuple[HookPoint, ...] = (HookPoint.POST_BLOCK,)
    max_rows: int | None = Field(default=None, ge=3)  # rows of each table; None is enough for the largest batch
    default: dict[str, Any] | None = None  # a spec that the front end adds to every request
    backend: Literal["auto", "traced", "triton"] = "auto"
    stamp: dict[str, Any] | None = None  # written by trimtab

    @field_validator("hook_points", mode="after")
    @classmethod
    def _some_hook_point(cls, hooks: tuple[HookPoint, ...]) -> tuple[HookPoint, ...]:
        if not hooks:
            raise ValueError("name at least one hook point")
        return tuple(hook for hook in HookPoint if hook in hooks)

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
            raise SteeringError(path, f"{first['msg']} (got {first.get('input')!r:.80})") from None

    @staticmethod
    def of(vllm_config: Any) -> "SteeringSettings | None":
        """The settings of an engine; None where steering is not configured. Raises `SteeringError`."""
        additional = getattr(vllm_config, "additional_config", None)
        if not isinstance(additional, Mapping) or additional.get(SETTINGS_KEY) in (None, False):
            return None
        return SteeringSettings.parse(additional[SETTINGS_KEY])

    def chosen_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers to steer in a model of `num_layers`. Raises `SteeringError` for layers that it does not have."""
        if self.layers is None:
            return tuple(range(num_layers))
        chosen = set(_parse_layers(self.layers) if isinstance(self.layers, str) else self.layers)
        outside = sorted(layer for layer in chosen if not 0 <= layer < num_layers)
        if outside or not chosen:
            what = f"layers {outside} do not exist" if outside else "no layer given"
            raise SteeringError(f"{SETTINGS_KEY}.layers", f"{what}; the model has layers 0 to {num_layers - 1}")
        return tuple(sorted(chosen))

    @cached_property
    def start_vectors(self) -> dict[str, SteeringVector]:
        """The vectors of `vectors`, loaded once. Raises `SteeringError` naming the one whose file is bad."""
        loaded = {}
        for name, path in self.vectors.items():
            try:
                loaded[name] = SteeringVector.load(path)
            except (OSError, ValueError) as error:
                raise SteeringError(f"{SETTINGS_KEY}.vectors.{name}", f"{path} cannot be loaded: {error}") from error
        return loaded

    @cached_property
    def start_vectors_by_digest(self) -> dict[bytes, SteeringVector]:
        """`start_vectors` as requests refer to them between processes."""
        return {vector.digest: vector for vector in self.start_vectors.values()}


def model_sites(vllm_config: Any, settings: SteeringSettings) -> ModelSites:
    """What the engine serves: the model's width and depth, and the chosen layers at the chosen hook points.

    An engine whose model lacks one of these sites does not start, so whoever serves requests may rely on all of them.
    """
    text = vllm_config.model_config.hf_text_config
    num_layers, hidden_size = int(text.num_hidden_layers), int(vllm_config.model_config.get_hidden_size())
    chosen = settings.chosen_layers(num_layers)
    sites = frozenset(Site(layer, hook) for layer in chosen for hook in settings.hook_points)
    return ModelSites(hidden_size=hidden_size, num_layers=num_layers, sites=sites)


def table_rows(vllm_config: Any, settings: SteeringSettings) -> int:
    """Rows of each steering table: one per phase for every request of the largest batch, and row 0.

    Raises `SteeringError` where `max_rows` asks for fewer: admission of a request must never fail.
    """
    requests = int(vllm_config.scheduler_config.max_num_seqs)
    needed = 1 + 2 * requests
    if settings.max_rows is None:
        return needed
    if settings.max_rows < needed:
        raise SteeringError(
            f"{SETTINGS_KEY}.max_rows",
            f"{settings.max_rows} rows cannot hold the largest batch: {requests} requests (max_num_seqs) with a "
            f"prefill and a decode row each, and row 0, need {needed}; leave max_rows out or lower max_num_seqs to "
            f"{(settings.max_rows - 1) // 2}",
        )
    return settings.max_rows


def stamped(vllm_config: Any, settings: SteeringSettings) -> dict[str, Any]:
    """The settings as plain JSON values, with the stamp that separates compile caches and lets workers compare.

    Raises `SteeringError` for layers, rows or vector files that cannot be used.
    """
    sites = model_sites(vllm_config, settings)
    plain = settings.model_dump(mode="json", exclude={"stamp"}, exclude_none=True)
    plain["stamp"] = {
        "schema": STAMP_SCHEMA,
        "trimtab": trimtab.__version__,
        "layers": sorted({site.layer for site in sites.sites}),
        "rows": table_rows(vllm_config, settings),
        "vectors": {name: vector.digest.hex() for name, vector in settings.start_vectors.items()},
    }
    return plain


def _parse_layers(text: str) -> set[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise SteeringError(f"{SETTINGS_KEY}.layers", f"{part.strip()!r} is not a layer or a range such as 8-24")
        chosen.update(range(first, last + 1))
    return chosen
