"""`trimtab extract`: a steering vector from contrasting prompts."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.options import BUNDLED, Json, Layers, Model, load_model, read_layers, read_prompts


def extract(
    positive: Annotated[Path, typer.Option("--positive", help="Prompts that show the wanted property, one a line.")],
    negative: Annotated[Path, typer.Option("--negative", help="Prompts that show its opposite, one a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Vector file to write: .safetensors or .gguf.")],
    model: Model = BUNDLED,
    layers: Layers = None,
    hook_point: Annotated[
        Literal["pre_attn", "post_attn", "post_block", "mlp_in", "mlp_out"], typer.Option(help="Where to read.")
    ] = "post_block",
    token: Annotated[
        Literal["last", "mean"], typer.Option(help="Read each prompt's last token, or the mean over its tokens.")
    ] = "last",
    json_: Json = False,
) -> None:
    """Extract the mean difference of activations between two files of prompts."""
    chosen = read_layers(layers)
    wanted, opposite = read_prompts(positive), read_prompts(negative)
    if output.suffix not in (".safetensors", ".gguf"):  # known before minutes of reading activations
        raise CommandError(f"--output {output}: vectors are written as .safetensors or .gguf")
    if not output.parent.is_dir():
        raise CommandError(f"--output {output}: there is no directory {output.parent}")
    steered = load_model(model)
    from trimtab.vectors.extraction import extract_vector

    with steered:
        vector = extract_vector(
            steered,
            wanted,
            opposite,
            layers=chosen,
            hook_point=hook_point,
            token=token,
            progress=sys.stdout.isatty() and not json_,
        )
    vector.save(output)
    norms = vector.norms()
    if json_:
        import json

        sites = [{"layer": site.layer, "hook": site.hook.value, "norm": norm} for site, norm in norms.items()]
        typer.echo(json.dumps({"output": str(output), "digest": vector.digest.hex(), "sites": sites}))
        return
    typer.echo(
        f"{output}: {len(norms)} site{'s' * (len(norms) != 1)}, "
        f"norms {min(norms.values()):.3g} to {max(norms.values()):.3g}, "
        f"from {len(wanted)} positive and {len(opposite)} negative prompts"
    )
