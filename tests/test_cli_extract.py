"""`trimtab extract` on the bundled model: what it writes steers at scale 1, and what does not is not written."""

import json
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.vectors import SteeringVector

TOPICS = ("film", "hotel", "phone", "book", "concert", "museum", "bicycle", "restaurant")
ENDINGS = (
    ("I loved it. What a winner!", "I hated it. What a letdown!"),
    ("It was excellent.", "It was terrible."),
    ("We adored it.", "We disliked it."),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    for side, name in enumerate(("praise", "scorn")):
        (folder / name).write_text("\n".join(f"Review of the {t}: {pair[side]}" for t in TOPICS for pair in ENDINGS))
    return folder / "praise", folder / "scorn"


def extract(files: tuple[Path, Path], output: Path, *more: str) -> int:
    arguments = ["extract", "--positive", files[0], "--negative", files[1], "--output", output, *more]
    return main([str(argument) for argument in arguments])


def test_the_printed_command_steers_and_a_dose_too_large_is_warned_of(files, tmp_path, capsys):
    output = tmp_path / "mood.safetensors"
    assert extract(files, output) == 0
    shown = capsys.readouterr().out
    assert f"try it: trimtab generate --model demo --vector {output} --compare --prompt" in shown
    assert "<- scale 1" in shown
    assert "broken" in shown

    generate = ["generate", "--model", "demo", "--vector", str(output), "--compare", "--json"]
    assert main([*generate, "--prompt", "Review of the concert:"]) == 0
    printed = capsys.readouterr()
    steered, plain = (one["text"] for one in json.loads(printed.out)["outputs"])
    assert steered != plain
    assert len(set(steered.split())) >= 6  # no loop of one word
    assert printed.err == ""

    assert main(["generate", "--vector", f"{output}:4", "--prompt", "Review of the concert:", "--json"]) == 0
    assert "scale 4 is a dose of " in capsys.readouterr().err


def test_equal_sets_are_refused(files, tmp_path, capsys):
    output = tmp_path / "v.safetensors"
    for more in ((), ("--no-sweep", "--layers", "1")):
        assert extract((files[0], files[0]), output, *more) == 1
        assert "negative: 24 of its texts are positive as well" in capsys.readouterr().err
    assert not output.exists()


def test_what_is_not_known_to_steer_is_written_only_by_force(files, tmp_path, capsys):
    lines = [sorted(file.read_text().splitlines()) for file in files]
    for name, chosen in (("one", lines[0][::2] + lines[1][::2]), ("two", lines[0][1::2] + lines[1][1::2])):
        (tmp_path / name).write_text("\n".join(chosen))
    mixed, output = (tmp_path / "one", tmp_path / "two"), tmp_path / "v.safetensors"
    assert extract(mixed, output, "--json") == 1
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["output"] is None
    assert told["sweep"]["problem"] in printed.err
    assert not output.exists()
    assert extract(mixed, output, "--force") == 0
    assert "dose_limit" not in SteeringVector.load(output).metadata.extra


def test_few_prompts_are_taken_as_they_are_where_nothing_is_to_be_tried(tmp_path, capsys):
    for name, line in (("one", "good"), ("two", "bad")):
        (tmp_path / name).write_text(line)
    few, output = (tmp_path / "one", tmp_path / "two"), tmp_path / "v.safetensors"
    assert extract(few, output) == 1
    assert "positive: has 1 different prompts; want 20 or more" in capsys.readouterr().err
    assert extract(few, output, "--no-sweep", "--layers", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (site,) = told["sites"]
    assert told["dose"] == pytest.approx(site["norm"] / site["stream_norm"], rel=1e-4)
