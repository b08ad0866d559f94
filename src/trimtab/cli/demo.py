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
    """Steer the bundled model: one batch under four specs, measured, with a picture of strength against effect."""
    quiet_transformers()
    from rich.console import Console

    from trimtab.demo.run import run_demo, show

    result = run_demo(output, seed, Console(stderr=True))
    if json_:
        import json

        typer.echo(json.dumps(result.as_json()))
    else:
        show(result, Console())
    if missed := [check for check in result.checks if not check.holds]:
        raise CommandError("missed: " + "; ".join(f"{check.promise} (measured {check.measured})" for check in missed))
