"""`trimtab demo`: steering on the bundled model, measured."""

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.options import MAX_SEED, Json, quiet_transformers


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for picture, numbers and vectors.")] = Path(
        "demo-output"
    ),
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the prompts for extraction and of sampling.")
    ] = 0,
    json_: Json = False,
) -> None:
    """Steer the bundled model, measured: one batch under four specs, a sweep, an ablation, a clamp, and a gate."""
    quiet_transformers()
    import json

    import torch
    from rich.console import Console

    from trimtab.demo import model_path
    from trimtab.demo.directions import run_directions, show_directions
    from trimtab.demo.gates import run_gates, show_gates
    from trimtab.demo.run import run_demo, show, show_checks
    from trimtab.engines.transformers import SteeredModel

    torch.set_num_threads(1)  # matrices this small gain little by a second thread, and lose much where cores are shared
    log = Console(stderr=True)
    result = run_demo(output, seed, log)
    told = "ablating and clamping a direction"
    with log.status(told) as status, SteeredModel.from_pretrained(model_path()) as model:
        directions = run_directions(model, seed)
        status.update("training a probe and generating behind a gate")
        gates = run_gates(model, output, seed)
    checks = [*result.checks, *directions.checks, *gates.checks]
    missed = [check for check in checks if not check.holds]
    parts = {"directions": directions.as_json(), "gates": gates.as_json()}
    report = {**result.as_json(), **parts, "succeeded": not missed}
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if json_:
        typer.echo(json.dumps(report))
    else:
        console = Console()
        show(result, console)
        show_directions(directions, console)
        show_gates(gates, console)
        show_checks(checks, console)
        typer.echo(f"\nIn {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    if missed:
        raise CommandError("missed: " + "; ".join(f"{check.promise} (measured {check.measured})" for check in missed))
