"""Labelled texts, split into parts that have no text in common: not even one in other letters or other spaces."""

import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, which of them are positive, and the group of each; a group never comes apart."""

    texts: tuple[str, ...]
    positive: Flags  # [texts]
    groups: Numbers  # [texts]

    @classmethod
    def of(
        cls, positive: Sequence[str], negative: Sequence[str], groups: Sequence[Hashable] | None = None
    ) -> "LabelledTexts":
        """Texts that are equal up to case, spaces and punctuation share a group, as do those of one of `groups`.

        `groups` names a group for each positive text, then for each negative one. Raises `SteeringError` for equal
        texts under both labels, and for another number of groups than texts.
        """
        for name, given in (("positive", positive), ("negative", negative)):
            if isinstance(given, str) or not all(isinstance(text, str) for text in given):
                raise SteeringError(name, "want a list of texts")
        check_disjoint(positive, negative)
        texts = (*positive, *negative)
        if groups is not None and len(groups) != len(texts):
            raise SteeringError("groups", f"got {len(groups)} for {len(texts)} texts; want one for each")
        keys: list[list[Hashable]] = [[("text", _plain(text))] for text in texts]
        for place, group in enumerate(groups or ()):
            keys[place].append(("group", group))
        labels = np.arange(len(texts)) < len(positive)
        return cls(texts, labels, _connected(keys))

    def take(self, which: Flags) -> "LabelledTexts":
        """The texts of `which` alone."""
        kept = np.flatnonzero(which)
        return LabelledTexts(tuple(self.texts[i] for i in kept), self.positive[which], self.groups[which])

    def units(self) -> list[Numbers]:
        """The texts of each independent unit: those of one group with one label."""
        both = np.stack([self.groups, self.positive.astype(np.int64)])
        _, unit = np.unique(both, axis=1, return_inverse=True)
        return [np.flatnonzero(unit == number) for number in range(int(unit.max()) + 1)] if len(unit) else []

    def count(self) -> tuple[int, int]:
        """Independent positive units, and negative ones."""
        labels = [bool(self.positive[one[0]]) for one in self.units()]
        return sum(labels), len(labels) - sum(labels)

    def parts(self, shares: Sequence[float], seed: int) -> list["LabelledTexts"]:
        """Split at random into parts of these shares of the groups, for each label alike."""
        part = self.partition(shares, seed)
        return [self.take(part == number) for number in range(len(shares))]

    def partition(self, shares: Sequence[float], seed: int) -> Numbers:
        """[texts]: the number of each text's part."""
        rng = np.random.default_rng(seed)
        part = np.zeros(len(self.texts), np.int64)
        names = np.unique(self.groups)
        labels = [tuple(np.unique(self.positive[self.groups == name])) for name in names]
        for kind in sorted(set(labels)):
            chosen = rng.permutation([name for name, label in zip(names, labels, strict=True) if label == kind])
            ends = np.round(np.cumsum(shares)[:-1] / np.sum(shares) * len(chosen)).astype(int)
            for number, members in enumerate(np.split(chosen, ends)):
                part[np.isin(self.groups, members)] = number
        return part


def check_disjoint(positive: Sequence[str], negative: Sequence[str]) -> None:
    """Raise `SteeringError` where a text stands in both lists."""
    if both := {text.strip() for text in positive} & {text.strip() for text in negative}:
        raise SteeringError("negative", f"{len(both)} of its texts are positive as well, such as {min(both)!r:.60}")


def _plain(text: str) -> str:
    """What is left of a text without case, spaces and punctuation; a text of nothing else stays as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip() or folded.strip()


def _connected(keys: Sequence[Sequence[Hashable]]) -> Numbers:
    """A number for each item, equal for items that share a key, directly or through others."""
    owner: dict[Hashable, int] = {}
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for item, names in enumerate(keys):
        for name in names:
            parent[root(owner.setdefault(name, item))] = root(item)
    return np.array([root(item) for item in range(len(keys))], np.int64)
