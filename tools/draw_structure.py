"""Draw the structure of the package from its imports, lazy ones included: rooms on floors, arrows to what they use.

    python tools/draw_structure.py docs/images/structure.svg [--source src/trimtab]

A room, a folder mostly, stands above all that it imports. Arrows that follow from others are left out;
those of a circle are red.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from html import escape
from pathlib import Path

WIDTH, BOX, LINE, PAD, FLOOR_GAP = 1180, 200, 13, 9, 46
Graph = dict[str, set[str]]

_MARK = (
    '<marker id="{}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" fill="{}"/></marker>'
)
PLAIN, CIRCLE = "#8794a8", "#c0392b"
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="Helvetica, Arial, sans-serif">'
    '<rect width="100%" height="100%" fill="#ffffff"/>'
    f"<defs>{_MARK.format('a', PLAIN)}{_MARK.format('r', CIRCLE)}</defs>"
)


def modules(source: Path) -> dict[str, Path]:
    """Every module below `source` by its dotted name."""
    names = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(source: Path) -> Graph:
    """Which module imports which, wherever in the file it does so."""
    known = modules(source)
    graph: Graph = {name: set() for name in known}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set(_imported(ast.parse(path.read_text()), package, known)) - {name}
    return graph


def _imported(tree: ast.AST, package: str, known: Collection[str]) -> Iterator[str]:
    """The modules among the `known` that a file of `package` imports, or names in a text for `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            named = (f"{module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else module for name in named if name in known or module in known)
        elif isinstance(node, ast.Constant) and str(node.value).count(".") and node.value in known:
            yield str(node.value)


def room(path: Path) -> str:
    """The room of a file: its folder, of the first rank or within an engine; a file beside folders has its own."""
    parts = path.parts
    if parts[0] == "engines" and len(parts) > 2:
        return "/".join(parts[:3]) if parts[1] == "vllm" else "/".join(parts[:2])
    return parts[0] if len(parts) > 1 else "base"


def by_room(graph: Graph, source: Path) -> tuple[dict[str, list[str]], Graph]:
    """The files of each room, and which room uses which. The package's own face belongs to none."""
    paths = {name: path.relative_to(source) for name, path in modules(source).items()}
    inside = {name: room(path) for name, path in paths.items() if path.as_posix() not in ("__init__.py", "__main__.py")}
    files: dict[str, list[str]] = defaultdict(list)
    for name, place in inside.items():
        if paths[name].stem != "__init__":
            files[place].append(paths[name].stem)
    uses: Graph = {place: set() for place in files}
    for name, others in graph.items():
        for other in others:
            place, used = inside.get(name, ""), inside.get(other, "")
            if place in files and used in files and place != used:
                uses[place].add(used)
    return dict(files), uses


def reachable(uses: Graph, start: str) -> set[str]:
    """All that `start` uses, by way of others too."""
    seen: set[str] = set()
    left = list(uses[start])
    while left:
        if (place := left.pop()) not in seen:
            seen.add(place)
            left.extend(uses[place])
    return seen


def floors(uses: Graph) -> dict[str, int]:
    """How high each folder stands: above all that it uses, save in a circle."""
    below = {
        place: {other for other in reachable(uses, place) if place not in reachable(uses, other)} for place in uses
    }
    height: dict[str, int] = {}
    for place in sorted(below, key=lambda place: len(below[place])):
        height[place] = 1 + max((height.get(other, 0) for other in below[place]), default=-1)
    return height


def draw(files: dict[str, list[str]], uses: Graph) -> str:
    """The picture, as SVG."""
    height = floors(uses)
    rows: dict[int, list[str]] = defaultdict(list)
    for place in sorted(uses):
        rows[height[place]].append(place)
    boxes: dict[str, tuple[float, float, float]] = {}  # x, y, height
    lines = {place: _wrapped(sorted(files[place])) for place in files}
    y = 12.0
    per_row = WIDTH // (BOX + 14)
    shelves = [
        rows[floor][i : i + per_row]
        for floor in sorted(rows, reverse=True)
        for i in range(0, len(rows[floor]), per_row)
    ]
    for places in shelves:
        gap = (WIDTH - BOX * len(places)) / (len(places) + 1)
        for index, place in enumerate(places):
            boxes[place] = (gap + index * (BOX + gap), y, 24 + LINE * len(lines[place]) + PAD)
        y += max(boxes[place][2] for place in places) + FLOOR_GAP
    arrows = [
        _arrow(boxes[place], boxes[other], circle=place in reachable(uses, other))
        for place, others in sorted(uses.items())
        for other in sorted(others)
        if place in reachable(uses, other) or not any(other in reachable(uses, near) for near in others - {other})
    ]
    rooms = [_box(place, *boxes[place], lines[place]) for place in sorted(boxes)]
    size = f"0 0 {WIDTH} {y - FLOOR_GAP + 12:.0f}"
    return "\n".join([HEAD.format(size=size), *arrows, *rooms, "</svg>"]) + "\n"


def _box(place: str, x: float, y: float, tall: float, lines: list[str]) -> str:
    bold = f'font-size="{13 if len(place) < 26 else 11}" font-weight="bold" fill="#1d2b40"'
    small = 'font-size="10" fill="#4a5a70"'
    texts = [(y + 17, bold, place), *((y + 33 + LINE * row, small, line) for row, line in enumerate(lines))]
    return "\n".join([
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{tall}" rx="5" fill="#f4f7fb" stroke="#52657f"/>',
        *(f'<text x="{x + PAD:.0f}" y="{at:.0f}" {how}>{escape(text)}</text>' for at, how, text in texts),
    ])  # fmt: skip


def _wrapped(names: list[str], characters: int = 34) -> list[str]:
    lines = [""]
    for name in names:
        longer = f"{lines[-1]}, {name}" if lines[-1] else name
        lines = [*lines[:-1], longer] if len(longer) <= characters or not lines[-1] else [*lines, name]
    return lines


def _arrow(above: tuple[float, float, float], below: tuple[float, float, float], circle: bool) -> str:
    x1, y1 = above[0] + BOX / 2, above[1] + above[2]
    x2, y2 = below[0] + BOX / 2, below[1] - 1
    if y2 < y1:  # to the same floor, or upwards
        y1, y2 = above[1] + above[2] / 2, below[1] + below[2] / 2
        x1, x2 = (above[0] + BOX, below[0]) if above[0] < below[0] else (above[0], below[0] + BOX)
    bend = (y2 - y1) / 2
    colour, mark = (CIRCLE, "r") if circle else (PLAIN, "a")
    path = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.2" marker-end="url(#{mark})"/>'


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--source", type=Path, default=Path("src/trimtab"))
    given = parser.parse_args()
    given.picture.write_text(draw(*by_room(imports(given.source), given.source)))


if __name__ == "__main__":
    main()
