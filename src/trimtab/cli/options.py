"""Options that several commands share, and how their text is read."""

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.failure import CommandError
from trimtab.cli.texts import Text, read_pairs, read_prompts

if TYPE_CHECKING:
    from trimtab.vectors import SteeringVector

BUNDLED = "demo"
HUB_TIMEOUT = 15.0  # seconds
MAX_SEED = 2**63 - 1  # what every generator takes, with room for the counts that are added to it

Model = Annotated[
    str, typer.Option("--model", "-m", help="Directory or hub name of a model; `demo` is the bundled one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Layers such as `8-24` or `3,5,7-9`, counted from 0. Default: all.")
]

Positive = Annotated[
    Path | None, typer.Option("--positive", help="File of prompts that show the property: one a line, or .jsonl.")
]
Negative = Annotated[Path | None, typer.Option("--negative", help="File of prompts that show its opposite, likewise.")]
Pairs = Annotated[
    Path | None, typer.Option("--pairs", help='Instead of both: .jsonl of {"positive": ..., "negative": ...}.')
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Read each text as what a user says, through the model's chat template.")
]


def read_contrast(positive: Path | None, negative: Path | None, pairs: Path | None) -> tuple[list[Text], list[Text]]:
    """The two lists of prompts, from two files or one. Raises `CommandError` for anything between."""
    if pairs is not None:
        if positive is not None or negative is not None:
            raise CommandError("--pairs holds both lists: leave --positive and --negative out")
        return read_pairs(pairs)
    if positive is None or negative is None:
        raise CommandError("give --positive and --negative, or --pairs")
    return read_prompts(positive), read_prompts(negative)


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
        if not Path(path).exists():  # a colon in the name of a file that is not there
            return SteeringVector.load(text), 1.0
        raise CommandError(f"--vector {text}: the scale {number!r} is not a number; want {path}:1.5, say") from None
    if not math.isfinite(scale):
        raise CommandError(f"--vector {text}: the scale {number} is not a finite number")
    return SteeringVector.load(path), scale


def read_where(text: str) -> Any:
    """The `where` of an intervention, from JSON. Raises `CommandError` for what cannot be one."""
    from trimtab.errors import SteeringError
    from trimtab.json_text import read_json
    from trimtab.spec.where import read

    try:
        value = read_json(text)
        if value is None:
            raise SteeringError("", """got null, want an object, as '{"answer": [[0, 16]]}'""")
        return read(value)
    except SteeringError as error:
        raise CommandError(f"--where {error.field}{': ' * bool(error.field)}{error.message}") from None


def check_output(path: Path, *suffixes: str) -> None:
    """Raise `CommandError` for a file that cannot be written or has none of `suffixes`: before the work, not after."""
    if path.suffix not in suffixes:
        raise CommandError(f"{path}: want a file name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise CommandError(f"{path}: there is no directory {path.parent}")
    if path.is_dir():
        raise CommandError(f"{path}: is a directory")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CommandError(f"{path}: nothing can be written in {path.parent}")


def load_model(name: str) -> Any:
    """A `SteeredModel` of a directory, a hub name, or the bundled model. Raises `CommandError` where there is none."""
    quiet_transformers()
    from trimtab.engines.transformers import SteeredModel

    if name == BUNDLED and not Path(name).exists():
        from trimtab.demo import model_path

        name = str(model_path())
    elif Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser())
        if not (Path(name) / "config.json").is_file():
            raise CommandError(f"--model {name}: holds no model, there is no config.json in it")
    elif name.startswith(("/", ".", "~")):
        raise CommandError(f"--model {name}: there is no such directory")
    else:
        _find_on_hub(name)
    try:
        return SteeredModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"--model {name}: {reason}") from None


def _find_on_hub(name: str) -> None:
    """Raise `CommandError` where a model is neither in the cache nor on the hub, or the hub does not answer.

    The hub's own client tries for minutes and says nothing; a person wants to know at once what it waits for.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return
        typer.echo(f"trimtab: no directory {name}, and not in the cache: asking the hub for it", err=True)
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except HFValidationError:
        raise CommandError(f"--model {name}: there is no such directory, and no model has such a name") from None
    except HfHubHTTPError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"--model {name}: there is no such directory, and the hub says: {reason}") from None
    except Exception as error:  # no network, a proxy, offline mode: each client raises its own
        raise CommandError(
            f"--model {name}: there is no such directory, it is not in the cache, and the hub cannot be reached "
            f"({type(error).__name__})"
        ) from None


def quiet_transformers() -> None:
    """Keep progress bars and hints of other libraries out of the commands' output."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every retry of a missing network
