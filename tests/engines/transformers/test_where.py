"""`where` in this engine, against whole sequences without a cache and a plain hook behind a layer."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import stateful
import torch
from families import FAMILIES
from where_oracle import Act, Hooked

from trimtab.engines.transformers import SteeredModel

HIDDEN = 32
STEPS = 10
Says = Callable[[int, Sequence[int], int], bool]
"""Whether token i of a sequence is touched, whose first n tokens are its prompt."""


def numbers(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


V, PROBE = numbers(1, 6.0), numbers(2, 0.3)
UNIT = V.double() / V.double().norm()


class Kind(NamedTuple):
    """A kind of intervention as a request writes it, and its formula."""

    options: dict[str, Any]
    change: Callable[[torch.Tensor], torch.Tensor]


def at(layer: int, vector: torch.Tensor) -> dict[str, Any]:
    return {"post_block": {str(layer): vector.tolist()}}


KINDS = {
    "add": Kind({}, lambda x: x + V.double()),
    "ablate": Kind({}, lambda x: x - (x @ UNIT) * UNIT),
    "clamp": Kind({"value": 30.0}, lambda x: x + (30.0 - x @ UNIT) * UNIT),
    "gated": Kind(
        {"gate": {"probe": at(0, PROBE), "threshold": 0.1}},
        lambda x: x + torch.sigmoid(x @ PROBE.double() - 0.1) * V.double(),
    ),
}


class Asked(NamedTuple):
    """An intervention behind layer 0 or 1, and a second opinion on the tokens that it is for."""

    where: dict[str, Any]
    says: Says
    kind: str = "add"
    layer: int = 0

    def spec(self) -> dict[str, Any]:
        name = "add" if self.kind == "gated" else self.kind
        return {"kind": name, "vector": at(self.layer, V), "where": self.where, **KINDS[self.kind].options}

    def act(self) -> Act:
        return Act(
            self.layer,
            KINDS[self.kind].change,
            lambda ids, length: [self.says(place, ids, length) for place in range(len(ids))],
        )


def answered(says: Says) -> Says:
    return lambda i, ids, n: i >= n and says(i, ids, n)


def last_of(marks: Sequence[int], ids: Sequence[int]) -> int | None:
    return next((token for token in reversed(ids) if token in marks), None)


Rows = Sequence[tuple[list[int], list[Asked]]]
"""Prompts, and what is asked for each."""

ROWS: Rows = [
    ([5, 17, 3, 44, 9], [Asked({"prompt": [[1, 3], [-1, None]]}, lambda i, ids, n: 1 <= i < 3 or i == n - 1)]),
    ([7, 8], [Asked({"prompt": "all", "not": {"prompt": [[0, 1]]}}, lambda i, ids, n: 1 <= i < n, "ablate")]),
    (
        [60, 2, 33, 21, 80, 6, 11],
        [Asked({"answer": [[0, 2], [4, None]]}, lambda i, ids, n: n <= i < n + 2 or i >= n + 4, "clamp")],
    ),
    (
        [12, 13, 14],
        [Asked({"prompt": [[-1, None]], "answer": "all"}, lambda i, ids, n: i >= n - 1, "gated")],
    ),
    ([9, 9, 4], [Asked({"after": [40, 41]}, answered(lambda i, ids, n: pair_before(i, ids, n)))]),
    ([40], [Asked({"until": [42]}, answered(lambda i, ids, n: 42 not in ids[n : i + 1]), "ablate")]),
    (
        [1, 2, 3, 4],
        [
            Asked(
                {"after": [40], "until": [42]},
                answered(lambda i, ids, n: last_of((40, 42), ids[n:i]) == 40 and ids[i] not in (40, 42)),
                "clamp",
            )
        ],
    ),
    ([50, 40, 51, 41], [Asked({"tokens": [40, 41]}, lambda i, ids, n: ids[i] in (40, 41), "gated")]),
    (
        [50, 40, 51, 41, 7],
        [
            Asked({"answer": [[1, 7]], "not": {"tokens": [41]}}, lambda i, ids, n: n + 1 <= i < n + 7 and ids[i] != 41),
            Asked({"prompt": [[0, 2]], "answer": [[2, 4]]}, lambda i, ids, n: i < 2 or n + 2 <= i < n + 4, "ablate", 1),
        ],
    ),
    (
        [3, 40, 9],  # the block is opened in the prompt
        [
            Asked(
                {"section": {"name": "thinking", "start": [40], "end": [42]}},
                answered(lambda i, ids, n: last_of((40, 42), ids[:i]) == 40 and ids[i] not in (40, 42)),
            ),
            Asked(
                {"section": {"name": "response", "start": [40], "end": [42]}},
                answered(lambda i, ids, n: last_of((40, 42), ids[:i]) != 40 and ids[i] not in (40, 42)),
                "ablate",
                1,
            ),
        ],
    ),
    ([11, 12], []),
]
FORCED = [
    [40, 41, 55, 42, 40, 41, 40, 9, 42, 8],
    [55, 56, 40, 41, 42, 42, 9, 40, 41, 3],
    [42, 40, 40, 41, 57, 42, 58, 40, 59, 41],
    [41, 40, 41, 40, 42, 40, 41, 40, 41, 42],
]


def pair_before(i: int, ids: Sequence[int], n: int) -> bool:
    """Whether 40, 41 stand one behind the other in the answer before token i, and do not end at it."""
    ends = [place for place in range(n + 1, i + 1) if list(ids[place - 1 : place + 1]) == [40, 41]]
    return bool(ends) and i not in ends


def specs(rows: Rows) -> list[dict[str, Any] | None]:
    return [{"interventions": [asked.spec() for asked in acts]} if acts else None for _, acts in rows]


class Said:
    """Makes `generate` choose given tokens, whatever the model says."""

    def __init__(self, rows: Rows) -> None:
        self.width = max(len(prompt) for prompt, _ in rows)
        self.answers = [FORCED[row % len(FORCED)] for row in range(len(rows))]

    def __call__(self, row: int, ids: torch.Tensor) -> list[int]:
        return [self.answers[row][len(ids) - self.width]]


@contextmanager
def seeing(model: Any, layers: Any) -> Any:
    """What comes to the last layer, [rows, columns, H], later passes over earlier ones."""
    passes: list[tuple[int | None, torch.Tensor]] = []
    starts: list[int | None] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # the latter from Transformers 5.24 on
        try:
            starts.append(cache.get_seq_length())
        except (AttributeError, ValueError):
            starts.append(None)

    def see(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes.append((starts[-1], (args[0] if args else kwargs["hidden_states"]).detach().clone()))

    def seen() -> torch.Tensor:
        whole = passes[0][1][:, :0]
        for start, value in passes:
            if start is None:  # no cache, or one that does not say
                start = whole.shape[1] if value.shape[1] == 1 else 0
            whole = torch.cat([whole[:, :start], value], dim=1)
        return whole

    seen.passes = lambda: [value.shape[1] for _, value in passes]
    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        layers[-1].register_forward_pre_hook(see, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def built(name: str) -> tuple[Any, Any]:
    """A tiny model, and its layers."""
    if name in FAMILIES:
        model = FAMILIES[name].model()
        return model, model.get_submodule(FAMILIES[name].path)
    model = stateful.model(name)
    return model, model.get_decoder().layers


def assert_as_hooked(name: str, rows: Rows, answers: Sequence[list[int]], hidden: torch.Tensor) -> None:
    """Every token that was run of every row came to the last layer as with plain hooks."""
    width = max(len(prompt) for prompt, _ in rows)
    for row, ((prompt, acts), answer) in enumerate(zip(rows, answers, strict=True)):
        model, layers = built(name)
        hooked = Hooked(model, layers, [asked.act() for asked in acts], len(prompt))
        hooked.run([*prompt, *answer[:-1]])
        ours = hidden[row, width - len(prompt) : width + len(answer) - 1]
        torch.testing.assert_close(ours, hooked.seen[0], atol=3e-4, rtol=3e-4, msg=lambda m, row=row: f"row {row}: {m}")


CACHES: list[dict[str, Any]] = [{}, {"use_cache": False}, {"prefill_chunk_size": 2}]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3-moe", "opt", "falcon-alibi", "mamba2", "lfm2"])
def test_each_prompt_of_a_batch_is_steered_where_its_own_spec_says(name: str) -> None:
    model, layers = built(name)
    with SteeredModel(model) as steered:
        for options in CACHES if name in FAMILIES else CACHES[:2]:
            prompts = [prompt for prompt, _ in ROWS]
            with seeing(model, layers) as seen:
                out = steered.generate(
                    prompts, specs(ROWS), max_new_tokens=STEPS, prefix_allowed_tokens_fn=Said(ROWS), **options
                )
            assert [one.token_ids for one in out] == Said(ROWS).answers
            assert_as_hooked(name, ROWS, Said(ROWS).answers, seen())


def test_a_monitor_stands_before_what_answers_receive_wherever_that_is() -> None:
    """It reads behind layer 0, where the interventions act, and leaves prompts alone."""
    model, layers = built("llama")
    rows = [(prompt, [asked._replace(kind="add", layer=0) for asked in acts[:1]]) for prompt, acts in ROWS]
    width = max(len(prompt) for prompt, _ in rows)
    monitor = KINDS["gated"].options["gate"]
    with SteeredModel(model, monitor=monitor) as steered, seeing(model, layers) as seen:
        out = steered.generate(
            [prompt for prompt, _ in rows], specs(rows), max_new_tokens=STEPS, prefix_allowed_tokens_fn=Said(rows)
        )
        hidden = seen()
    assert sum(bool(one.receipt.monitor) for one in out) >= 5
    for row, (prompt, acts) in enumerate(rows):
        parts = [
            Act(0, KINDS[kind].change, lambda ids, n, asked=asked, new=new: [
                asked.says(place, ids, n) and (place >= n) is new for place in range(len(ids))
            ])
            for asked in acts for kind, new in (("add", False), ("gated", True))
        ]  # fmt: skip
        plain, at_layers = built("llama")
        hooked = Hooked(plain, at_layers, parts, len(prompt))
        hooked.run([*prompt, *Said(rows).answers[row][:-1]])
        torch.testing.assert_close(hidden[row, width - len(prompt) :], hooked.seen[0], atol=3e-4, rtol=3e-4)
