"""`trimtab probe`: a probe from two files of texts, judged on texts of its own, with thresholds to gate with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    from trimtab.training.probe_report import ProbeReport


def probe(
    output: Annotated[Path, typer.Option("--output", "-o", help="Probe file to write: .safetensors.")],
    positive: Positive = None,
    negative: Negative = None,
    pairs: Pairs = None,
    chat: Chat = False,
    model: Model = BUNDLED,
    layers: Layers = None,
    hook_point: Annotated[HookPoint, typer.Option(help="Where to read.")] = HookPoint.POST_BLOCK,
    token: Annotated[
        Literal["all", "last"], typer.Option(help="Train on every token of a text, or on its last one.")
    ] = "all",
    rate: Annotated[
        list[float] | None, typer.Option("--rate", help="False-positive rate to promise; repeatable.")
    ] = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="Line n of both files belongs together and is never split up.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write a probe that is not better than chance too.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw AUROC by layer into this .png or .svg file.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the split into parts.")] = 0,
    json_: Json = False,
) -> None:
    """Train a probe by logistic regression; layer, thresholds and report each come from texts of their own."""
    chosen = read_layers(layers)
    given = read_contrast(positive, negative, pairs)
    check_output(output, ".safetensors")
    if picture is not None:
        check_output(picture, ".png", ".svg")
    if paired and len(given[0]) != len(given[1]):
        raise CommandError(f"--paired: {positive} has {len(given[0])} texts, {negative} has {len(given[1])}")
    steered = load_model(model)
    wanted, opposite = (rendered(texts, steered.tokenizer, chat=chat) for texts in given)
    from trimtab.training.probes import FALSE_POSITIVE_RATES, train_probe

    with steered:
        report = train_probe(
            steered,
            wanted,
            opposite,
            layers=chosen,
            hook_point=hook_point,
            token=token,
            rates=rate or FALSE_POSITIVE_RATES,
            groups=[*range(len(wanted))] * 2 if paired or pairs is not None else None,
            seed=seed,
        )
    written = report.better_than_chance or force
    if written:
        report.probe.save(output)
    if picture is not None:
        draw(report, picture)
    if json_:
        import json

        typer.echo(json.dumps({"output": str(output) if written else None, **report.as_json()}))
    else:
        show(report)
    if not written:
        raise CommandError(
            f"not better than chance (p = {report.p_value:.3g}, want {report.significance:g} or less): {output} is not "
            "written; give more texts, or --force"
        )
    if not json_:
        typer.echo(f"{output}: {report.probe.site}")


def show(report: "ProbeReport") -> None:
    """The report as tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    by_layer = Table("layer", "AUROC", "", title="chosen on the training texts, held out in turn", title_justify="left")
    for result in report.layers:
        mark = "<- chosen" if result.site == report.probe.site else ""
        bar = "#" * round(40 * max(0.0, 2 * result.auroc - 1))
        by_layer.add_row(str(result.site.layer), f"{result.auroc:.3f}", f"{bar} {mark}")
    console.print(by_layer)

    sure = f"{report.confidence:.0%}"
    table = Table("promised", "threshold", "fires on negative", "and on positive", title_justify="left")
    table.title = f"thresholds from {report.thresholds_from[1]} negative texts; what they give on the report's texts"
    for one in report.thresholds:
        for unit, false, true in (
            ("tokens", one.false_positives_per_token, one.true_positives_per_token),
            ("texts", one.false_positives_per_text, one.true_positives_per_text),
        ):
            mine = unit.startswith(one.unit)
            table.add_row(
                f"<= {one.false_positive_rate:.1%} of {unit}" if mine else "",
                f"{one.threshold:.3f}" if mine else "",
                f"{false.value:.1%} of {unit} (at most {false.high:.1%})",
                f"{true.value:.1%} (at least {true.low:.1%})",
            )
    console.print(table)
    for refused in report.unpromised:
        console.print(
            f"<= {refused.false_positive_rate:.1%} of {refused.unit}s: {refused.texts} negative texts cannot promise "
            f"it, {refused.texts_needed} could; theirs is {refused.lowest:.1%}",
            soft_wrap=True,
        )
    verdict = "better than chance" if report.better_than_chance else "NOT better than chance"
    texts = "{} positive and {} negative texts".format(*report.reported_on)
    console.print(f"on {texts} that nothing was chosen by: AUROC {report.auroc} of tokens,", soft_wrap=True)
    console.print(f"{report.auroc_of_texts} of texts by their highest token, {sure} intervals; {verdict}, "
                  f"p = {report.p_value:.3g}", soft_wrap=True)  # fmt: skip
    if report.repeated:
        console.print(f"{report.repeated} texts repeat others or belong to them, and count with them", soft_wrap=True)


def draw(report: "ProbeReport", path: Path) -> None:
    """AUROC by layer, and that of the chosen probe on the report's texts with its interval, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    layers, values = [r.site.layer for r in report.layers], [r.auroc for r in report.layers]
    axes.plot(layers, values, marker="o", color="#1f6feb", label="training texts, held out in turn")
    found, layer = report.auroc, report.probe.site.layer
    reach = [[max(found.value - found.low, 0.0)], [max(found.high - found.value, 0.0)]]
    label = f"texts of the report, {report.confidence:.0%} interval"
    axes.errorbar([layer], [found.value], reach, fmt="s", capsize=4, color="#d1242f", label=label)
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle="--")
    verdict = f"p = {report.p_value:.2g}" + ("" if report.better_than_chance else ": not better than chance")
    axes.set(
        xlabel="layer", ylabel="AUROC of tokens", ylim=(0.2, 1.02), title=f"probe at {report.probe.site}, {verdict}"
    )
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
