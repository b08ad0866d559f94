"""Which characters of a decoded prompt each token holds.

A tokenizer decodes a list of ids as a whole, and the text of the whole is not that of its parts one after the other:
characters may be spread over several tokens, a leading space may be lost, a decoder may do as it likes. What each token
holds is worked out from the pieces of the vocabulary, in the two ways in which nearly all are written, and believed
where the pieces make the very text that the tokenizer makes. Otherwise prompts are decoded bit by bit, which is slow
and always right.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

LOST = "\ufffd"
"""What stands for bytes that are no character, or not yet."""

Positions = npt.NDArray[np.int64]


class TokenText(NamedTuple):
    """A text, and where in it the characters of each token begin and stop. Tokens that share a character overlap."""

    text: str
    starts: Positions
    stops: Positions

    def tokens(self, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The tokens that hold any of the characters of each place, as intervals; both are half-open."""
        firsts, stops = np.array(places, np.int64).T
        begins = np.searchsorted(self.stops, firsts, side="right")
        ends = np.searchsorted(self.starts, stops, side="left")
        return zip(begins.tolist(), ends.tolist(), strict=True)


class Pieces:
    """What the tokens of a vocabulary are in bytes, in each way of writing that was tried, by id."""

    def __init__(self) -> None:
        self.ways: dict[Callable[[str], bytes], dict[int, bytes]] = {_of_bytes: {}, _of_sentences: {}}
        self._known: set[int] = set()

    def learn(self, tokenizer: Any, ids: Sequence[int]) -> bool:
        """Make sure that all of `ids` are known; False where their tokenizer does not tell."""
        if new := list(set(ids) - self._known):
            if (names := _names(tokenizer, new)) is None:
                return False
            for token, name in zip(new, names, strict=True):
                for read, known in self.ways.items():
                    known[token] = read(name) if isinstance(name, str) else name or b""
                self._known.add(token)  # last, since other threads may look
        return True


def text_of(tokenizer: Any, ids: list[int], pieces: Pieces) -> TokenText:
    """The text of a prompt by its tokens, special tokens included; `pieces` are those known of its tokenizer."""
    whole = _decoded(tokenizer, ids)
    if pieces.learn(tokenizer, ids):
        for known in pieces.ways.values():
            if (found := _fitting(_from_bytes([known[token] for token in ids]), whole)) is not None:
                return found
    return _bit_by_bit(tokenizer, ids)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    try:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except TypeError:  # not all of them clean up
        text = tokenizer.decode(ids, skip_special_tokens=False)
    return str(text)


def _names(tokenizer: Any, ids: list[int]) -> list[str | bytes | None] | None:
    """The pieces of the vocabulary, as it writes them or as they are in bytes; None where it tells none.

    A token that it does not know, as models have for images, is None too, and decoded to nothing.
    """
    try:
        names = tokenizer.convert_ids_to_tokens(ids)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return None
    whole = (
        isinstance(names, list)
        and len(names) == len(ids)
        and all(isinstance(name, (str, bytes, NoneType)) for name in names)
    )
    return names if whole else None


def _bit_by_bit(tokenizer: Any, ids: list[int]) -> TokenText:
    """Each token as what it adds to those shortly before it; what ends within a character waits for the rest."""
    text, starts, stops = "", [0] * len(ids), [0] * len(ids)
    begin = done = 0  # tokens of the window, and those whose text is known
    while done < len(ids):
        known = len(_decoded(tokenizer, ids[begin:done])) if done > begin else 0
        for end in range(done + 1, min(len(ids), done + _LONGEST_CHARACTER) + 1):
            window = _decoded(tokenizer, ids[begin:end])
            if not window.endswith(LOST):
                break
        starts[done:end] = [len(text)] * (end - done)
        text += window[known:]
        stops[done:end] = [len(text)] * (end - done)
        begin, done = done, end
    return TokenText(text, np.array(starts, np.int64), np.array(stops, np.int64))


_LONGEST_CHARACTER = 8  # tokens that one can be spread over, and then some


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2, Radford et al. 2019).

    Printable characters of Latin-1 stand for themselves, the other bytes are written as characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE = _byte_of_character()
_CHARACTER = {byte: character for character, byte in _BYTE.items()}


def byte_level_name(text: str) -> str:
    """A text as a byte-level vocabulary writes it."""
    return "".join(_CHARACTER[byte] for byte in text.encode("utf-8", "surrogatepass"))


def byte_level_text(name: str) -> str:
    """What a part of such a piece reads; characters that it does not have as a whole are lost."""
    return _of_bytes(name).decode("utf-8", "replace")


def _of_bytes(name: str) -> bytes:
    """A piece of a byte-level vocabulary; added tokens that hold other characters are as they are written."""
    try:
        return bytes([_BYTE[character] for character in name])
    except KeyError:
        return name.encode("utf-8", "surrogatepass")


def is_escaped_byte(name: str) -> bool:
    """Whether a piece of the vocabulary is a byte to which it falls back."""
    return _ESCAPED.fullmatch(name) is not None


def _of_sentences(name: str) -> bytes:
    """A piece of a vocabulary that writes spaces as U+2581 and, where it falls back to them, bytes as <0x0A>."""
    if (byte := _ESCAPED.fullmatch(name)) is not None:
        return bytes([int(byte[1], 16)])
    return name.replace("\u2581", " ").encode("utf-8", "surrogatepass")


_ESCAPED = re.compile("<0x([0-9A-Fa-f]{2})>")


def _from_bytes(pieces: Sequence[bytes]) -> TokenText:
    """The text of some bytes; a character belongs to each token that has some of its bytes."""
    text = b"".join(pieces).decode("utf-8", "surrogateescape")  # so that each lost byte is one character
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    widths[(codes >= 0xDC80) & (codes < 0xDD00)] = 1
    character = np.repeat(np.arange(len(codes)), widths)  # of each byte
    ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    begins = np.concatenate([[0], ends[:-1]])
    at = np.append(character, len(codes))
    starts = at[begins]
    return TokenText(text, starts, np.where(ends > begins, at[np.maximum(ends - 1, 0)] + 1, starts))


def _fitting(found: TokenText, whole: str) -> TokenText | None:
    """What was found, if it is the `whole` text of the tokenizer, perhaps but for a first space that it drops."""
    told = _LOST_BYTES.sub(LOST, found.text)
    wanted = _LOST_BYTES.sub(LOST, whole)
    if told == wanted:
        return found
    if told != " " + wanted:
        return None
    return TokenText(found.text[1:], np.maximum(found.starts - 1, 0), np.maximum(found.stops - 1, 0))


_LOST_BYTES = re.compile("[\ufffd\udc80-\udcff]+")
