"""What `trimtab doctor` finds: whether this vLLM can be steered, and what a steered engine would refuse.

Imports the modules of vLLM that are patched, so that each patch is tried; starts no engine and needs no device, no
weights and no vLLM. Call it in a process of its own: afterwards this one's vLLM is patched.
"""

import contextlib
import importlib
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

from trimtab.engines.vllm.frontend.build import build_front_end
from trimtab.engines.vllm.patches.patching import Absence, Patch, State, fetch
from trimtab.engines.vllm.patches.supported import version_fault
from trimtab.engines.vllm.patches.tables import TABLES
from trimtab.engines.vllm.plugin import register
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.engines.vllm.settings.refusals import RULES, refusals
from trimtab.engines.vllm.settings.stamp import stamp_config
from trimtab.engines.vllm.worker.runner_v2 import batch_fault
from trimtab.errors import SteeringError
from trimtab.version import __version__, code_version

ENTRY_POINTS = ("vllm.general_plugins", "vllm.endpoint_plugins")

# Of `vllm serve`, in 0.33, 0.32 and 0.26.
_PARSERS = tuple(f"vllm.entrypoints.{folder}.cli_args" for folder in ("common", "launchers", "openai"))


class Finding(NamedTuple):
    """One patch and how it stands to this vLLM."""

    process: str
    patch: Patch
    state: State
    reason: str

    def told(self) -> dict[str, Any]:
        """As JSON."""
        why, _, until = " ".join(self.patch.why.removeprefix("Why: ").split()).partition(" Until: ")
        return {
            "process": self.process,
            "module": self.patch.module,
            "target": self.patch.target,
            "parameters": list(self.patch.first),
            "on": self.patch.on or None,
            "state": self.state.value,
            "reason": self.reason or None,
            "why": why,
            "until": until,
        }


@dataclass
class Report:
    """All findings; `faults` is what does not fit, and empty where an engine can be steered as asked."""

    versions: dict[str, str | None]
    devices: list[str]
    vllm: str | None  # its version
    entry_points: dict[str, str | None] = field(default_factory=dict)  # by group: what it loads
    findings: list[Finding] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)  # what is refused in general; where a model is given, not asked
    refused: list[str] | None = None  # why an engine for the given model would not start; None where none is given
    faults: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "fits": not self.faults,
            "faults": self.faults,
            "versions": self.versions,
            "devices": self.devices,
            "vllm": self.vllm,
            "entry_points": self.entry_points,
            "patches": [finding.told() for finding in self.findings],
            "refused_in_general": self.rules,
            "refused": self.refused,
        }


def examine(arguments: Sequence[str] | None = None) -> Report:
    """The report on this installation, and on an engine with these `arguments` of `vllm serve` where they are given.

    `--enable-steering` need not be among them.
    """
    version, fault = _vllm()
    report = Report(versions(version), _devices(), version)
    if fault is not None:
        report.faults.append(fault)
    if arguments is None:
        report.rules = [rule.sentence for rule in RULES]
    if version is None:
        if arguments is not None:
            report.faults.append(
                "vLLM makes the configuration of an engine, and is not here: install trimtab with its extra `vllm`"
            )
        return report
    if (unknown := version_fault(version)) is not None:
        report.faults.append(unknown)
    report.entry_points = {group: _entry_point(group) for group in ENTRY_POINTS}
    report.faults += _entry_point_faults(report.entry_points)
    register()
    report.findings = _findings()
    report.faults += dict.fromkeys(found.reason for found in report.findings if found.state is State.UNFIT)
    if (lacking := _batch_fault()) is not None:
        report.faults.append(lacking)
    if arguments is None:
        report.faults += refusals(None)  # those of the environment, whatever is configured
    else:
        report.refused = refused(arguments)
        report.faults += report.refused
    return report


