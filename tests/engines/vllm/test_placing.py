"""Steering that says where it acts, from its admission to its prompt: who places it, and what is refused when."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimtab.engines.vllm import plugin
from trimtab.engines.vllm.carried import MARK, TICKET, Carried
from trimtab.engines.vllm.core import checks
from trimtab.engines.vllm.frontend import prompts, requests
from trimtab.engines.vllm.frontend.accounts import Account, Ticket
from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.frontend.pending import Pending
from trimtab.errors import SteeringError
from trimtab.ops.span_buffers import MOST_DRAFTS
from trimtab.program.codec import encode
from trimtab.serving.registry import VectorRegistry
from trimtab.sites import HookPoint, ModelSites, Phase, Site
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.vectors.vector import SteeringVector

pytest.importorskip("vllm")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams

pytestmark = pytest.mark.vllm

SITE = Site(0, HookPoint.POST_BLOCK)
MODEL = ModelSites(8, 2, frozenset({SITE}))
CALM = SteeringVector({SITE: np.arange(1.0, 9.0)})
JOY = SteeringVector({SITE: np.array([1.0, -1.0] * 4)})


def add(name: str = "calm", **more: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": name, **more}]}


LAST = add(where={"prompt": [[-1, None]]})


@pytest.fixture(autouse=True)
def front_end():
    plugin.register()
    front_end = with_default(None)
    requests.set_current_front_end(front_end)
    yield front_end
    requests.set_current_front_end(None)


def with_default(default: Any) -> FrontEnd:
    return FrontEnd(MODEL, VectorRegistry({"calm": CALM, "joy": JOY}), default)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of words: w3, w4, ..., and the tags of thinking."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, 30)), "<think>", "</think>"]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def processor(parser: str = "", known: Any = None) -> Any:
    """As much of vLLM's `InputProcessor` as is asked."""
    return SimpleNamespace(
        tokenizer=known, model_config=SimpleNamespace(get_vocab_size=lambda: 32),
        vllm_config=SimpleNamespace(structured_outputs_config=SimpleNamespace(reasoning_parser=parser)),
    )  # fmt: skip


def rendered(*ids: int, **more: Any) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": list(ids), **more}


def admitted(front_end: FrontEnd, spec: Any) -> Any:
    """Sampling parameters as a door of the server leaves them."""
    account = Account(front_end.admit(spec))
    return SamplingParams(extra_args={"steering": account.admitted, TICKET: Ticket(account)})


def ranges(carried: Carried) -> Any:
    return [(tuple(where.prompt), tuple(where.answer)) for where in (one.where for one in carried.steering.asked)]


def test_a_spec_is_placed_on_each_prompt_by_itself_and_the_callers_parameters_keep_it(front_end) -> None:
    params = admitted(front_end, LAST)
    told = [requests.placed_params(processor(), rendered(*range(3, 3 + n)), params) for n in (2, 5)]
    assert [ranges(one.extra_args["steering"]) for one in told] == [[(((1, 2),), ())], [(((4, 5),), ())]]
    assert isinstance(params.extra_args["steering"], Pending)
    assert requests.placed_params(processor(), "not rendered yet", params) is params
    assert requests.placed_params(processor(), rendered(3), told[0]) is told[0]


def test_the_receipt_of_several_prompts_has_the_place_in_each(front_end) -> None:
    params = admitted(front_end, add(where={"prompt": [[-1, None]], "answer": [[0, 2]]}))
    account = params.extra_args[TICKET].account
    assert not account.placed
    carried = [
        requests.placed_params(processor(), rendered(*range(3, 3 + n)), params).extra_args["steering"] for n in (2, 5)
    ]
    for one, length in zip(carried, (2, 5), strict=True):
        account.begun()
        account.finished(one, length, [7, 8, 9], [3] * length)
    (use,) = account.receipt["interventions"]
    assert [place["prompt"] for place in use["where"]] == [[[1, 2]], [[4, 5]]]
    assert use["tokens"] == 6
    assert account.receipt["steered_tokens"] == {"prefill": 2, "decode": 4}
    assert len({*account.receipt["identity"].values()}) == 1  # that of the spec: the prompts' own differ
    assert [one.steering.identity(Phase.PREFILL) for one in carried] != [*account.receipt["identity"].values()]


def test_one_prompt_that_is_placed_twice_is_told_of_once(front_end) -> None:
    params, prompt = admitted(front_end, LAST), rendered(3, 4)
    first, second = (requests.placed_params(processor(), prompt, params).extra_args["steering"] for _ in range(2))
    assert first is second
    (use,) = params.extra_args[TICKET].account.receipt["interventions"]
    assert use["where"]["prompt"] == [[1, 2]]


