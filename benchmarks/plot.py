"""Draw the benchmarks' results and write their tables into the documentation.

    python benchmarks/plot.py               draws docs/images/*.svg
    python benchmarks/plot.py --markdown    also fills docs/performance.md between its markers

Reads `ops*.json` (of `ops.py`), `vllm*.json` (of `vllm_decode.py`), `admission*.json`, `gpu-tests.txt` (of
`make test-gpu`) and `vllm-parity*.txt` (of `gpu_vllm.sh`) in benchmarks/results. What has no result is left as it is.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
WIDTH = 4096  # the width shown; the others are in the tables
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip  # distinct to the colour-blind (Okabe and Ito, 2008)
Records = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--markdown", action="store_true", help="fill the page's tables as well")
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "trimtab", "figure.dpi": 110})

    texts: dict[str, list[str]] = {"ops": [], "vllm": [], "admission": [], "tests": [], "parity": []}
    for path in sorted(options.results.glob("ops*.json")):
        result = json.loads(path.read_text())
        if "operators" not in result:
            continue
        draw_calls(result, options.images / f"{path.stem}-calls.svg")
        texts["ops"].append(ops_text(result, path.stem))
        if "traced" in result:
            draw_layers(result, options.images / f"{path.stem}-layers.svg")
    for path in sorted(options.results.glob("vllm*.json")):
        result = json.loads(path.read_text())
        drawn = not result["settings"].get("eager") and any("decode" in r["workload"] for r in result["records"])
        if drawn:
            draw_vllm(result, options.images / f"{path.stem}.svg")
        texts["vllm"].append(vllm_text(result, path.stem, drawn))
    for path in sorted(options.results.glob("admission*.json")):
        texts["admission"].append(admission_text(json.loads(path.read_text())))
    summary = options.results / "gpu-tests.txt"
    if summary.exists():
        counts = [
            line.strip("= ") for line in summary.read_text().splitlines() if re.search(r"\d (passed|failed)", line)
        ]
        texts["tests"].append("".join(f"- `{count}`\n" for count in counts).strip())
    for path in sorted(options.results.glob("vllm-parity*.txt")):
        texts["parity"].append(f"```\n{path.read_text().strip()}\n```\n")
    if options.markdown:
        page = options.page.read_text()
        for mark, parts in texts.items():
            if parts:
                page = filled(page, mark, "\n".join(parts))
        options.page.write_text(page)


def filled(page: str, mark: str, text: str) -> str:
    """`page` with what stands between its markers replaced. Raises ValueError where they are missing."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no {begin} ... {end}")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


# Operators


def draw_calls(result: dict[str, Any], path: Path) -> None:
    """Microseconds per call against the number of tokens, one panel per memory condition."""
    conditions = [c for c in ("spread", "resident") if _by_tokens(result, c, WIDTH, "rows")]
    figure, panels = plt.subplots(
        1, len(conditions), figsize=(5 + 3 * len(conditions), 4.2), sharey=True, squeeze=False, layout="constrained",
        width_ratios=[2, 1.3][: len(conditions)],
    )  # fmt: skip
    lines = [
        ("row monitor", "baseline", "row monitor, baseline kernel", RED, "--", "D"),
        ("rows", "baseline", "rows, baseline kernel", BLUE, "--", "s"),
        ("row monitor", "in place", "row monitor", RED, "-", "D"),
        ("rows", "in place", "rows", BLUE, "-", "s"),
        ("rows", "copy", "device copy", BLACK, ":", "x"),
        ("idle", "in place", "idle site", GREEN, "-", "o"),
    ]
    for panel, condition in zip(panels[0], conditions, strict=True):
        for scenario, form, label, color, style, marker in lines:
            points = _by_tokens(result, condition, WIDTH, scenario)
            tokens = sorted(points)
            values = [points[n][form] for n in tokens]
            panel.plot(tokens, values, style, color=color, marker=marker, markersize=4.5, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(tokens, [str(n) for n in tokens])
        panel.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        panel.minorticks_off()
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.set_xlabel("tokens in the forward pass")
        panel.set_title(CONDITIONS[condition], fontsize=10)
    panels[0][0].set_ylabel("microseconds per call")
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"One steering call, H = {WIDTH}, bfloat16, {result['machine']['device']}", fontsize=11)
    _save(figure, path)


