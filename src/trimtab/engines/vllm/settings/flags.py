"""The `--steering-*` flags of `vllm serve`: declared on its parser, and turned into `additional_config["steering"]`.

Nothing here imports vLLM: `patches.settings` calls `add_flags` on the parser that vLLM builds and `apply_flags` on the
namespace that it parsed.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.serving.admin_key import FLAG, VARIABLE, set_admin_key
from trimtab.sites import HookPoint

BACKENDS = ("auto", "traced", "triton")

SETTINGS_KEY = "steering"  # in vLLM's additional_config

_DESTINATIONS = {
    "steering_vectors": "vectors",
    "steering_layers": "layers",
    "steering_hook_points": "hook_points",
    "steering_table_memory": "table_memory",
    "steering_max_rows": "max_rows",
    "steering_probes": "probes",
    "steering_probe_layers": "probe_layers",
    "steering_gates": "gates",
    "steering_slots": "slots",
    "steering_slot_layers": "slot_layers",
    "steering_kinds": "kinds",
    "steering_row_monitor": "row_monitor",
    "steering_monitor": "monitor",
    "steering_norms": "norms",
    "steering_default": "default",
    "steering_backend": "backend",
}


def is_configured(vllm_config: Any) -> bool:
    """Whether an engine with this configuration is steered; `SteeringSettings.of` reads how."""
    additional = getattr(vllm_config, "additional_config", None)
    return isinstance(additional, Mapping) and additional.get(SETTINGS_KEY) not in (None, False)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags, as a group of their own. A parser that has them already is left alone."""
    if any(action.dest == "enable_steering" for action in parser._actions):
        return
    group = parser.add_argument_group("steering", "Per-request activation steering (trimtab).")
    group.add_argument(
        "--enable-steering",
        action="store_true",
        default=False,
        help="Let requests carry a steering spec. Without this flag vLLM is left exactly as it is.",
    )
    group.add_argument(
        "--steering-vectors",
        nargs="+",
        metavar="NAME=FILE",
        default=None,
        help="Vectors that requests may name, each loaded from a file at start.",
    )
    group.add_argument(
        "--steering-layers",
        default=None,
        metavar="LAYERS",
        help="Layers that can be steered, such as 8-24 or 0,4,8-11. Default: all.",
    )
    group.add_argument(
        "--steering-hook-points",
        nargs="+",
        default=None,
        metavar="HOOK",
        help=f"Hook points that can be steered: {', '.join(HookPoint)}. Default: post_block.",
    )
    group.add_argument(
        "--steering-table-memory",
        default=None,
        metavar="SHARE|SIZE",
        help="Device memory for the steering tables: a share such as 0.01, or a size such as 512MiB. Requests whose "
        "rows do not fit wait for others to end. Default: 0.01.",
    )
    group.add_argument(
        "--steering-max-rows",
        type=int,
        default=None,
        metavar="N",
        help="Rows of each steering table, whatever they take. Default: as many as --steering-table-memory holds.",
    )
    group.add_argument(
        "--steering-probes",
        nargs="+",
        metavar="NAME=FILE",
        default=None,
        help="Probes that gates may name, each loaded from a file at start. Gates can read where these do.",
    )
    group.add_argument(
        "--steering-probe-layers",
        default=None,
        metavar="LAYERS",
        help="Further layers at which the probes of gates can be read, such as 12 or 8,12-14. Default: none.",
    )
    group.add_argument(
        "--steering-gates",
        type=int,
        default=None,
        metavar="N",
        help="Different gates per phase of a request, where probes can be read. Default: 4; 0 serves none.",
    )
    group.add_argument(
        "--steering-slots",
        type=int,
        default=None,
        metavar="N",
        help="Slots on one token at one site, for interventions that do more than add: 16 at most. Default: 0, none.",
    )
    group.add_argument(
        "--steering-slot-layers",
        default=None,
        metavar="LAYERS",
        help="Layers at which slots can act, such as 8-16. Default: all that can be steered.",
    )
    group.add_argument(
        "--steering-kinds",
        nargs="+",
        default=None,
        metavar="KIND",
        help="Kinds of intervention that slots serve. Adding needs none. Default: ablate, clamp, scale.",
    )
    group.add_argument(
        "--steering-row-monitor",
        action="store_true",
        default=None,
        help="Run gates of new tokens as probes of table rows where they come to no more than that.",
    )
    group.add_argument(
        "--steering-monitor",
        default=None,
        metavar="SPEC.json",
        help="File with a monitor: one probe for the whole engine, which lets steering of new tokens through.",
    )
    group.add_argument(
        "--steering-norms",
        default=None,
        metavar="PATH",
        help="Vector file whose metadata hold the norms of this model's stream, as `trimtab extract` writes them: for "
        'scales in the unit "dose" of vectors that do not say them.',
    )
    group.add_argument(
        "--steering-default",
        default=None,
        metavar="SPEC.json",
        help="File with a steering spec that is added to every request.",
    )
    group.add_argument(
        "--steering-backend",
        choices=BACKENDS,
        default=None,
        help="How the addition runs: traced into the compiled graph, as a Triton operator, or what suits the engine.",
    )
    group.add_argument(
        FLAG,
        default=None,
        metavar="KEY",
        help=f"Key that registering and deleting then need. Processes show their flags: {VARIABLE} in the environment "
        "is the same, unseen.",
    )


