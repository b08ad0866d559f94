"""`trimtab generate`: steered text from any model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.options import (
    BUNDLED,
    MAX_SEED,
    Chat,
    Json,
    Layers,
    Model,
    load_model,
    read_layers,
    read_vector,
    read_where,
)
from trimtab.cli.texts import Text, as_chat, read_prompts, rendered


def generate(
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for a batch.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="File of prompts: one a line, or .jsonl with texts or messages.")
    ] = None,
    chat: Chat = False,
    vector: Annotated[
        list[str] | None,
        typer.Option("--vector", "-v", metavar="FILE[:SCALE]", help="A vector file and its scale (1); repeat to add."),
    ] = None,
    model: Model = BUNDLED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    layers: Layers = None,
    phase: Annotated[
        Literal["all", "prefill", "decode"], typer.Option(help="Steer prompt tokens, generated tokens, or both.")
    ] = "all",
    where: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="""Which tokens, instead of --phase: '{"answer": [[0, 16]]}' (docs/where.md)."""
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above it, sample.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of sampling.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Show the unsteered text too.")] = False,
    json_: Json = False,
) -> None:
    """Generate text under steering vectors, which add up; without a vector, as the plain model."""
    if not vector and (layers or phase != "all" or where is not None):
        raise CommandError("--layers, --phase and --where say where vectors act, but no --vector is given")
    if where is not None and phase != "all":
        raise CommandError("--where says what --phase says, and more: give one of them")
    given: list[Text] = [*(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    if not given:
        raise CommandError("give a --prompt, or a file with --prompts")
    chosen = read_layers(layers)
    places = {"phase": phase} if where is None else {"where": read_where(where)}
    from trimtab.vectors.dose import dose_warning

    interventions = []
    for text in vector or ():
        loaded, scale = read_vector(text)
        if warning := dose_warning(loaded if chosen is None else loaded.at(chosen), scale):
            typer.echo(f"trimtab: warning: {text}: {warning}", err=True)
        step: dict[str, Any] = {"kind": "add", "vector": loaded, "scale": scale, **places}
        interventions.append(step if chosen is None else {**step, "layers": chosen})
    spec = {"interventions": interventions} if interventions else None

    steered = load_model(model)
    texts = rendered(given, steered.tokenizer, chat=chat)
    chats = [as_chat(one, chat=chat) for one in given]  # which have roles
    import torch

    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    specs = [spec] * len(texts) + [None] * (len(texts) if compare else 0)
    with steered:
        outputs = steered.generate(chats * (2 if compare else 1), specs, max_new_tokens=max_new_tokens, **sampling)
    if json_:
        import json

        typer.echo(json.dumps({"outputs": [_as_json(*row) for row in zip(texts * 2, specs, outputs, strict=False)]}))
        return

    from rich.console import Console
    from rich.text import Text as Styled

    console = Console(highlight=False)
    for index, (line, asked, output) in enumerate(zip(texts * 2, specs, outputs, strict=False)):
        if compare and index in (0, len(texts)):
            console.print(Styled("steered" if asked else "unsteered", "bold cyan" if asked else "bold"))
        console.print(Styled.assemble((line, "dim"), output.text), soft_wrap=True)


def _as_json(prompt: str, spec: Any, output: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "steered": spec is not None,
        **output.receipt.as_json(),
    }