def test_what_tokens_decide_is_counted_by_the_answers_own(front_end) -> None:
    params = admitted(front_end, add(where={"after": [7]}))
    account = params.extra_args[TICKET].account
    carried = requests.placed_params(processor(), rendered(3, 7), params).extra_args["steering"]
    account.begun()
    account.finished(carried, 2, [4, 7, 8, 5, 6], [3, 7])  # behind the 7 of the answer; its last was not fed back
    assert account.receipt["steered_tokens"] == {"prefill": 0, "decode": 2}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (add(where={"prompt": [[9, 12]]}), "where"),
        (add(where={"prompt": {"text": "w9"}}), "where.prompt.text"),
        (add(where={"prompt": {"role": "user"}}), "where.prompt.role"),
        (add(where={"tokens": [400]}), "where.tokens"),
    ],
)
def test_a_place_that_the_prompt_does_not_have_is_refused_at_its_field(front_end, spec, field) -> None:
    with pytest.raises(ValueError, match="where") as caught:
        requests.placed_params(processor(known=tokenizer()), rendered(3, 4), admitted(front_end, spec))
    assert isinstance(caught.value, SteeringError)
    assert caught.value.field.startswith(f"steering.interventions[0].{field}")


def test_a_prompt_of_embeddings_has_positions_and_no_tokens(front_end) -> None:
    prompt = {"type": "embeds", "prompt_embeds": np.zeros((5, 8))}
    placed = requests.placed_params(processor(known=tokenizer()), prompt, admitted(front_end, LAST))
    assert ranges(placed.extra_args["steering"]) == [(((4, 5),), ())]
    for where in ({"tokens": [3]}, {"after": [3]}, {"prompt": {"text": "w3"}}):
        with pytest.raises(ValueError, match="embeddings"):
            requests.placed_params(processor(known=tokenizer()), prompt, admitted(front_end, add(where=where)))


def test_a_client_of_the_engine_refuses_before_its_generator_is_iterated(front_end, monkeypatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    seen: list[Any] = []

    async def generate(self: Any, prompt: Any, sampling_params: Any, request_id: Any, *, priority: int = 0) -> Any:
        yield seen.append((prompt, sampling_params, priority))

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    plugin.register()
    client = AsyncLLM.__new__(AsyncLLM)
    client.input_processor = processor()
    with pytest.raises(ValueError, match="where"):
        client.generate(rendered(3), admitted(front_end, add(where={"prompt": [[9, 12]]})), "r")
    answer = client.generate(rendered(3), admitted(front_end, LAST), "r", priority=3)
    with pytest.raises(StopIteration):
        answer.asend(None).send(None)
    ((prompt, params, priority),) = seen
    assert (prompt, priority) == (rendered(3), 3)
    assert isinstance(params.extra_args["steering"], Carried)


def test_responses_are_refused_before_their_generator_is_iterated(front_end, monkeypatch) -> None:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    serving = SimpleNamespace(engine_client=SimpleNamespace(input_processor=processor()))
    more = {"request_id": "r", "engine_input": rendered(3), "context": None}
    begun = OpenAIServingResponses._generate_with_builtin_tools(
        serving, sampling_params=admitted(front_end, LAST), **more
    )
    assert hasattr(begun, "__anext__")
    with pytest.raises(ValueError, match="where"):
        OpenAIServingResponses._generate_with_builtin_tools(
            serving, sampling_params=admitted(front_end, add(where={"prompt": [[9, 12]]})), **more
        )


def test_the_input_processor_places_what_no_client_has(front_end, monkeypatch) -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, supported_tasks: Any) -> Any:
        ids = [int(word[1:]) for word in prompt.split()]
        return SimpleNamespace(sampling_params=params.clone(), prompt_token_ids=ids, prompt_embeds=None)

    monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)
    monkeypatch.setattr(InputProcessor, "tokenizer", tokenizer())
    plugin.register()
    own = InputProcessor.__new__(InputProcessor)
    vars(own).update(vars(processor()) | {"_trimtab_front_end": front_end})
    del own.__dict__["tokenizer"]
    spec = add(where={"prompt": {"text": "w4 w5"}})
    made = own.process_inputs("r", "w3 w4 w5", SamplingParams(extra_args={"steering": spec}), ()).sampling_params
    assert ranges(made.extra_args["steering"]) == [(((1, 3),), ())]
    assert MARK in made.extra_args
    with pytest.raises(ValueError, match="is not in the prompt"):
        own.process_inputs("r", "w3 w4", SamplingParams(extra_args={"steering": spec}), ())


def test_the_tags_of_thinking_are_those_of_the_reasoning_parser(front_end) -> None:
    own = processor("deepseek_r1", tokenizer())
    assert prompts.think_tags(own) == ((("<think>",)), (("</think>",)), False)
    spec = add(where={"section": "thinking"})
    placed = requests.placed_params(own, rendered(3, 30), admitted(front_end, spec)).extra_args["steering"]
    (atom,) = placed.steering.spans.atoms
    assert (atom.opens, atom.closes, atom.is_open) == (((30,),), ((31,),), True)
    assert (
        prompts.think_tags(processor("", tokenizer())) is prompts.think_tags(processor("openai_gptoss", None)) is None
    )


