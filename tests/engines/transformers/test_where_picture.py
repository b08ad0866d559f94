"""docs/where.md: its picture is what the engine does, and each row of its tables touches what the library touches.

What a library touches is worked out here from what its documentation says; tests/oracles asks those that can be run.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PROMPT, ANSWER = range(14), range(14, 28)
SPECIAL = {0, 1, 5, 6, 12, 13, 27}
TOUCHED: list[set[int]] = [  # the strips of the picture, from its top
    {*PROMPT},
    {*ANSWER},
    {13, *ANSWER},
    {2, 3, 4, 12, 13},
    {14, 15, 16, 17},
    {8, 9},
    {7, 8, 9, 10, 11},
    {*range(28)} - SPECIAL,
    SPECIAL,
    {8, 9, 22, 23},
    {15, 16, 17, 18},
    {*range(20, 28)},
    {*range(22, 28)},
    {*range(14, 19)},
    {*PROMPT} - {2, 3, 4},
    {14, *range(19, 28)},
]


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("draw_where", ROOT / "tools" / "draw_where.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _tool()


def rows(title: str) -> list[tuple[str, str]]:
    """The rows of the table below a heading: what the library calls it, and the `where`; both as code."""
    page = (ROOT / "docs" / "where.md").read_text()
    table = page.partition(f"### {title}\n")[2].partition("\n#")[0]
    return [(theirs, ours) for theirs, ours in re.findall(r"^\| `(.*)` \| `(\{.*\})` \|$", table, re.MULTILINE)]


@cache
def ids() -> tuple[int, ...]:
    prompt, answer = tool.chat_ids(tool.tokenizer())
    assert (len(prompt), len(answer)) == (len(PROMPT), len(ANSWER))
    return (*prompt, *answer)


def places(
    some: Sequence[int], positions: Sequence[int] = (), window: Any = None, tokens: Sequence[int] = ()
) -> set[int]:
    """Of `some` places those with these numbers, in this half-open window, or with these tokens."""
    found = {some[number] for number in positions}
    found |= set(some[slice(*window)]) if window else set()
    return found | {place for place in some if ids()[place] in tokens}


def easysteer(phases: Sequence[str] = (), **selectors: Any) -> set[int]:
    """Phases gate; what is included is joined, all if nothing is; what is excluded is taken off."""
    if trigger := next((name for name in selectors if "_trigger_" in name), None):  # as it was before `ApplySpec`
        (number,), some = selectors[trigger], PROMPT if trigger.startswith("prefill") else ANSWER
        return {some[number]} if trigger.endswith("positions") else set(some)  # of tokens, -1 means each
    found: set[int] = set()
    for phase, some in (("prompt", PROMPT), ("generation", ANSWER)):
        if phase not in phases and not any(name.startswith(phase) for name in selectors):
            continue
        mine = {name.removeprefix(f"{phase}_"): value for name, value in selectors.items() if name.startswith(phase)}
        less = f"exclude_{phase}_"
        gone = {name.removeprefix(less): value for name, value in selectors.items() if name.startswith(less)}
        found |= (places(some, **mine) if mine else set(some)) - places(some, **gone)
    return found


def steering_vectors(min_token_index: int | None = None, token_indices: Any = None) -> set[int]:
    """The index of a tensor of all tokens."""
    everything = [*PROMPT, *ANSWER]
    if isinstance(token_indices, list):
        return {everything[number] for number in token_indices}
    return set(everything[token_indices or slice(min_token_index, None)])


def pyreft(first: str = "", last: str = "") -> set[int]:
    """The first n tokens of a prompt and its last m."""
    return set(PROMPT[: int(first or 0)]) | set(PROMPT[len(PROMPT) - int(last or 0) :])


def neuronpedia(steer_special_tokens: bool, steer_generated_tokens: bool = True) -> set[int]:
    """Special tokens of the prompt are left out, or not; the answer is steered as a whole, or not at all."""
    return set(PROMPT) - (set() if steer_special_tokens else SPECIAL) | (
        set(ANSWER) if steer_generated_tokens else set()
    )


def saklas(
    prompt: bool = True, generated: bool = True, thinking: bool = True, response: bool = True,
    first: int | None = None, after: int | None = None,
) -> set[int]:  # fmt: skip
    """A pass over answer token i makes token i + 1; a section begins behind its start tag and ends with its end tag."""
    begin, end = (tool.tokenizer().convert_tokens_to_ids(tag) for tag in tool.THINK_TAGS)
    found, thinks, ready = set(PROMPT) if prompt else set(), False, False
    for place in ANSWER:
        thinks = (thinks or ready) and ids()[place] != end
        ready = ids()[place] == begin
        step = place - ANSWER[0] + 1
        counted = (first is None or step < first) and (after is None or step >= after)
        if generated and counted and (thinking if thinks else response):
            found.add(place)
    return found


TRIGGERS: dict[str, dict[str, Any]] = {
    "both": {},
    "prompt": {"generated": False},
    "before": {"generated": False},
    "generated": {"prompt": False},
    "response": {"prompt": False},
    "thinking": {"prompt": False, "response": False},
    "after": {"prompt": False, "thinking": False},
    "first:4": {"prompt": False, "first": 4},
    "after:4": {"prompt": False, "after": 4},
}

LIBRARIES: dict[str, Callable[[str], set[int]]] = {
    "EasySteer": lambda told: easysteer(**eval(f"dict({told})")),
    "steering-vectors": lambda told: steering_vectors(**eval(f"dict({told})")),
    "pyreft": lambda told: pyreft(*re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", told).groups("")),
    "Neuronpedia": lambda told: neuronpedia(**eval(f"dict({told})", {"false": False, "true": True})),
    "saklas": lambda told: saklas(**TRIGGERS[told]),
}


def found(wheres: Sequence[dict[str, Any]]) -> list[set[int]]:
    return [{place for place, hit in enumerate(mine) if hit} for mine in tool.touched(wheres)]


def test_the_picture_shows_what_each_selector_touches() -> None:
    assert found(tool.SHOWN) == TOUCHED
    assert (ROOT / "docs" / "images" / "where.svg").read_text() == tool.draw(tool.SHOWN)


def test_each_row_of_the_page_touches_what_its_library_touches() -> None:
    asked = [
        (title, told, json.loads(ours))
        for title in LIBRARIES
        for theirs, ours in rows(title)
        for told in theirs.split("`, `")
    ]
    expected = [LIBRARIES[title](told) for title, told, _ in asked]
    assert {title for title, _, _ in asked} == set(LIBRARIES)
    assert {told for title, told, _ in asked if title == "saklas"} == set(TRIGGERS)
    for (title, told, _), theirs, ours in zip(asked, expected, found([where for _, _, where in asked]), strict=True):
        assert ours == theirs, f"{title}: {told}"


def test_the_example_of_chats_runs_and_steers_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "where.md").read_text(), re.DOTALL)
    exec(code, {})
    for topic, line in zip(("film", "hotel"), capsys.readouterr().out.strip().split("}\n"), strict=True):
        told = line.partition("{'prompt': ")[2]
        assert told.startswith("[["), topic
        assert "'answer': [[0, 16]]" in told


@pytest.mark.parametrize("title", LIBRARIES)
def test_no_row_of_the_page_is_left_out(title: str) -> None:
    page = (ROOT / "docs" / "where.md").read_text()
    table = page.partition(f"### {title}\n")[2].partition("\n#")[0]
    told = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows(title)) == len([line for line in told if "| none" not in line]) > 1
