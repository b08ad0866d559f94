"""`trimtab probe` on the bundled model: the file, the tables, the picture, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from trimtab.cli import main
from trimtab.demo import model_path
from trimtab.demo.contrast import contrasting_prompts
from trimtab.engines.transformers import SteeredModel
from trimtab.vectors import Probe


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    positive, negative = contrasting_prompts("sentiment", 24, seed=5)
    for name, lines in (("positive", sorted(set(positive))), ("negative", sorted(set(negative)))):
        (folder / name).write_text("\n".join(line.replace("\n", " ") for line in lines))
    return folder / "positive", folder / "negative"


def test_a_probe_is_trained_written_and_told_about(texts, tmp_path, capsys):
    output, picture = tmp_path / "p.safetensors", tmp_path / "p.png"
    arguments = ["probe", "--positive", texts[0], "--negative", texts[1], "-o", output, "--layers", "0-1"]
    assert main([*map(str, arguments), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "held-out AUROC" in shown
    assert "<= 5.0%" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    probe = Probe.load(output)
    assert probe.site.layer in (0, 1)

    assert main([*map(str, arguments), "--json", "--rate", "0.2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["digest"], told["site"]) == (probe.digest.hex(), str(probe.site))
    assert [one["false_positive_rate"] for one in told["thresholds"]] == [0.2]
    assert [one["site"] for one in told["layers"]] == ["post_block:0", "post_block:1"]
    assert told["auroc"] == max(one["auroc"] for one in told["layers"]) > 0.8


def test_the_threshold_holds_on_new_texts(texts, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    arguments = ["probe", "--positive", texts[0], "--negative", texts[1], "-o", output, "--layers", "1", "--json"]
    assert main([*map(str, arguments), "--rate", "0.1"]) == 0
    (operating,) = json.loads(capsys.readouterr().out)["thresholds"]
    probe = Probe.load(output)
    positive, negative = contrasting_prompts("sentiment", 40, seed=99)
    with SteeredModel.from_pretrained(model_path()) as model:
        rates = []
        for lines in (negative, positive):
            rows = np.concatenate([a[probe.site] for a in model.activations(lines, [probe.site])])
            rates.append(float((rows @ probe.direction + probe.bias > operating["threshold"]).mean()))
    assert rates[0] < 0.2
    assert rates[1] > rates[0] + 0.2


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