CONDITIONS = {"spread": "32 sites in turn, more than the cache holds", "resident": "2 sites in turn, held by the cache"}
LAYER_FORMS = {
    "traced rows": ("traced, rows", BLUE),
    "traced row monitor": ("traced, row monitor", RED),
    "operator rows": ("operator, rows", SKY),
    "operator in place, rows": ("operator in place, rows", GREEN),
    "operator row monitor": ("operator, row monitor", ORANGE),
}


def draw_layers(result: dict[str, Any], path: Path) -> None:
    """What steering adds to a layer of a compiled stack."""
    figure, panel = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    records = result["traced"]
    forms = [form for form in LAYER_FORMS if form in records[0]]
    step = 0.8 / len(forms)
    for number, form in enumerate(forms):
        label, color = LAYER_FORMS[form]
        at = [group + (number - (len(forms) - 1) / 2) * step for group in range(len(records))]
        added = [r[form] - r["unsteered"] for r in records]
        bars = panel.bar(at, added, step * 0.92, color=color, label=label)
        panel.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    panel.set_xticks(range(len(records)), [f"{r['N']} tokens\n(layer: {r['unsteered']:.1f} us)" for r in records])
    panel.set_ylabel("microseconds added per layer")
    panel.axhline(0, color=BLACK, linewidth=0.8)
    panel.margins(y=0.15)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    panel.set_title(f"Compiled stack, H = {records[0]['H']}, bfloat16, {result['machine']['device']}", fontsize=11)
    _save(figure, path)


def ops_text(result: dict[str, Any], stem: str) -> str:
    """The tables of one run of `ops.py`."""
    machine = result["machine"]
    parts = [
        f"Machine: {machine['device']}, torch {machine['torch']}, triton {machine['triton']}, CUDA {machine['cuda']}. "
        f"Command: `{result['command']}`.",
        f"![microseconds per call](images/{stem}-calls.svg)",
    ]
    widths = sorted({r["H"] for r in result["operators"]}, key=lambda width: (width != WIDTH, width))
    for condition in CONDITIONS:
        rows = [(width, n, at) for width in widths for n, at in _scenarios(result, condition, width).items()]
        if rows:
            heads = ("H", "N", "copy", "idle", "rows", "rows, baseline", "row monitor", "row monitor, baseline",
                     "rows / copy", "row monitor / rows")  # fmt: skip
            parts += [f"Microseconds per call, {CONDITIONS[condition]}; in place:", _table(heads, [
                (width, n, *(f"{at[s][f]:.2f}" for s, f in CALL_COLUMNS),
                 f"{at['rows']['in place'] / at['rows']['copy']:.2f}",
                 f"{at['row monitor']['in place'] / at['rows']['in place']:.2f}")
                for width, n, at in rows
            ])]  # fmt: skip
            heads = ("H", "N", "rows", "row monitor", "fused monitor", "idle: a copy", "rows, random",
                     "row monitor, random")  # fmt: skip
            parts += ["The same out of place, and in place with rows at random:", _table(heads, [
                (width, n, *(f"{at[s][f]:.2f}" for s, f in MORE_COLUMNS)) for width, n, at in rows
            ])]  # fmt: skip
    if "traced" in result:
        parts.append(f"![microseconds added per layer](images/{stem}-layers.svg)")
        forms = [form for form in LAYER_FORMS if form in result["traced"][0]]
        heads = ("N", "unsteered layer", *(LAYER_FORMS[form][0] for form in forms))
        parts += [f"Microseconds added per layer of a compiled stack, H = {result['traced'][0]['H']}:", _table(heads, [
            (r["N"], f"{r['unsteered']:.2f}", *(f"{r[form] - r['unsteered']:+.2f}" for form in forms))
            for r in result["traced"]
        ])]  # fmt: skip
    parts += ["Against the goals, at H = 4096:", _table(("goal", "measured", ""), _goals(result))]
    return "\n\n".join(parts) + "\n"


