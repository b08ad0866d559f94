"""Options that several commands share, and how their text is read."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.failure import CommandError

if TYPE_CHECKING:
    from trimtab.vectors import SteeringVector

BUNDLED = "demo"

Model = Annotated[
    str, typer.Option("--model", "-m", help="Directory or hub name of a model; `demo` is the bundled one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers such as `8-24` or `3,5,7-9`, counted from 0. Default: all.")
]


def read_layers(text: str | None) -> list[int] | None:
    """The layers of `8-24` or `3,5,7-9` in ascending order; None stays None. Raises `CommandError`."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise CommandError(f"--layers {text}: cannot read {part.strip()!r}, want layers such as 8-24 or 3,5,7-9")
        layers.update(range(first, last + 1))
    return sorted(layers)


def read_vector(text: str) -> "tuple[SteeringVector, float]":
    """The vector and scale of `FILE[:SCALE]`, the scale being 1 by default. Raises `SteeringError`, `CommandError`."""
    from trimtab.vectors import SteeringVector

    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return SteeringVector.load(text), 1.0
    try:
        scale = float(number)
    except ValueError:
        return SteeringVector.load(text), 1.0
    if not math.isfinite(scale):
        raise CommandError(f"--vector {text}: the scale {number} is not a finite number")
    return SteeringVector.load(path), scale


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are skipped. Raises `CommandError` where none is left, `OSError` for no file."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise CommandError(f"{path}: not a UTF-8 text file, want one prompt a line") from None
    if not prompts:
        raise CommandError(f"{path}: no prompts in it, want one a line")
    return prompts


def load_model(name: str) -> Any:
    """A `SteeredModel` of a directory, a hub name, or the bundled model. Raises `CommandError` where there is none."""
    quiet_transformers()
    from trimtab.engines.transformers import SteeredModel

    if name == BUNDLED and not Path(name).exists():
        from trimtab.demo import model_path

        name = str(model_path())
    elif name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise CommandError(f"--model {name}: there is no such directory")
    try:
        return SteeredModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"--model {name}: {reason}") from None


def quiet_transformers() -> None:
    """Keep progress bars and hints of other libraries out of the commands' output."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry of a missing network
