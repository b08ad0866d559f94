"""`trimtab probe` on the bundled model: the file, the tables, the picture, and what is refused."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from trimtab.cli import main
from trimtab.demo import model_path
from trimtab.demo.gates import beginnings
from trimtab.demo.grammar import sample_review
from trimtab.engines.transformers import SteeredModel
from trimtab.vectors import Probe


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("positive", "negative"):
        (folder / name).write_text("\n".join(beginnings(name, 130, "probe", sentences=2)))
    return folder / "positive", folder / "negative"


@pytest.fixture(scope="module")
def chance(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of reviews that nothing tells apart."""
    folder, rng = tmp_path_factory.mktemp("chance"), random.Random(4)
    for name in ("one", "two"):
        (folder / name).write_text("\n".join(sample_review(rng, sentences=1).text for _ in range(40)))
    return folder / "one", folder / "two"


def arguments_of(files: tuple[Path, Path], output: Path, *more: object) -> list[str]:
    return list(map(str, ["probe", "--positive", files[0], "--negative", files[1], "-o", output, *more]))


def test_a_probe_is_trained_written_and_told_about(texts, tmp_path, capsys):
    output, picture = tmp_path / "p.safetensors", tmp_path / "p.png"
    arguments = arguments_of(texts, output, "--layers", "0-1")
    assert main([*arguments, "--picture", str(picture)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "on 32 positive and 32 negative texts that nothing was chosen by: AUROC 0." in shown
    assert "better than chance, p = 0.0002" in shown
    assert "NOT better" not in shown
    assert "<= 10.0% of texts" in shown
    assert "<= 1.0% of texts: 33 negative texts cannot promise it, 299 could" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    probe = Probe.load(output)
    assert probe.site.layer in (0, 1)

    assert main([*arguments, "--json", "--rate", "0.2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], told["digest"], told["site"]) == (str(output), probe.digest.hex(), str(probe.site))
    assert [(one["unit"], one["false_positive_rate"]) for one in told["thresholds"]] == [("token", 0.2), ("text", 0.2)]
    assert [one["site"] for one in told["layers"]] == ["post_block:0", "post_block:1"]
    assert told["auroc"]["low"] < told["auroc"]["value"] < told["auroc"]["high"]
    assert told["auroc"]["low"] > 0.55
    assert told["better_than_chance"]
    assert told["texts"]["reported_on"] == {"positive": 32, "negative": 32}


def test_a_probe_that_is_not_better_than_chance_is_written_only_by_force(chance, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    assert main(arguments_of(chance, output)) == 1
    printed = capsys.readouterr()
    assert "NOT better than chance, p = " in " ".join(printed.out.split())
    assert printed.err.startswith("trimtab: not better than chance (p = ")
    assert printed.err.count("\n") == 1
    assert not output.exists()

    assert main(arguments_of(chance, output, "--json")) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], told["better_than_chance"]) == (None, False)

    assert main(arguments_of(chance, output, "--force")) == 0
    assert "NOT better than chance" in " ".join(capsys.readouterr().out.split())
    assert Probe.load(output).metadata.extra["better_than_chance"] == "no"


def test_the_promise_holds_on_new_texts_of_the_same_kind(texts, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    assert main(arguments_of(texts, output, "--layers", "1", "--json", "--rate", "0.1")) == 0
    found = {one["unit"]: one["threshold"] for one in json.loads(capsys.readouterr().out)["thresholds"]}
    probe = Probe.load(output)
    with SteeredModel.from_pretrained(model_path()) as model:
        scores = {
            name: [
                one[probe.site] @ probe.direction + probe.bias
                for one in model.activations(beginnings(name, 150, "fresh", sentences=2), [probe.site])
            ]
            for name in ("positive", "negative")
        }
    assert np.mean([(one > found["token"]).mean() for one in scores["negative"]]) <= 0.1
    assert np.mean([(one > found["text"]).any() for one in scores["negative"]]) <= 0.1
    assert np.mean([(one > found["text"]).any() for one in scores["positive"]]) > 0.5


def test_pairs_need_files_of_one_length(texts, tmp_path, capsys):
    shorter = tmp_path / "shorter"
    shorter.write_text("\n".join(texts[1].read_text().splitlines()[:50]))
    assert main(arguments_of((texts[0], shorter), tmp_path / "p.safetensors", "--paired")) != 0
    assert "--paired: " in capsys.readouterr().err


def test_too_few_texts_are_refused(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).write_text("\n".join(f"{name} {n}" for n in range(12)))
    assert main(arguments_of((tmp_path / "one", tmp_path / "two"), tmp_path / "p.safetensors")) == 1
    assert "positive: has 12 different texts; want 20 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "p.gguf"], "want a file name that ends in .safetensors"),
        (["--output", "missing/p.safetensors"], "there is no directory missing"),
        (["--output", "p.safetensors", "--picture", "p.txt"], "want a file name that ends in .png or .svg"),
    ],
)
def test_a_bad_file_name_is_refused_before_anything_is_read(texts, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", "--positive", str(texts[0]), "--negative", str(texts[1]), *arguments]) != 0
    assert message in capsys.readouterr().err
