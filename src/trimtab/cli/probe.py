"""`trimtab probe`: a probe from two files of texts, with its AUROC per layer and thresholds to gate with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.options import BUNDLED, Json, Layers, Model, load_model, read_layers, read_prompts

if TYPE_CHECKING:
    from trimtab.vectors.probe_training import ProbeReport


def probe(
    positive: Annotated[Path, typer.Option("--positive", help="Texts for which the probe shall fire, one a line.")],
    negative: Annotated[Path, typer.Option("--negative", help="Texts for which it shall not, one a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Probe file to write: .safetensors.")],
    model: Model = BUNDLED,
    layers: Layers = None,
    hook_point: Annotated[
        Literal["pre_attn", "post_attn", "post_block", "mlp_in", "mlp_out"], typer.Option(help="Where to read.")
    ] = "post_block",
    token: Annotated[
        Literal["all", "last"], typer.Option(help="Train on every token of a text, or on its last one.")
    ] = "all",
    rate: Annotated[
        list[float] | None, typer.Option("--rate", help="False-positive rate to give a threshold for; repeatable.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw AUROC by layer into this .png or .svg file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of held-out texts.")] = 0,
    json_: Json = False,
) -> None:
    """Train a probe by logistic regression; the layer is the one that separates held-out texts best."""
    chosen = read_layers(layers)
    wanted, opposite = read_prompts(positive), read_prompts(negative)
    for path, suffixes in ((output, {".safetensors"}), (picture, {".png", ".svg"})):
        if path is not None and path.suffix not in suffixes:
            raise CommandError(f"{path}: want a file name that ends in {' or '.join(sorted(suffixes))}")
        if path is not None and not path.parent.is_dir():
            raise CommandError(f"{path}: there is no directory {path.parent}")
    steered = load_model(model)
    from trimtab.vectors.probe_training import FALSE_POSITIVE_RATES, train_probe

    with steered:
        report = train_probe(
            steered,
            wanted,
            opposite,
            layers=chosen,
            hook_point=hook_point,
            token=token,
            rates=rate or FALSE_POSITIVE_RATES,
            seed=seed,
        )
    report.probe.save(output)
    if picture is not None:
        draw(report, picture)
    if json_:
        import json

        typer.echo(json.dumps({"output": str(output), **as_json(report)}))
    else:
        show(report, output)


def as_json(report: "ProbeReport") -> dict[str, Any]:
    """The report in plain values."""
    return {
        "digest": report.probe.digest.hex(),
        "site": str(report.probe.site),
        "bias": report.probe.bias,
        "auroc": report.auroc,
        "layers": [{"site": str(result.site), "auroc": result.auroc} for result in report.layers],
        "thresholds": [vars(operating) for operating in report.thresholds],
        "trained_on": report.trained_on,
        "held_out": report.held_out,
    }


def show(report: "ProbeReport", output: Path) -> None:
    """The report as tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    by_layer = Table("layer", "held-out AUROC", "", title=f"trained on {report.trained_on} texts")
    for result in report.layers:
        mark = "<- chosen" if result.site == report.probe.site else ""
        bar = "#" * round(40 * max(0.0, 2 * result.auroc - 1))
        by_layer.add_row(str(result.site.layer), f"{result.auroc:.3f}", f"{bar} {mark}")
    console.print(by_layer)
    table = Table("false positives", "threshold", "measured", "true positives", title="thresholds, per token")
    for one in report.thresholds:
        table.add_row(
            f"<= {one.false_positive_rate:.1%}",
            f"{one.threshold:.3f}",
            f"{one.measured_false_positive_rate:.1%}",
            f"{one.true_positive_rate:.1%}",
        )
    console.print(table)
    console.print(f"{output}: {report.probe.site}, AUROC {report.auroc:.3f} on {report.held_out} held-out texts")


def draw(report: "ProbeReport", path: Path) -> None:
    """AUROC by layer as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([r.site.layer for r in report.layers], [r.auroc for r in report.layers], marker="o", color="#1f6feb")
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle="--")
    axes.axvline(report.probe.site.layer, color="#d1242f", linewidth=1)
    axes.set(xlabel="layer", ylabel="held-out AUROC", ylim=(0.4, 1.02), title=f"probe at {report.probe.site}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
