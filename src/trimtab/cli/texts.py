"""Files of prompts: a text with one a line, or JSON Lines for what a line cannot hold.

A line of a `.jsonl` file is a string (which may hold line breaks), an object with one of the keys of `KEYS`, or a list
of chat messages. A file of pairs has objects with `positive` and `negative`, each of them such a prompt.
"""

import json
from pathlib import Path
from typing import Any

from trimtab.cli.failure import CommandError
from trimtab.errors import SteeringError
from trimtab.json_text import read_json

KEYS = ("prompt", "text", "messages")

Text = str | list[dict[str, Any]]  # a text, or the messages of a chat


def read_prompts(path: Path) -> list[Text]:
    """The prompts of a file, in order; empty lines are skipped.

    Raises `CommandError`, with the number of the line, for one that is no prompt, and where none is left; `OSError` for
    no file.
    """
    if path.suffix != ".jsonl":
        found: list[Text] = [line.strip() for line in _lines(path) if line.strip()]
    else:
        found = [_prompt(value, where) for where, value in _objects(path)]
    if not found:
        raise CommandError(f"{path}: no prompts in it, want one a line")
    return found


def read_pairs(path: Path) -> tuple[list[Text], list[Text]]:
    """Positive and negative prompts of a `.jsonl` file, pair by pair. Raises as `read_prompts` does."""
    positive, negative = [], []
    for where, value in _objects(path):
        if not isinstance(value, dict) or set(value) != {"positive", "negative"}:
            raise CommandError(f'{where}: want {{"positive": ..., "negative": ...}}')
        positive.append(_prompt(value["positive"], f"{where}: positive"))
        negative.append(_prompt(value["negative"], f"{where}: negative"))
    if not positive:
        raise CommandError(f"{path}: no pairs in it, want one a line")
    return positive, negative


def rendered(prompts: list[Text], tokenizer: Any, *, chat: bool) -> list[str]:
    """Each prompt as one text: messages through the tokenizer's chat template, and with `chat` plain texts too, as
    what the user says. Raises `CommandError` where the tokenizer has no template."""
    texts = []
    for prompt in prompts:
        if isinstance(prompt, str) and not chat:
            texts.append(prompt)
            continue
        if not getattr(tokenizer, "chat_template", None):
            raise CommandError("the model's tokenizer has no chat template: give plain prompts, without --chat")
        messages = as_chat(prompt, chat=chat)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of their own
            raise CommandError(f"the chat template refuses {json.dumps(messages)[:120]}: {error}") from None
        texts.append(str(text))
    return texts


def as_chat(prompt: Text, *, chat: bool) -> Text:
    """A prompt, with `chat` a plain text as the message that a user says."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise CommandError(f"{path}: not a UTF-8 text file, want one prompt a line") from None


def _objects(path: Path) -> list[tuple[str, Any]]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON text may hold other separators
    except UnicodeDecodeError:
        raise CommandError(f"{path}: not a UTF-8 text file, want one JSON value a line") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append((f"{path}:{number}", read_json(line)))
        except SteeringError as error:
            raise CommandError(f"{path}:{number}: {error.message}") from None
    return found


def _prompt(value: Any, where: str) -> Text:
    if isinstance(value, dict):
        keys = [key for key in KEYS if key in value]
        if len(keys) != 1:
            raise CommandError(f"{where}: want one of the keys {', '.join(KEYS)}, got {', '.join(map(repr, value))}")
        value = value[keys[0]]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return value
    raise CommandError(f"{where}: want a text that is not empty, or a list of messages with roles")
