"""The gated texts as one HTML file without anything from elsewhere: each token's ground shows how open its gate was."""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Protocol

import numpy as np


class GatedText(Protocol):
    """What the page needs of a row."""

    @property
    def sentiment(self) -> str: ...
    @property
    def unsteered(self) -> str: ...
    @property
    def tokens(self) -> tuple[str, ...]: ...
    @property
    def scores(self) -> tuple[float, ...]: ...


_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Gated steering</title>
<style>
body { font: 16px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
p { margin: .3rem 0; } .plain { color: #59636e; }
.row { margin: 1rem 0; padding-left: .8rem; border-left: 3px solid #d0d7de; }
.steered { background: #f6a04d; border-radius: 3px; } h2 { font-size: 1.1rem; margin-top: 2rem; }
</style>
<h1>A vector that acts only where a probe fires</h1>
<p>The tokens on <span class="steered">this ground</span> are those on which the gate opened. Others are shaded by how
near the probe came. Hold the pointer over a token for its score, less the threshold.</p>
"""


def write_page(rows: Iterable[GatedText], path: Path) -> None:
    """Write the page of all `rows`, negative ones first."""
    rows = list(rows)
    parts = [_HEAD]
    for sentiment in ("negative", "positive"):
        parts.append(f"<h2>{sentiment} beginnings</h2>")
        for row in rows:
            if row.sentiment == sentiment:
                tokens = "".join(_token(*pair) for pair in zip(row.tokens, row.scores, strict=True))
                plain = escape(row.unsteered)
                parts.append(f'<div class="row"><p>{tokens}</p><p class="plain">unsteered: ...{plain}</p></div>')
    path.write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")


def _token(token: str, score: float) -> str:
    near = 1 / (1 + float(np.exp(np.clip(-score, -30, 30))))
    style = ' class="steered"' if score > 0 else f' style="background: rgba(246, 160, 77, {0.5 * near:.2f})"'
    return f'<span{style} title="{score:+.2f}">{escape(token)}</span>'
