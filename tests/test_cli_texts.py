"""What the command line takes as prompts, and what it refuses before it starts to work."""

# ruff: noqa: F401, F811  (fixtures of another file)

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_cli import Run, run, vector
from trimtab.cli.failure import CommandError
from trimtab.cli.texts import read_pairs, read_prompts, rendered

CHAT = [{"role": "user", "content": "Was it good?"}]


def jsonl(path: Path, *values: Any) -> Path:
    (path / "texts.jsonl").write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values))
    return path / "texts.jsonl"


def test_lines_of_json_hold_what_lines_of_text_cannot(tmp_path: Path) -> None:
    objects = {"prompt": "a"}, {"text": "b", "label": 1}, CHAT, {"messages": CHAT}
    path = jsonl(tmp_path, '"two\\nlines\\u2028here"', "", *objects)
    assert read_prompts(path) == ["two\nlines\u2028here", "a", "b", CHAT, CHAT]
    (tmp_path / "texts.txt").write_text(" one \n\ntwo\n")
    assert read_prompts(tmp_path / "texts.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":2: is not JSON"),
        ("[" * 5000, ":2: is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', ":2: the key 'prompt' is given twice"),
        ("{}", ":2: want one of the keys prompt, text, messages"),
        ('{"prompt": "a", "text": "b"}', ":2: want one of the keys"),
        ('{"prompt": ""}', ":2: want a text that is not empty"),
        ("3", ":2: want a text"),
        ('[{"content": "no role"}]', ":2: want a text that is not empty, or a list of messages"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_by_its_number(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(CommandError, match=words):
        read_prompts(jsonl(tmp_path, '"fine"', line))


def test_pairs_come_from_one_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"positive": "p1", "negative": "n1"}, {"positive": CHAT, "negative": {"text": "n2"}})
    assert read_pairs(path) == (["p1", CHAT], ["n1", "n2"])
    with pytest.raises(CommandError, match=r':1: want {"positive"'):
        read_pairs(jsonl(tmp_path, {"positive": "p1"}))
    with pytest.raises(CommandError, match="no pairs"):
        read_pairs(jsonl(tmp_path))


class Tokenizer:
    chat_template = "there is one"

    def apply_chat_template(self, messages: Any, **how: Any) -> str:
        assert how == {"tokenize": False, "add_generation_prompt": True}
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_messages_are_rendered_and_texts_where_a_chat_is_asked_for() -> None:
    assert rendered(["a", CHAT], Tokenizer(), chat=False) == ["a", "<user>Was it good?<assistant>"]
    assert rendered(["a"], Tokenizer(), chat=True) == ["<user>a<assistant>"]
    for prompts, chat in (([CHAT], False), (["a"], True)):
        with pytest.raises(CommandError, match="has no chat template"):
            rendered(prompts, object(), chat=chat)


def test_the_scale_of_a_vector_is_named_where_it_is_no_number(run: Run, vector: Path) -> None:
    code, _, err = run("generate", "-p", "Review:", "--vector", f"{vector}:abc")
    assert code == 1
    assert "the scale 'abc' is not a number" in err
    code, _, err = run("generate", "-p", "Review:", "--vector", "nowhere.safetensors:2")
    assert code == 1
    assert "there is no such file" in err


def test_an_output_that_cannot_be_written_is_known_before_the_work(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = "trimtab.engines.transformers.SteeredModel.from_pretrained"
    monkeypatch.setattr(started, lambda name: pytest.fail("the work began"))
    pairs = jsonl(tmp_path, {"positive": "p1", "negative": "n1"})
    (tmp_path / "folder.safetensors").mkdir()
    for command, output, words in (
        ("extract", tmp_path / "v.bin", "want a file name that ends in .safetensors or .gguf"),
        ("probe", tmp_path / "v.gguf", "want a file name that ends in .safetensors"),
        ("extract", tmp_path / "nowhere" / "v.gguf", "there is no directory"),
        ("extract", tmp_path / "folder.safetensors", "is a directory"),
    ):
        code, _, err = run(command, "--pairs", pairs, "-o", output)
        assert code == 1
        assert words in err
    code, _, err = run("extract", "--pairs", pairs, "-o", tmp_path / "v.gguf", "--layers", "0-3")
    assert "llama.cpp cannot steer block 0; leave it out of --layers" in err
    code, _, err = run("extract", "--pairs", pairs, "-o", tmp_path / "v.gguf", "--hook-point", "mlp_out")
    assert "GGUF holds post_block directions alone" in err
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    code, _, err = run("extract", "--pairs", pairs, "-o", tmp_path / "v.gguf")
    assert "nothing can be written in" in err


def test_gguf_leaves_out_the_block_that_it_cannot_hold(
    run: Run,
    tmp_path: Path,
) -> None:
    pytest.importorskip("gguf")
    both = [{"positive": f"I loved the {x}.", "negative": f"I hated the {x}."} for x in ("film", "book")]
    pairs = jsonl(tmp_path, *both)
    code, out, err = run("extract", "--pairs", pairs, "-o", tmp_path / "v.gguf", "--no-sweep", "--json")
    assert (code, err) == (0, "")
    assert [site["layer"] for site in json.loads(out)["sites"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--positive", "a.txt"], "give --positive and --negative, or --pairs"),
        (["--pairs", "a.jsonl", "--negative", "b.txt"], "--pairs holds both lists"),
    ],
)
def test_lists_come_from_two_files_or_from_one(run: Run, arguments: list[str], words: str) -> None:
    for command in ("extract", "probe"):
        code, _, err = run(command, *arguments, "-o", "v.safetensors")
        assert code == 1
        assert words in err


def test_generate_takes_chats_and_files(run: Run, tmp_path: Path) -> None:
    path = jsonl(tmp_path, '"Review of the film:"', '"two\\nlines"')
    code, out, _ = run("generate", "-p", "Review of the book:", "--prompts", path, "--max-new-tokens", 3, "--json")
    assert code == 0
    prompts = [output["prompt"] for output in json.loads(out)["outputs"]]
    assert prompts == ["Review of the book:", "Review of the film:", "two\nlines"]
    code, _, err = run("generate")
    assert code == 1
    assert "give a --prompt, or a file with --prompts" in err


def test_a_model_that_is_nowhere_is_said_to_be_nowhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, as these tests are, and with a hub that does not answer."""
    code, _, err = run("generate", "-p", "a", "--model", "nosuch-model-of-mine")
    assert code == 1
    assert "no directory nosuch-model-of-mine" in err.splitlines()[0]
    assert "the hub cannot be reached" in err.splitlines()[1]

    def unreachable(*_: object, timeout: float, **__: object) -> None:
        assert 0 < timeout <= 60
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    code, _, err = run("generate", "-p", "a", "--model", "some/model")
    assert "the hub cannot be reached (ConnectionError)" in err
    code, _, err = run("generate", "-p", "a", "--model", "not a/valid/name")
    assert "no model has such a name" in err


def test_a_folder_without_a_model_is_said_to_hold_none(run: Run, tmp_path: Path) -> None:
    code, _, err = run("generate", "-p", "a", "--model", tmp_path)
    assert code == 1
    assert err == f"trimtab: --model {tmp_path}: holds no model, there is no config.json in it\n"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "trimtab", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("trimtab ")