def test_what_waits_for_its_prompt_leaves_its_process_as_nothing_that_an_engine_takes(front_end) -> None:
    pending = front_end.admit(LAST)
    assert copy.deepcopy(pending) is pending
    assert "calm" not in repr(SamplingParams(extra_args={"steering": pending}))
    served = SimpleNamespace(start_vectors={}, start_probes={}, start_vectors_by_digest={}), MODEL, None
    params = SimpleNamespace(extra_args={MARK: True, "steering": pickle.loads(pickle.dumps(pending))})
    with pytest.raises(SteeringError, match="wire"):
        checks.check_request(SimpleNamespace(_trimtab_served=served), SimpleNamespace(sampling_params=params))


def test_a_core_takes_no_spans_of_another_prompt(front_end) -> None:
    def ask(spec: Any, ids: Any, embeddings: Any = None) -> None:
        placed = front_end.admit(spec).place(PromptTokens(3, [3, 4, 5])).steering
        settings = SimpleNamespace(start_vectors={}, start_probes={}, start_vectors_by_digest={})
        params = SimpleNamespace(extra_args={MARK: True, "steering": encode(placed, ())})
        given = SimpleNamespace(sampling_params=params, prompt_token_ids=ids, prompt_embeds=embeddings)
        checks.check_request(SimpleNamespace(_trimtab_served=(settings, MODEL, None)), given)

    ask(LAST, [7, 8, 9])
    ask(LAST, None, np.zeros((3, 8)))
    for ids, embeddings in (([3, 4], None), ([3, 4, 5, 6], None), (None, np.zeros((4, 8)))):
        with pytest.raises(SteeringError, match="placed on a prompt of 3 tokens"):
            ask(LAST, ids, embeddings)
    with pytest.raises(SteeringError, match="embeddings"):
        ask(add(where={"after": [3]}), None, np.zeros((3, 8)))


def test_a_default_that_says_where_is_placed_beside_each_requests_own(front_end) -> None:
    own = with_default({"interventions": add("joy", where={"answer": [[0, 4]]})["interventions"], "binding": False})
    prompt = PromptTokens(3, [3, 4, 5])
    alone, beside = own.admit(None).place(prompt), own.admit(add(where={"prompt": "all"})).place(prompt)
    assert ranges(alone) == [((), ((0, 4),))]
    assert ranges(beside) == [((), ((0, 4),)), (((0, 3),), ())]
    with pytest.raises(SteeringError, match="where") as caught:
        own.admit(add(where={"prompt": [[9, 12]]})).place(prompt)
    assert caught.value.field.startswith("steering.interventions[0].where")


def test_a_binding_default_holds_wherever_a_request_takes_it_back() -> None:
    own = with_default(add("joy"))
    with pytest.raises(SteeringError, match="takes back too much"):
        own.admit(add("joy", scale=-1.0, where={"prompt": [[0, 1]]})).place(PromptTokens(3, [3, 4, 5]))
    assert own.admit(add("joy", scale=-0.25, where={"prompt": [[0, 1]]})).place(PromptTokens(3, [3, 4, 5])).default_left


def test_what_tokens_decide_is_refused_where_more_is_guessed_than_the_device_follows() -> None:
    prompt = PromptTokens(2, [3, 4])
    for drafts in (MOST_DRAFTS, MOST_DRAFTS + 1):
        own = FrontEnd(MODEL, VectorRegistry({"calm": CALM}), drafts=drafts)
        assert own.admit(LAST).place(prompt).steering.spans.prompt_length == 2
        if drafts == MOST_DRAFTS:
            own.admit(add(where={"until": [7]})).place(prompt)
        else:
            with pytest.raises(SteeringError, match="num_speculative_tokens"):
                own.admit(add(where={"until": [7]})).place(prompt)


def test_a_request_counts_as_steered_once_it_is_placed_and_as_refused_where_it_is_not() -> None:
    seen: list[str] = []
    observer = SimpleNamespace(steered=lambda: seen.append("steered"), refused=seen.append)
    own = FrontEnd(MODEL, VectorRegistry({"calm": CALM}), observer=observer)
    door = processor()
    door._trimtab_front_end = own
    params = admitted(own, add(where={"prompt": [[2, 9]]}))
    assert seen == []
    with pytest.raises(ValueError, match="where"):
        requests.placed_params(door, rendered(3), params)
    for prompt in (rendered(3, 4, 5), rendered(3, 4, 5, 6)):
        requests.placed_params(door, prompt, params)
    own.admit(add())
    assert seen == ["prompt", "steered", "steered"]
