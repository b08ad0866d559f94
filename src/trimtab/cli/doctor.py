"""`trimtab doctor`: whether the vLLM here can be steered, and what a steered engine would refuse."""

import contextlib
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.options import Json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trimtab.engines.vllm.doctor import Finding, Report

STYLES = {"applied": "green", "ready": "green", "waiting": "yellow", "does not fit": "bold red", "not needed": "dim"}


def doctor(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Directory or hub name of the model to be served: asks what is refused."),
    ] = None,
    why: Annotated[bool, typer.Option("--why", help="Say of each patch why it exists and until when.")] = False,
    json_: Json = False,
) -> None:
    """Show versions, the patches of the installed vLLM, and what a steered engine would refuse.

    With --model, all further flags are those of `vllm serve`, such as --tensor-parallel-size 2 --steering-layers 8-24:
    the engine's configuration is made and checked, and nothing is started. Exits with 1 if something does not fit.
    """
    if context.args and model is None:
        raise CommandError(f"{context.args[0]}: flags of an engine need --model")
    # vLLM logs to the standard output by default, which is ours.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        from trimtab.engines.vllm.doctor import examine

        report = examine(None if model is None else ["--model", model, *context.args])
    if json_:
        import json

        typer.echo(json.dumps(report.told(), indent=2))
    else:
        from rich.console import Console

        _print(Console(highlight=False, markup=False), report, why)
    if report.faults:
        raise typer.Exit(1)


def _print(console: "Console", report: "Report", why: bool) -> None:
    _versions(console, report)
    if report.vllm is not None:
        _heading(console, "Entry points")
        console.print(_table([(group, value or "missing") for group, value in report.entry_points.items()]))
        for process, findings in groupby(report.findings, key=lambda found: found.process):
            _patches(console, process, list(findings), why)
    elif not report.faults:
        _heading(console, "vLLM is not installed")
        needs = "" if report.versions["transformers"] else " It needs the extra `transformers`."
        console.print(
            "A server needs it: install trimtab with its extra `vllm`. The Transformers engine steers without it: "
            f"`trimtab generate`, or SteeredModel in Python.{needs}"
        )
    if report.rules:
        _heading(console, "What a steered engine refuses when it starts")
        console.print(_table([("-", rule) for rule in report.rules]))
    _heading(console, "Does not fit" if report.faults else "All fits")
    if report.faults:
        console.print(_table([("-", fault) for fault in report.faults]))
    elif report.refused is not None:
        console.print("An engine with these flags can be steered; its layers are looked at when it has loaded them.")


def _versions(console: "Console", report: "Report") -> None:
    versions = {name: version or "not installed" for name, version in report.versions.items()}
    versions["CUDA"] = report.versions["CUDA"] or "none in this torch"
    versions["code of trimtab"] = versions["code of trimtab"][:16]
    rows = [*versions.items(), ("devices", ", ".join(report.devices) or "none that CUDA knows")]
    console.print(_table(rows))


def _patches(console: "Console", process: str, findings: "list[Finding]", why: bool) -> None:
    from rich.text import Text

    _heading(console, f"Patches: {process}")
    by_module: dict[str, list[Finding]] = {}
    for found in findings:
        by_module.setdefault(found.patch.module, []).append(found)
    rows: list[tuple[str | Text, str | Text]] = []
    for module, of_module in by_module.items():
        rows.append(("", Text(module, "dim")))
        rows += [(Text(found.state.value, STYLES[found.state.value]), _patch(found, why)) for found in of_module]
    console.print(_table(rows))


def _patch(found: "Finding", why: bool) -> str:
    told = found.told()
    lines = [f"  {told['target']}" + (f" ({told['on']})" if told["on"] else "")]
    if told["reason"]:
        lines.append(f"  {told['reason']}")
    if why:
        lines += [f"Why: {told['why']}", f"Until: {told['until']}"]
    return "\n".join(lines)


def _heading(console: "Console", text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _table(rows: "Sequence[tuple[str | Text, str | Text]]") -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
