"""The command line: what it prints, what it writes, and how it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from trimtab.cli import main
from trimtab.demo import model_path
from trimtab.sites import HookPoint, Site
from trimtab.vectors import Probe, SteeringVector, VectorMetadata

Run = Callable[..., tuple[int, str, str]]

PROMPT = "Review of the film:"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    """A file with directions of length 5 and 10 at two layers."""
    rng = np.random.default_rng(0)
    directions = {}
    for layer, norm in ((1, 5.0), (2, 10.0)):
        direction = rng.normal(size=128)
        directions[Site(layer, HookPoint.POST_BLOCK)] = norm * direction / np.linalg.norm(direction)
    path = tmp_path / "a vector.safetensors"
    SteeringVector(directions, VectorMetadata("a-model", "by hand", "two lengths")).save(path)
    return path


def plain_tokens(prompt: str, count: int, add: dict[int, torch.Tensor] | None = None) -> list[int]:
    """Greedy tokens of the bundled model by Transformers alone, with plain hooks that add to layers' outputs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    for layer, direction in (add or {}).items():
        model.model.layers[layer].register_forward_hook(
            lambda _module, _input, output, direction=direction: (
                (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction
            )
        )
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(inputs["input_ids"], do_sample=False, max_new_tokens=count)
    return list(output[0, inputs["input_ids"].shape[1] :].tolist())


def test_help_names_the_commands_and_is_quick() -> None:
    command = [sys.executable, "-m", "trimtab.cli", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("demo", "generate", "extract", "inspect"):
        assert name in shown
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, trimtab.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "[]"


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "generate" in out


def test_version(run: Run) -> None:
    assert run("--version")[1].startswith("trimtab 0.")


def test_generate_without_a_vector_is_the_plain_model(run: Run) -> None:
    code, out, err = run("generate", "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    assert (code, err) == (0, "")
    (output,) = json.loads(out)["outputs"]
    assert output["token_ids"] == plain_tokens(PROMPT, 12)
    assert output["identity"] == {"prefill": "", "decode": ""}


def test_generate_adds_the_scaled_vectors_at_the_chosen_layers(run: Run, vector: Path) -> None:
    arguments = ("generate", "-p", PROMPT, "--max-new-tokens", 12, "--layers", "2", "--json", "--compare")
    code, out, err = run(*arguments, "--vector", f"{vector}:-1.5", "--vector", vector)
    assert (code, err) == (0, "")
    steered, unsteered = json.loads(out)["outputs"]
    direction = SteeringVector.load(vector).directions[Site(2, HookPoint.POST_BLOCK)]
    assert steered["token_ids"] == plain_tokens(PROMPT, 12, {2: -0.5 * torch.tensor(direction)})
    assert unsteered["token_ids"] == plain_tokens(PROMPT, 12)
    assert steered["steered_tokens"]["prefill"] > 0
    assert unsteered["steered_tokens"] == {"prefill": 0, "decode": 0}


def test_generate_steers_the_tokens_that_where_says(run: Run, vector: Path) -> None:
    arguments = ("generate", "-p", PROMPT, "--max-new-tokens", 6, "--json", "--vector", vector, "--where")
    code, out, err = run(*arguments, '{"prompt": [[0, 2]], "answer": [[1, 3]]}')
    assert (code, err) == (0, "")
    assert json.loads(out)["outputs"][0]["steered_tokens"] == {"prefill": 2, "decode": 2}
    code, out, err = run(*arguments, '{"prompt": {"role": "user"}}', "--chat")
    assert (code, err) == (0, "")
    told = json.loads(out)["outputs"][0]
    assert PROMPT in told["prompt"]
    assert 0 < told["steered_tokens"]["prefill"] < 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--where", "{"), "--where is not JSON"),
        (("--where", "[]"), '--where got [], want an object, as {"answer": [[0, 16]]}'),
        (("--where", "null"), "--where got null, want an object"),
        (("--where", '{"promt": "all"}'), "--where promt: unknown key (did you mean 'prompt'?)"),
        (("--where", "{}", "--phase", "decode"), "--where says what --phase says, and more: give one of them"),
        (("--where", '{"prompt": {"role": "user"}}'), "where.prompt.role: needs a chat"),
        (("--where", '{"prompt": [[90, 99]]}'), "selects nothing"),
    ],
)
def test_generate_says_what_is_wrong_with_where(run: Run, vector: Path, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run("generate", "-p", PROMPT, "--vector", vector, *arguments)
    assert (code, out) == (1, "")
    assert said in err
    assert len(err.splitlines()) == 1
    if arguments[:2] == ("--where", "{}"):
        assert "no --vector is given" in run("generate", "-p", PROMPT, *arguments)[2]


def test_generate_prints_prompt_and_text(run: Run) -> None:
    code, out, _ = run("generate", "-p", PROMPT, "-p", "Notes on the phone:", "--max-new-tokens", 4)
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith(f"{PROMPT} ")
    assert second.startswith("Notes on the phone: ")


def test_extract_writes_the_mean_difference_and_inspect_shows_it(run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sides = {"positive": ["The plot was good.", "", "We loved the soup."], "negative": ["The plot was bad."]}
    for name, lines in sides.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    out_file = tmp_path / "mood.safetensors"
    files = ("--positive", tmp_path / "positive", "--negative", tmp_path / "negative", "-o", out_file)
    code, out, err = run("extract", *files, "--layers", "0-1", "--no-sweep")
    assert (code, err) == (0, "")
    assert "2 positive and 1 negative" in out
    assert "not tried" in out

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    means = {}
    for name, lines in sides.items():
        with torch.no_grad():
            streams = [
                model(**tokenizer(t, return_tensors="pt", return_token_type_ids=False), output_hidden_states=True)
                for t in lines
                if t
            ]
        means[name] = torch.stack([stream.hidden_states[2][0].mean(0) for stream in streams]).mean(0)
    found = SteeringVector.load(out_file)
    assert found.layers == (0, 1)
    np.testing.assert_allclose(
        found.directions[Site(1, HookPoint.POST_BLOCK)], means["positive"] - means["negative"], atol=1e-4
    )

    code, out, err = run("inspect", out_file, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert [(site["layer"], site["hook"]) for site in shown["sites"]] == [(0, "post_block"), (1, "post_block")]
    assert (shown["kind"], shown["digest"]) == ("vector", found.digest.hex())
    assert shown["metadata"]["token"] == "mean"


def test_inspect_draws_norms_to_scale(run: Run, vector: Path) -> None:
    code, out, err = run("inspect", vector)
    assert (code, err) == (0, "")
    bars = [line.count("█") for line in out.splitlines() if "post_block" in line]
    assert bars[1] == 2 * bars[0] > 0
    for text in ("a-model", "by hand", "two lengths", "hidden size 128"):
        assert text in out


def test_inspect_shows_a_probe_with_its_bias(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "anger.safetensors"
    about = VectorMetadata("a-model", "logistic_regression", "two files", extra={"p": "0.001", "auroc": "0.97"})
    probe = Probe.at(Site(7, HookPoint.PRE_ATTN), [3.0, 0.0, -4.0], bias=-0.25, metadata=about)
    probe.save(path)
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    for text in ("a probe, bias -0.25", "hidden size 3", probe.digest.hex()[:16], "pre_attn", "auroc: 0.97", "a-model"):
        assert text in out
    assert out.index("auroc: 0.97") < out.index("p: 0.001")  # in order, which files do not keep
    code, out, err = run("inspect", path, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert (shown["kind"], shown["bias"], shown["hidden_size"]) == ("probe", -0.25, 3)
    assert shown["sites"] == [{"layer": 7, "hook": "pre_attn", "norm": 5.0}]
    assert shown["digest"] == probe.digest.hex()
    assert shown["metadata"]["auroc"] == "0.97"


def test_inspect_refuses_a_file_that_is_neither_vector_nor_probe(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"post_block.1": np.ones(4, np.float32)}, path, {"format": "pt"})
    code, out, err = run("inspect", path)
    assert (code, out) == (1, "")
    assert "metadata.format: is 'pt', want 'trimtab-steering-vector' or 'trimtab-probe'" in err
    assert str(path) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}/none.safetensors"], "none.safetensors"),
        (["inspect", "{text}"], "text.txt"),
        (["generate", "-p", "x", "-v", "{tmp}/none.gguf:2"], "none.gguf: there is no such file"),
        (["generate", "x"], "generate --help"),
        (["generate", "-p", "x", "-v", "{vector}:nan"], "not a finite number"),
        (["generate", "-p", "x", "-v", "{vector}", "--layers", "9-7"], "want layers such as"),
        (["generate", "-p", "x", "-v", "{vector}", "--layers", "3"], "layer 3"),
        (["generate", "-p", "x", "--layers", "1"], "no --vector"),
        (["generate", "-p", "x", "--model", "{tmp}/nowhere"], "no such directory"),
        (["generate", "-p", "x", "--model", "{tmp}"], "--model"),
        (["generate"], "--prompt"),
        (["generate", "-p", "x", "--phase", "later"], "later"),
        (
            ["extract", "--positive", "{tmp}/gone", "--negative", "{text}", "-o", "{tmp}/v.safetensors"],
            "gone: No such file",
        ),
        (["extract", "--positive", "{empty}", "--negative", "{text}", "-o", "{tmp}/v.safetensors"], "no prompts"),
        (["extract", "--positive", "{text}", "--negative", "{text}", "-o", "{tmp}/no/v.safetensors"], "no directory"),
        (["extract", "--positive", "{text}", "--negative", "{text}", "-o", "{tmp}/v.bin"], "v.bin"),
        (["extract", "--positive", "{text}", "--negative", "{text}", "-o", "{tmp}/v.gguf", "--layers", "77"], "77"),
        (["steer"], "steer"),
    ],
)
def test_a_refusal_is_one_line_on_stderr_and_a_failing_exit_code(
    run: Run, tmp_path: Path, vector: Path, arguments: list[str], message: str
) -> None:
    text, empty = tmp_path / "text.txt", tmp_path / "empty.txt"
    text.write_text("some words\n", encoding="utf-8")
    empty.write_text("\n", encoding="utf-8")
    names = {"tmp": tmp_path, "text": text, "empty": empty, "vector": vector}
    code, out, err = run(*(argument.format(**names) for argument in arguments))
    assert code != 0
    assert out == ""
    assert message in err
    assert err.startswith("trimtab: ")
    assert err.count("\n") == 1


def test_a_refusal_of_the_installed_script_has_no_traceback(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "trimtab"
    done = subprocess.run([script, "inspect", tmp_path / "no.gguf"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, vector: Path) -> None:
    def broken(vector: SteeringVector) -> dict[Site, float]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(SteeringVector, "norms", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("inspect", vector)


@pytest.mark.parametrize("seed", [-1, 10**20])
@pytest.mark.parametrize("command", ["extract", "probe", "generate", "demo"])
def test_a_seed_that_no_generator_takes_is_refused_before_the_work(run: Run, command: str, seed: int) -> None:
    needed = () if command == "generate" else ("--output", "nowhere")
    code, out, err = run(command, *needed, "--seed", seed)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'--seed'" in err