def apply_flags(args: argparse.Namespace) -> bool:
    """Move the steering flags of `args` into `args.additional_config["steering"]`; True if steering is on.

    The flags are cleared once moved, so that a second call, or a process that receives the namespace, changes nothing.
    Raises `SteeringError` for a flag given without `--enable-steering`, a malformed value, or settings given both as
    flags and in `--additional-config`.
    """
    given = {flag: value for flag in _DESTINATIONS if (value := getattr(args, flag, None)) is not None}
    names = ", ".join("--" + flag.replace("_", "-") for flag in given)
    key: str | None = getattr(args, _dest(FLAG), None)
    config: Any = getattr(args, "additional_config", None) or {}
    present = isinstance(config, Mapping) and SETTINGS_KEY in config
    if not getattr(args, "enable_steering", False):
        if given or key is not None:
            said = "given without --enable-steering; add that flag to turn steering on"
            raise SteeringError(names or FLAG, said)
        return present
    if present and given:
        raise SteeringError(names, "given beside --additional-config '{\"steering\": ...}'; use one of the two")
    if not present:
        args.additional_config = {**config, SETTINGS_KEY: settings_from_flags(given)}
    if key is not None:
        set_admin_key(key)  # which the processes that are started inherit
    for flag in (*given, _dest(FLAG)):
        setattr(args, flag, None)
    return True


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def settings_from_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a set of given flags (`steering_layers` ...) stands for. Raises `SteeringError`."""
    settings = {_DESTINATIONS[flag]: value for flag, value in given.items()}
    if "vectors" in settings:
        settings["vectors"] = parse_vector_flags(settings["vectors"])
    if "probes" in settings:
        settings["probes"] = parse_vector_flags(settings["probes"], "--steering-probes")
    if "norms" in settings:
        settings["norms"] = str(Path(settings["norms"]).expanduser().absolute())
    if "hook_points" in settings:
        settings["hook_points"] = _parse_hook_points(settings["hook_points"])
    if "kinds" in settings:
        settings["kinds"] = _split(settings["kinds"])
    if "default" in settings:
        settings["default"] = _read_object(settings["default"], "--steering-default", "with interventions")
    if "monitor" in settings:
        settings["monitor"] = _read_monitor(settings["monitor"])
    return settings


def parse_vector_flags(items: Sequence[str], flag: str = "--steering-vectors") -> dict[str, str]:
    """`["calm=calm.safetensors", ...]` as `{"calm": "/absolute/calm.safetensors"}`. Raises `SteeringError`."""
    vectors: dict[str, str] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise SteeringError(flag, f"{item!r} is not NAME=FILE")
        if name in vectors:
            raise SteeringError(flag, f"the name {name!r} is given twice")
        vectors[name] = str(Path(path).expanduser().absolute())  # workers may run in another directory
    return vectors


def _parse_hook_points(items: Sequence[str]) -> list[str]:
    hooks = _split(items)
    for hook in hooks:
        if hook not in list(HookPoint):
            raise SteeringError("--steering-hook-points", f"{hook!r} is not one of {', '.join(HookPoint)}")
    return hooks


def _split(items: Sequence[str]) -> list[str]:
    """Names that were given one by one, or with commas between them."""
    return [name for item in items for name in item.split(",") if name]


def _read_monitor(path: str) -> dict[str, Any]:
    monitor = _read_object(path, "--steering-monitor", "with probe and threshold")
    if isinstance(probe := monitor.get("probe"), str):  # beside the file that names it, wherever workers run
        monitor["probe"] = str(Path(path).expanduser().absolute().parent / Path(probe).expanduser())
    return monitor


def _read_object(path: str, flag: str, content: str) -> dict[str, Any]:
    try:
        spec = read_json(Path(path).read_bytes())
    except OSError as error:
        raise SteeringError(flag, f"{path} cannot be read: {error.strerror}") from error
    except SteeringError as error:
        raise SteeringError(flag, f"{path}: {error.message}") from None
    if not isinstance(spec, dict):
        raise SteeringError(flag, f"{path} must hold a JSON object {content}")
    return spec
