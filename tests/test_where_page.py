"""What docs/where.md shows can be said, and the numbers that it names are those of the code."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_where_model import acting, unplaced
from trimtab.program import spans
from trimtab.spec import Steering, places
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.schedule import Schedule
from trimtab.spec.where import Where

PAGE = (Path(__file__).parent.parent / "docs" / "where.md").read_text()
FENCED = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
INLINE = re.findall(r"`(\{[^`]*\})`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
LETTERS = {"[...]": "[1]", "[a, b]": "[0, 8]", ": d}": ": 0.5}"}  # what the page leaves open


def values(code: str) -> Iterator[Any]:
    """The JSON values that stand one after the other."""
    for letters, number in LETTERS.items():
        code = code.replace(letters, number)
    while code := code.strip():
        value, end = json.JSONDecoder().raw_decode(code)
        yield value
        code = code[end:]


def read(given: dict[str, Any]) -> None:
    if "interventions" in given:
        Steering.parse(given)
    elif "kind" in given:
        Steering.parse({"interventions": [given]})
    elif given.keys() & {"text", "role"}:
        Where(prompt=given)
    elif given.keys() & {"decay", "ramp"}:
        Schedule(**given)
    else:
        Where(**given)


@pytest.mark.parametrize("code", [*FENCED, *INLINE])
def test_every_example_of_the_page_can_be_said(code: str) -> None:
    for given in values(code):
        read(given)


def test_the_request_of_the_page_can_be_said() -> None:
    (body,) = re.findall(r"```bash\ncurl .*? -d '(.*?)'\n```", PAGE, re.DOTALL)
    given = json.loads(body)
    assert set(given) == {"model", "messages", "steering"}
    assert Steering.parse(given["steering"]).interventions[0].where is not None


def test_the_page_has_examples() -> None:
    assert len(FENCED) >= 2
    assert len(INLINE) >= 8


def test_the_page_names_the_limits() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| ([\d,]+(?: and \d+)?) \|$", PAGE.partition("| limit | |")[2], re.MULTILINE))
    named = [number.replace(",", "") for number in rows.values()]
    assert named == [
        str(spans.MOST_RUNS),
        str(spans.MOST_PROGRAMS),
        str(spans.MOST_ATOMS),
        f"{places.MOST_PLACES} and {places.MOST_TEXTS}",
        str(spans.MOST_ID_RANGES),
        str(spans.LONGEST_SEQUENCE),
        str(places.LARGEST_POSITION),
    ]


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
def test_each_phase_is_the_where_that_the_page_names(phase: str) -> None:
    said = {"prefill": {"prompt": "all"}, "decode": {"answer": "all"}, "all": {}}[phase]
    assert f"`{json.dumps(said)}`" in PAGE
    placed = unplaced([{"phase": phase}, {"where": said}]).placed(PromptTokens(3, [1, 2, 3]))
    assert set(map(frozenset, acting(placed, [1, 2, 3, 4, 5]))) <= {frozenset(), frozenset({0, 1})}
