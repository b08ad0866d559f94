"""Which tokens of a vocabulary can hide that a text begins or ends in an answer.

Answers are watched token by token, for the runs of tokens that a text is written as. A tokenizer that has one token
for `>` and a line's end writes a tag before a line's end in other tokens than alone, and whoever watches for those
never sees it. So a text is watched for only where no token goes over its edges; for others there are ids of tokens.

A text that begins or ends with a letter or digit stands for words: where a word goes on there, it need not be seen.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from trimtab.spec.token_text import LOST, byte_level_name, byte_level_text

Encode = Callable[[str], tuple[int, ...]]
Run = tuple[int, ...]

BEFORE = ("", " ", "\n")
"""What a text is tried behind: tokenizers may write it in another way there."""
BESIDE = ("", " ", "\n", "\n\n", "  ", "a", "1", ".", "(")


def hidden_by(text: str, names: Sequence[str], encode: Encode, forms: Sequence[Run]) -> str | None:
    """What hides an edge of `text`: a token among `names`, those of a vocabulary, as it reads; None if none does.

    `forms` are the runs of tokens that are watched for.
    """
    over = [
        (name, read, read(before), read(behind))
        for written, read in _ways(text)
        for name, before, behind in _over_the_edge(written, names)
    ]
    tried: set[tuple[str, str]] = set()
    for name, read, before, behind in sorted(over, key=lambda one: (len(one[0]), one[0])):
        if (before, behind) in tried or _within_a_word(text, before, behind):
            continue
        tried.add((before, behind))
        if LOST in before + behind or not _seen(text, before, behind, encode, forms):
            return read(name)
    return None


def changed_by(text: str, encode: Encode, forms: Sequence[Run], unknown: int | None) -> str | None:
    """What stands beside `text` where it is written in none of its `forms`, though no token goes over its edges:
    tokenizers cut spaces in one way before a word and in another at the end. None if nothing was found that does.

    What has the `unknown` token is in no answer.
    """
    for before, behind in product(BESIDE, BESIDE):
        if not _within_a_word(text, before, behind):
            ids = encode(before + text + behind)
            if unknown not in ids and not any(_holds(ids, form) for form in forms):
                return before + text + behind
    return None


def _ways(text: str) -> Iterator[tuple[str, Callable[[str], str]]]:
    """How vocabularies write a text, and how what they write reads."""
    yield byte_level_name(text), byte_level_text
    for space in ("\u2581", " "):
        yield text.replace(" ", space), lambda name, space=space: name.replace(space, " ")  # type: ignore[misc]


def _over_the_edge(text: str, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Tokens that hold an edge of a text and more, and what they have before it and behind it."""
    first, last, length = text[0], text[-1], len(text)
    for name in names:
        if last in name:
            end = name.find(last) + 1
            while 0 < end < len(name):
                if text.endswith(name[:end]):
                    yield name, "", name[end:]
                elif name.endswith(text, 0, end):
                    yield name, name[: end - length], name[end:]
                end = name.find(last, end) + 1
        if first in name:
            begin = name.find(first, 1)
            while begin > 0:
                if text.startswith(name[begin:]):
                    yield name, name[:begin], ""
                begin = name.find(first, begin + 1)


def _within_a_word(text: str, before: str, behind: str) -> bool:
    """Whether a word goes on at an edge of the text."""
    goes_on_before = bool(before) and _of_word(text[0]) and (before[-1] == LOST or _of_word(before[-1]))
    return goes_on_before or (bool(behind) and _of_word(text[-1]) and (behind[0] == LOST or _of_word(behind[0])))


def _of_word(character: str) -> bool:
    """Whether it is a letter or digit of a script that writes spaces between words."""
    return character.isalnum() and (character < "\u0e00" or "\u1e00" <= character < "\u2000")


def _seen(text: str, before: str, behind: str, encode: Encode, forms: Sequence[Run]) -> bool:
    """Whether a text is written as one of its `forms` with that beside it."""
    if before:
        written = [encode(begin + before + text + behind) for begin in ("", "\n")]
        if not behind:
            return all(any(ids[-len(form) :] == form for form in forms) for ids in written)
        return all(any(_holds(ids, form) for form in forms) for ids in written)
    alone = [(encode(begin + text), encode(begin + text + behind)) for begin in BEFORE]
    return all(more[: len(ids)] == ids for ids, more in alone)


def _holds(ids: Run, form: Run) -> bool:
    return any(ids[place : place + len(form)] == form for place in range(len(ids) - len(form) + 1))
