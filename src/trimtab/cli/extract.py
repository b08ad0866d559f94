"""`trimtab extract`: a steering vector from contrasting prompts, tried on prompts held out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.options import (
    BUNDLED,
    MAX_SEED,
    Chat,
    Json,
    Layers,
    Model,
    Negative,
    Pairs,
    Positive,
    check_output,
    load_model,
    read_contrast,
    read_layers,
)
from trimtab.cli.texts import rendered
from trimtab.sites import HookPoint

if TYPE_CHECKING:
    from trimtab.training.tuning import TunedVector
    from trimtab.vectors import SteeringVector


def extract(
    output: Annotated[Path, typer.Option("--output", "-o", help="Vector file to write: .safetensors or .gguf.")],
    positive: Positive = None,
    negative: Negative = None,
    pairs: Pairs = None,
    chat: Chat = False,
    model: Model = BUNDLED,
    layers: Layers = None,
    hook_point: Annotated[HookPoint, typer.Option(help="Where to read.")] = HookPoint.POST_BLOCK,
    token: Annotated[
        Literal["last", "mean"], typer.Option(help="Read each prompt's last token, or the mean over its tokens.")
    ] = "mean",
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep/--no-sweep",
            help="Hold prompts out, and choose the layer (unless --layers is given) and the scale by trying. Without "
            "it the mean difference is written as it is, at --layers.",
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Write a vector that was not seen to steer too.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the split and of the trials.")] = 0,
    json_: Json = False,
) -> None:
    """Extract a vector from contrasting prompts, at the layer and the strength at which it steers: scale 1."""
    chosen = read_layers(layers)
    given = read_contrast(positive, negative, pairs)
    check_output(output, ".safetensors", ".gguf")  # known before minutes of reading activations
    if output.suffix == ".gguf":
        if hook_point is not HookPoint.POST_BLOCK:
            raise CommandError(f"{output}: GGUF holds post_block directions alone; write .safetensors for {hook_point}")
        if chosen and 0 in chosen:
            raise CommandError(
                f"{output}: llama.cpp cannot steer block 0; leave it out of --layers, or write .safetensors"
            )
    steered = load_model(model)
    wanted, opposite = (rendered(texts, steered.tokenizer, chat=chat) for texts in given)
    if output.suffix == ".gguf" and chosen is None:
        chosen = list(range(1, steered.sites.num_layers))
    options: dict[str, Any] = {"layers": chosen, "hook_point": hook_point, "token": token}
    options["progress"] = sys.stdout.isatty() and not json_
    tuned = None
    with steered:
        if sweep:
            from trimtab.training import tune_vector

            tuned = tune_vector(steered, wanted, opposite, seed=seed, **options)
            vector = tuned.vector
        else:
            from trimtab.training.extraction import extract_vector

            vector = extract_vector(steered, wanted, opposite, **options)
    written = tuned is None or tuned.usable or force
    if written:
        vector.save(output)
    if json_:
        import json

        typer.echo(json.dumps({"output": str(output) if written else None, **_as_json(vector, tuned)}))
    else:
        _show(vector, tuned)
    if tuned is not None and not written:
        raise CommandError(f"not known to steer: {tuned.problem}; {output} is not written, --force writes it")
    if not json_:
        from trimtab.vectors.dose import dose_of

        made = (
            f"{output}: {', '.join(map(str, vector.sites))}, from {len(wanted)} positive and {len(opposite)} negative"
        )
        typer.echo(f"{made} prompts; scale 1 is a dose of {dose_of(vector) or 0.0:.2g}")
        if tuned is None:
            typer.echo("not tried: neither its layers nor its scale are known to steer")
        elif tuned.usable:
            typer.echo(f"try it: trimtab generate --model {model} --vector {output} --compare --prompt '...'")


def _as_json(vector: "SteeringVector", tuned: "TunedVector | None") -> dict[str, Any]:
    from trimtab.vectors.dose import dose_of, stream_norm_key

    sites = [
        {
            "layer": site.layer,
            "hook": site.hook.value,
            "norm": norm,
            "stream_norm": float(vector.metadata.extra[stream_norm_key(site)]),
        }
        for site, norm in vector.norms().items()
    ]
    found: dict[str, Any] = {"digest": vector.digest.hex(), "sites": sites, "dose": dose_of(vector)}
    return found if tuned is None else {**found, "sweep": tuned.as_json()}


def _show(vector: "SteeringVector", tuned: "TunedVector | None") -> None:
    """Layers and doses as tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from trimtab.vectors.dose import stream_norm_key

    console = Console(highlight=False)
    layers = Table("site", "held-out AUROC", "mean difference", "stream", box=None, padding=(0, 2, 0, 0))
    if tuned is None:
        for site, norm in vector.norms().items():
            stream = float(vector.metadata.extra[stream_norm_key(site)])
            layers.add_row(str(site), "-", f"{norm:.4g} long", f"{stream:.4g} long")
        console.print(layers)
        return
    for one in tuned.separations:
        row = str(one.site), f"{one.auroc:.2f}", f"{one.norm:.4g} long", f"{one.stream_norm:.4g} long"
        layers.add_row(*row)
    console.print(layers)
    console.print(f"chance would separate them as well with p = {tuned.separation_p:.2g}\n")
    doses = Table("site", "dose", "effect", "surprise", "repetition", "text", box=None, padding=(0, 2, 0, 0))
    for trial in tuned.trials:
        confirmed = tuned.confirmed
        advised = confirmed is not None and (trial.vector, trial.scale) == (confirmed.vector, confirmed.scale)
        text = "intact" if trial.intact else "broken"
        sites = ", ".join(map(str, trial.vector.sites))
        numbers = f"{trial.effect:+.2f}", f"{trial.surprise:+.2f}", f"{trial.repetition:+.2f}"
        doses.add_row(sites, f"{trial.dose:.2f}", *numbers, f"{text} {'<- scale 1' if advised else ''}")
    if tuned.trials:
        console.print(doses)
        console.print("dose in norms of the stream; effect and surprise in nats a token\n")
