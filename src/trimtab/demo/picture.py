"""The demonstration's picture: strength against what the grammar finds, one panel per vector."""

from collections.abc import Sequence
from pathlib import Path

from trimtab.demo.contrast import Feature
from trimtab.demo.experiment import CONFIDENCE, USEFUL, SweepPoint

LINES = (  # field of Shares, label, colour, marker
    ("positive", "positive sentences", "#c2410c", "o"),
    ("formal", "formal sentences", "#1d4ed8", "s"),
    ("parsed", "parsed by the grammar", "#4b5563", "^"),
)
TITLES: dict[Feature, str] = {"sentiment": "Sentiment vector", "formality": "Formality vector"}
ENDS: dict[Feature, tuple[str, str]] = {
    "sentiment": ("negative", "positive"),
    "formality": ("informal", "formal"),
}


def draw(sweep: Sequence[SweepPoint], path: Path) -> None:
    """Write the picture of a sweep to `path`, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, (feature, title) in zip(panels, TITLES.items(), strict=True):
        points = [point for point in sweep if point.feature == feature]
        strengths = [point.strength for point in points]
        for name, label, colour, marker in LINES:
            values = [100 * getattr(point.shares, name) for point in points]
            ends = [point.intervals[name] for point in points]
            low, high = [100 * end.low for end in ends], [100 * end.high for end in ends]
            panel.fill_between(strengths, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(strengths, values, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=label)
        for strength in (-USEFUL, USEFUL):
            panel.axvline(strength, color="#9ca3af", linewidth=0.8, linestyle=":", zorder=0)
        less, more = ENDS[feature]
        panel.set_title(title, fontsize=12)
        panel.set_xlabel(f"\N{LEFTWARDS ARROW} more {less}      strength      more {more} \N{RIGHTWARDS ARROW}")
        panel.set_ylim(-3, 103)
        panel.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"share of sentences, %, with {CONFIDENCE:.0%} intervals over texts")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LINES), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
