"""`trimtab demo`: steering on the bundled model, measured."""

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.options import Json, quiet_transformers


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for picture, numbers and vectors.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the prompts for extraction and of sampling.")] = 0,
    json_: Json = False,
) -> None:
    """Steer the bundled model, measured: one batch under four specs, a sweep of strengths, and a gate."""
    quiet_transformers()
    from rich.console import Console

    from trimtab.demo import model_path
    from trimtab.demo.gates import run_gates, show_gates
    from trimtab.demo.run import run_demo, show, show_checks
    from trimtab.engines.transformers import SteeredModel

    log = Console(stderr=True)
    result = run_demo(output, seed, log)
    told = "training a probe and generating behind a gate"
    with log.status(told), SteeredModel.from_pretrained(model_path()) as model:
        gates = run_gates(model, output, seed)
    if json_:
        import json

        typer.echo(json.dumps({**result.as_json(), "gates": gates.as_json()}))
    else:
        show(result, Console())
        show_gates(gates, Console())
        show_checks(gates.checks, Console())
        typer.echo(f"\ngated texts, each token in the colour of its gate: {output / 'gates.html'}")
    if missed := [check for check in (*result.checks, *gates.checks) if not check.holds]:
        raise CommandError("missed: " + "; ".join(f"{check.promise} (measured {check.measured})" for check in missed))