CALL_COLUMNS = [
    ("rows", "copy"), ("idle", "in place"), ("rows", "in place"), ("rows", "baseline"), ("row monitor", "in place"),
    ("row monitor", "baseline"),
]  # fmt: skip
MORE_COLUMNS = [
    ("rows", "out of place"), ("row monitor", "out of place"), ("monitor", "out of place"), ("idle", "out of place"),
    ("rows, random", "in place"), ("row monitor, random", "in place"),
]  # fmt: skip


def _goals(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    goals: list[tuple[str, dict[str, float], float]] = []
    for condition in CONDITIONS:
        at = _scenarios(result, condition, WIDTH)
        small, large = [n for n in at if n <= 256], [n for n in at if n >= 2048]
        many = {f"N={n}": at[n]["rows"]["in place"] / at[n]["rows"]["copy"] for n in large}
        goals.append((f"rows within 1.15 of the copy, {condition}", many, 1.15))
        few = {f"N={n}": at[n]["rows"]["in place"] for n in small}
        goals.append((f"rows at most 2.0 us, {condition}", few, 2.0))
        ratio = {f"N={n}": at[n]["row monitor"]["in place"] / at[n]["rows"]["in place"] for n in at}
        goals.append((f"row monitor within 1.25 of rows, {condition}", ratio, 1.25))
        goals.append((f"idle at most 1.4 us, {condition}", {f"N={n}": at[n]["idle"]["in place"] for n in small}, 1.4))
        most = {f"N={n}": at[n]["idle"]["in place"] / at[n]["idle"]["copy"] for n in at if n == 8192}
        goals.append((f"idle within 0.35 of the copy, {condition}", most, 0.35))
    for form, bound in (("traced rows", 0.5), ("traced row monitor", 2.0)):
        added = {f"N={r['N']}": r[form] - r["unsteered"] for r in result.get("traced", [])}
        goals.append((f"{form} adds at most {bound} us per layer", added, bound))
    return [
        (goal, ", ".join(f"{value:.2f} at {n}" for n, value in values.items()),
         "reached" if max(values.values()) <= bound else "missed")
        for goal, values, bound in goals if values
    ]  # fmt: skip


def _scenarios(result: dict[str, Any], condition: str, width: int) -> dict[int, dict[str, dict[str, float]]]:
    """N -> scenario -> form -> microseconds, for the sizes at which all scenarios were run."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for r in result["operators"]:
        if r["memory"] == condition and r["H"] == width and "copy" in r:
            found.setdefault(r["N"], {})[r["scenario"]] = r
    return dict(sorted(found.items()))


def _by_tokens(result: dict[str, Any], condition: str, width: int, scenario: str) -> dict[int, dict[str, float]]:
    return {n: at[scenario] for n, at in _scenarios(result, condition, width).items()}


# vLLM

CASE_STYLES = {
    "stock, second engine": ("#888888", "x"), "idle": (GREEN, "o"), "1 vectors": (BLUE, "s"), "8 vectors": (SKY, "^"),
    "64 vectors": (ORANGE, "v"), "256 vectors": (RED, "D"), "scales": (PURPLE, "P"), "gates, none used": (GREEN, "*"),
    "gates, 1 used": (BLUE, "*"), "gates, 4 used": (RED, "*"), "2 gates, none used": (GREEN, "1"),
    "2 gates, 1 used": (BLUE, "1"), "2 gates, 2 used": (RED, "1"), "monitor, idle": (GREEN, "3"),
    "monitor, 1 vectors": (BLUE, "3"), "monitor, 8 vectors": (SKY, "3"), "monitor, 64 vectors": (ORANGE, "3"),
    "monitor, 256 vectors": (RED, "3"),
}  # fmt: skip
CASE_LABELS = {
    "stock, second engine": "stock, started twice", "stock, third engine": "stock, a third start",
    "idle": "no steering asked", "1 vectors": "1 vector",
    "scales": "1 vector, as many scales", "gates, none used": "4 gates, none used", "gates, 1 used": "4 gates, 1 used",
    "gates, 4 used": "4 gates, 4 used", "monitor, idle": "monitor, no steering asked",
    "monitor, 1 vectors": "monitor, 1 vector",
}  # fmt: skip


def draw_vllm(result: dict[str, Any], path: Path) -> None:
    """What a decode step costs more than stock's, per case and batch: wall time, and the fused kernels alone."""
    steps: Records = [r for r in result["records"] if "decode" in r["workload"] and r["all_ratios"]]
    stock = {r["workload"]: r for r in result["records"] if r["case"] == "stock" and "decode" in r["workload"]}
    workloads = sorted(stock, key=lambda name: (name.startswith("V1"), int(name.split()[-1])))
    cases = [case for case in CASE_STYLES if any(r["case"] == case for r in steps)]
    figure, (wall, fused) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for number, case in enumerate(cases):
        color, marker = CASE_STYLES[case]
        of_case = [r for r in steps if r["case"] == case]
        at = [workloads.index(r["workload"]) + (number - (len(cases) - 1) / 2) * 0.8 / len(cases) for r in of_case]
        middle = [100 * (r["ratio"] - 1) for r in of_case]
        low, high = ([100 * (end(r["all_ratios"]) - 1) for r in of_case] for end in (min, max))
        style = {"fmt": marker, "color": color, "markersize": 5.5, "label": CASE_LABELS.get(case, case)}
        spread = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        wall.errorbar(at, middle, yerr=spread, capsize=3, linewidth=1, **style)
        parts = [_added(r, stock[r["workload"]]) for r in of_case]
        fused.errorbar(at, [float("nan") if part is None else 100 * part for part in parts], **style)
    labels = [f"{name.replace('decode', 'batch')}\n({stock[name]['ms']:.2f} ms)" for name in workloads]
    for panel, title in ((wall, "wall time, least to most of the repeats"), (fused, "the fused kernels alone")):
        panel.set_xticks(range(len(workloads)), labels)
        panel.axhline(0, color=BLACK, linewidth=0.8)
        panel.grid(True, axis="y", color="#dddddd", linewidth=0.6)
        panel.set_title(title, fontsize=10)
    wall.set_ylabel("more than stock, % of its decode step")
    figure.legend(*wall.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=5, loc="outside lower center")
    machine = result["machine"]
    figure.suptitle(f"{result['settings']['shape']}, vLLM {machine['vllm']}, {machine['gpu']}", fontsize=11)
    _save(figure, path)


def vllm_text(result: dict[str, Any], stem: str, picture: bool) -> str:
    """The table of one run of `vllm_decode.py`, below its picture if there is one."""
    machine, settings = result["machine"], result["settings"]
    rows, stock = [], result["records"][0]
    for r in result["records"]:
        if r["case"] == "stock":
            stock = r
        ratios = [ratio - 1 for ratio in r["all_ratios"]]
        traced = ratios and stock["gpu_ms"] and r["gpu_ms"]
        rows.append((
            r["workload"], CASE_LABELS.get(r["case"], r["case"]), f"{r['ms']:.3f}",
            f"{r['ratio'] - 1:+.2%}" if ratios else "",
            f"{min(ratios):+.2%} to {max(ratios):+.2%}" if ratios else "",
            f"{r['gpu_ms'] / stock['gpu_ms'] - 1:+.2%}" if traced else "",
            f"{_added(r, stock):+.2%}" if traced else "",
        ))  # fmt: skip
    heads = ("workload", "case", "ms", "against stock", "spread of repeats", "all GPU time", "fused kernels")
    prompt, new = (96, 128) if settings["throughput"] else (settings["prompt"], settings["new"])
    starts = _starts(result)
    against = f"Stock was started {('once', 'twice', 'three times')[starts - 1]}; ratios are to the first of them"
    order = f"{against}, which started {'last' if settings.get('stock_last') else 'first'}."
    if settings.get("eager"):
        return f"{eager_text(result, earlier='before' in stem)}\n"
    return "\n\n".join([
        f"Machine: {machine['gpu']}, vLLM {machine['vllm']}, torch {machine['torch']}, triton {machine['triton']}. "
        f"Shape `{settings['shape']}`, prompts of {prompt} tokens, {new} new ones, {settings['repeats']} repeats. "
        f"{order}",
        *([f"![overhead per case and batch](images/{stem}.svg)"] if picture else []),
        _table(heads, rows),
    ]) + "\n"  # fmt: skip


def eager_text(result: dict[str, Any], *, earlier: bool) -> str:
    """The table of an eager run. The host takes the time and shares its cores: the least of the repeats says most.

    `earlier` is a run of the code in which no site rested.
    """
    machine, settings, rows = result["machine"], result["settings"], []
    for r in result["records"]:
        same = [o for o in result["records"] if o["workload"] == r["workload"] and o["case"].startswith("stock")]
        best = min(min(o["all_ms"]) for o in same)
        least = min(r["all_ms"])
        rows.append((
            r["workload"], CASE_LABELS.get(r["case"], r["case"]), f"{least:.1f}", f"{r['ms']:.1f}",
            "" if r in same else f"{least / best - 1:+.0%}",
        ))  # fmt: skip
    return "\n\n".join([
        f"Machine: {machine['gpu']}, vLLM {machine['vllm']}, torch {machine['torch']}, triton {machine['triton']}. "
        f"Eager{', before sites could rest' if earlier else ''}, shape `{settings['shape']}`, "
        f"{settings['repeats']} repeats, {_starts(result)} starts of stock.",
        _table(("workload", "case", "ms, least", "ms, median", "least against stock's"), rows),
    ])  # fmt: skip


def _starts(result: dict[str, Any]) -> int:
    """How many engines of stock vLLM a run started for one runner."""
    return 1 + len({r["case"] for r in result["records"] if r["case"].startswith("stock, ")})


def admission_text(result: dict[str, Any]) -> str:
    """The table of one run of `admission.py`: microseconds, those of steered requests as what they add."""
    machine, stages = result["machine"], ("front end", "sent", "engine core", "worker", "rows", "total")
    rows = [
        (
            r["mode"],
            r["case"],
            *(f"{r[stage]:.0f}" if r["case"] == "unsteered" else f"{r[stage]:+.0f}" for stage in stages),
        )
        for r in result["records"]
    ]
    return (
        f"Machine: {machine['device']} with {machine['cores']} cores ({machine['processor']}), vLLM {machine['vllm']}, "
        f"{result['records'][0]['requests']} requests per case. Command: `{result['command']}`.\n\n"
        f"{_table(('', 'request', *stages), rows)}\n"
    )


def _added(record: dict[str, Any], stock: dict[str, Any]) -> float | None:
    """What the kernels that the compiler generated, and our own, take more than stock's: all that steering changes.

    As a part of stock's GPU time; None if one of the two was not traced.
    """
    if not record["gpu_ms"] or not stock["gpu_ms"]:
        return None
    with_steering, without = (
        sum(us for name, (_, us) in r["gpu_kernels"].items() if name.startswith(("triton_", "apply_")))
        for r in (record, stock)
    )
    return float((with_steering - without) / 1e3 / stock["gpu_ms"])


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    main()
