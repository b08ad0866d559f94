"""`trimtab inspect`: what a vector file holds."""

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json

BAR = 40


def inspect(
    file: Annotated[Path, typer.Argument(help="A vector in any format that trimtab reads.")],
    json_: Json = False,
) -> None:
    """Show a vector file: its sites, the length of each direction, and its metadata."""
    from trimtab.vectors import SteeringVector

    vector = SteeringVector.load(file)
    norms = vector.norms()
    metadata = {
        "base_model": vector.metadata.base_model,
        "method": vector.metadata.method,
        "source": vector.metadata.source,
        **vector.metadata.extra,
    }
    if json_:
        import json

        sites = [{"layer": site.layer, "hook": site.hook.value, "norm": norm} for site, norm in norms.items()]
        found = {"hidden_size": vector.hidden_size, "digest": vector.digest.hex(), "sites": sites, "metadata": metadata}
        typer.echo(json.dumps(found))
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    layers = f"{len(norms)} site{'s' if len(norms) > 1 else ''}"
    console.print(Text(f"{file}: {layers}, hidden size {vector.hidden_size}, digest {vector.digest.hex()[:16]}"))
    for key, value in metadata.items():
        if value:
            console.print(Text(f"  {key}: {value}"))
    table = Table("layer", "hook point", "norm", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
    largest = max(norms.values()) or 1.0
    for site, norm in norms.items():
        table.add_row(str(site.layer), site.hook.value, f"{norm:.4g}", Text("█" * round(BAR * norm / largest), "cyan"))
    console.print(table)
