"""A server's default is left out where a prompt does not have what its `where` names, and refuses nobody."""

from typing import Any

import pytest

import where_tokenizers
from test_where_model import SITES, VECTORS
from test_where_texts import chat, chatml
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering, Where
from trimtab.spec import Steering
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.unplaced import Unplaced

USER = {"role": "user", "content": "hello"}
OTHER = {"role": "assistant", "content": "what a template has changed"}
CHATS: dict[str, list[dict[str, Any]] | None] = {
    "no chat": None,
    "no such role": [USER],
    "changed by the template": [USER, OTHER],
    "found in two ways": [USER, {"role": "assistant", "content": "s"}],
}


def placed(where: dict[str, Any], prompt: PromptTokens, defaults: int) -> ResolvedSteering:
    steps = [{"kind": "add", "vector": f"v{index}", "where": one} for index, one in enumerate((where, {}))]
    found = Steering.parse({"interventions": steps}).resolve(VECTORS, SITES, defaults=defaults)
    assert isinstance(found, Unplaced)
    return found.placed(prompt)


@pytest.mark.parametrize("case", sorted(CHATS))
def test_a_default_with_a_role_is_left_out_where_the_prompt_does_not_have_it(case: str) -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    prompt = chat(tokenizer, CHATS[case], chatml([USER])[0])  # type: ignore[arg-type]
    role = {"role": "assistant"}
    for where, left in (
        ({"prompt": role}, Where((), ())),
        ({"prompt": [role, [0, 1]]}, Where(((0, 1),), ())),
        ({"answer": "all", "not": {"prompt": role}}, Where((), ((0, None),))),
    ):
        found = placed(where, prompt, defaults=1)
        assert found.asked[0].where == left
        assert found.asked[1].where == Where(((0, prompt.length),), ((0, None),))
        with pytest.raises(SteeringError, match="role: "):
            placed(where, prompt, defaults=0)


@pytest.mark.parametrize(
    "where",
    [
        *({"section": "response"}, {"after": [1]}, {"answer": "all", "special_tokens": False}, {"tokens": [1]}),
        *({"prompt": {"text": "x"}}, {"prompt": {"role": "user"}}, {"not": {"section": "thinking"}}),
    ],
)
def test_a_default_that_needs_tokens_is_left_out_of_embeddings(where: dict[str, Any]) -> None:
    found = placed(where, PromptTokens(3), defaults=1)
    assert found.asked[0].where == Where((), ())
    assert found.asked[1].where == Where(((0, 3),), ((0, None),))
    with pytest.raises(SteeringError, match=r"embeddings|needs a chat"):
        placed(where, PromptTokens(3), defaults=0)
