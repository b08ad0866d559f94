"""`trimtab inspect`: what a vector file or a probe file holds."""

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.options import Json

BAR = 40


def inspect(
    file: Annotated[Path, typer.Argument(help="A vector in any format that trimtab reads, or a probe.")],
    hook: Annotated[
        str | None, typer.Option(help="Where layers of a .svec file act: pre_attn or post_block, if it does not say.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show a vector or a probe: its sites, the length of each direction, its metadata; of a probe its bias too."""
    from trimtab.vectors import Probe
    from trimtab.vectors.probe import load_vector_or_probe

    found = load_vector_or_probe(file, hook)
    vector, bias = (found.vector, found.bias) if isinstance(found, Probe) else (found, None)
    norms = vector.norms()
    metadata = {
        "base_model": vector.metadata.base_model,
        "method": vector.metadata.method,
        "source": vector.metadata.source,
        **dict(sorted(vector.metadata.extra.items())),  # a file keeps no order
    }
    if json_:
        import json

        sites = [{"layer": site.layer, "hook": site.hook.value, "norm": norm} for site, norm in norms.items()]
        told = {"hidden_size": vector.hidden_size, "digest": found.digest.hex(), "sites": sites, "metadata": metadata}
        kind = {"kind": "vector"} if bias is None else {"kind": "probe", "bias": bias}
        typer.echo(json.dumps(kind | told))
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    what = f"{len(norms)} site{'s' if len(norms) > 1 else ''}" if bias is None else f"a probe, bias {bias:.6g}"
    line = f"{file}: {what}, hidden size {vector.hidden_size}, digest {found.digest.hex()[:16]}"
    console.print(Text(line), soft_wrap=True)  # whole, whatever reads it
    for key, value in metadata.items():
        if value:
            console.print(Text(f"  {key}: {value}"), soft_wrap=True)
    table = Table("layer", "hook point", "norm", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
    largest = max(norms.values()) or 1.0
    for site, norm in norms.items():
        table.add_row(str(site.layer), site.hook.value, f"{norm:.4g}", Text("█" * round(BAR * norm / largest), "cyan"))
    console.print(table)