def versions(vllm: str | None) -> dict[str, str | None]:
    """The versions that matter when something does not work; None for what is not installed."""
    found: dict[str, str | None] = {
        "trimtab": __version__,
        "code of trimtab": code_version(),
        "Python": platform.python_version(),
    }
    for name in ("torch", "transformers", "vllm", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    import torch

    return found | {"vllm": vllm, "CUDA": torch.version.cuda}


def _devices() -> list[str]:
    import torch

    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a driver that is too old, a device that is in use exclusively
        return [f"cannot be asked: {error}".splitlines()[0]]


def _vllm() -> tuple[str | None, str | None]:
    """The version of vLLM, None where there is none; and what is wrong with the one that is there."""
    try:
        version = str(importlib.import_module("vllm").__version__)
        _stand_in_for_a_device()
        return version, None
    except ModuleNotFoundError as error:
        fault = None if error.name == "vllm" else f"vLLM cannot be imported: {error}"
    except Exception as error:
        fault = f"vLLM cannot be imported: {type(error).__name__}: {error}"
    return None, fault


def _stand_in_for_a_device() -> None:
    """Where vLLM knows no device, let it make configurations for a CPU: it makes none for nothing.

    To be called before other modules of vLLM bind the platform.
    """
    from vllm import platforms

    if platforms.current_platform.is_unspecified():
        from vllm.platforms.cpu import CpuPlatform

        platforms._current_platform = CpuPlatform()


def _entry_point(group: str) -> str | None:
    found = metadata.entry_points(group=group, name="trimtab")
    return next((entry.value for entry in found), None)


def _entry_point_faults(entry_points: dict[str, str | None]) -> list[str]:
    faults = [
        f"vLLM does not see trimtab: no installed package has an entry point `trimtab` in {group}; install trimtab "
        "with pip where vLLM runs, a folder on the path is not enough"
        for group, value in entry_points.items()
        if value is None
    ]
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and "trimtab" not in named.split(","):
        faults.append(f"VLLM_PLUGINS is {named!r} and leaves trimtab out, so vLLM does not load it: name trimtab in it")
    return faults


def _findings() -> list[Finding]:
    """Each patch, tried: modules of vLLM that are not imported yet are, with all that they import."""
    absences: dict[str, Absence | None] = {}
    found = []
    for process, table in TABLES.items():
        for patch in table:
            if patch.module not in absences:
                absences[patch.module] = fetch(patch.module, patch.need)
            absence = absences[patch.module]
            if absence is None:
                state, reason = patch.state()
            else:
                state, reason = State.NOT_NEEDED if absence.excused else State.UNFIT, absence.reason
            found.append(Finding(process, patch, state, reason))
    return found


def _batch_fault() -> str | None:
    """What batches of V2 runners lack that no patch names; a runner that is not there is a finding of its own."""
    with contextlib.suppress(ImportError):
        return batch_fault()
    return None


class _CommandLineError(Exception):
    """The parser of vLLM does not take the flags."""


def refused(arguments: Sequence[str]) -> list[str]:
    """Why an engine with these arguments of `vllm serve` would not start as a steered one; empty if it would.

    The configuration is made by vLLM itself, without steering, and then checked as that of a steered engine is.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        args = _parse([*arguments, *([] if "--enable-steering" in arguments else ["--enable-steering"])])
        additional = dict(args.additional_config)
        settings = additional.pop(SETTINGS_KEY)
        args.additional_config = additional
        vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except _CommandLineError as error:
        return [str(error)]
    except Exception as error:
        return [f"vLLM makes no configuration of this ({type(error).__name__}): {_first_lines(str(error))}"]
    vllm_config.additional_config = {**additional, SETTINGS_KEY: settings}
    found = refusals(vllm_config)
    try:
        stamp_config(vllm_config)
        build_front_end(vllm_config)
    except SteeringError as error:
        found.append(str(error))
    return found


def _parse(arguments: Sequence[str]) -> Any:
    """The namespace that `vllm serve` would have. Raises `_CommandLineError`."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    for module in _PARSERS:
        try:
            parser = importlib.import_module(module).make_arg_parser(parser)
            break
        except ImportError:
            continue
    else:
        parser = AsyncEngineArgs.add_cli_args(parser)

    def fail(message: str) -> None:
        raise _CommandLineError(message)

    parser.error = fail
    return parser.parse_args(list(arguments))


def _first_lines(text: str, limit: int = 400) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= limit else f"{line[:limit]}..."
