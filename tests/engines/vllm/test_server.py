"""A real `vllm serve` process, steered over HTTP: every door, every refusal, the routes, the metrics, the end.

The oracle is Transformers with a plain hook on the same weights.
"""

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from vllm_server import KEY, LAYERS, SCALE_OUT, WIDTH, Oracle, Server, make_model

from trimtab.vectors.vector import SteeringVector

pytestmark = pytest.mark.vllm

SERVED_LAYERS = range(3)  # the last layer is left out: what names it must be refused

NUMBERS = np.random.default_rng(7).normal(size=(3, LAYERS, WIDTH)).astype(np.float16).astype(np.float32)

CALM, JOY, FEAR = ({layer: block[layer] for layer in SERVED_LAYERS} for block in NUMBERS)

PROMPT = " ".join(f"w{number}" for number in (17, 203, 88, 41, 154, 9, 66, 230, 71, 120))

COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    make_model(folder / "model")
    vector(CALM).save(folder / "calm.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(
        folder / "model", "--enable-steering", "--steering-vectors", f"calm={folder / 'calm.safetensors'}",
        "--steering-layers", "0-2", "--steering-hook-points", "post_block", *SCALE_OUT,
        log=folder / "server.log", environment={"VLLM_WORKER_MULTIPROC_METHOD": "spawn"},  # as vLLM does
    )  # fmt: skip
    server.wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder / "model")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def sdk(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def vector(rows: dict[int, np.ndarray]) -> SteeringVector:
    return SteeringVector({(layer, "post_block"): row for layer, row in rows.items()})


def add(source: Any, **more: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": source, **more}]}


def packed(rows: dict[int, np.ndarray], hook: str = "post_block") -> dict[str, Any]:
    block = np.stack(list(rows.values())).astype("<f2")
    data = base64.b64encode(block.tobytes()).decode()
    return {hook: {"dtype": "float16", "shape": list(block.shape), "layer_indices": list(rows), "data": data}}


def times(scale: float, rows: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {layer: np.float32(scale) * row for layer, row in rows.items()}


def complete(sdk: openai.OpenAI, extra: dict[str, Any], prompt: str = PROMPT, **more: Any) -> str:
    answer = sdk.completions.create(
        model="tiny", prompt=prompt, max_tokens=COUNT, temperature=0, extra_body=extra, **more
    )
    if more.get("stream"):
        return "".join(part.choices[0].text for part in answer if part.choices)
    return answer.choices[0].text


def chat(sdk: openai.OpenAI, extra: dict[str, Any], prompt: str = PROMPT, **more: Any) -> str:
    # The template ends every prompt with w3.
    answer = sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=COUNT, temperature=0,
        extra_body=extra, **more,
    )  # fmt: skip
    if more.get("stream"):
        return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)
    return answer.choices[0].message.content


def respond(sdk: openai.OpenAI, extra: dict[str, Any], prompt: str = PROMPT, **more: Any) -> str:
    answer = sdk.responses.create(
        model="tiny", input=prompt, max_output_tokens=COUNT, temperature=0, extra_body=extra,
        **more,
    )  # fmt: skip
    if more.get("stream"):
        return "".join(event.delta for event in answer if event.type == "response.output_text.delta")
    return answer.output_text


DOORS = {"completions": (complete, ""), "chat": (chat, " w3"), "responses": (respond, " w3")}

SPECS = {
    "named": (add("calm"), CALM, CALM),
    "scaled": (add("calm", scale=-1.5), times(-1.5, CALM), times(-1.5, CALM)),
    "prefill only": (add("calm", phase="prefill"), CALM, {}),
    "decode only": (add("calm", phase="decode", scale=2), {}, times(2, CALM)),
    "one layer": (add("calm", layers=[1]), {1: CALM[1]}, {1: CALM[1]}),
    "packed": (add(packed(JOY)), JOY, JOY),
    "lists": (add({"post_block": {"2": JOY[2].tolist()}}), {2: JOY[2]}, {2: JOY[2]}),
    "two": (
        {
            "interventions": [
                {"kind": "add", "vector": "calm", "scale": 0.5},
                {"kind": "add", "vector": packed(FEAR), "phase": "decode"},
            ]
        },
        times(0.5, CALM),
        {layer: np.float32(0.5) * CALM[layer] + FEAR[layer] for layer in CALM},
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_answers_what_the_steered_model_says(sdk, oracle, door: str, spec: str, stream: bool):
    call, ending = DOORS[door]
    given, prefill, decode = SPECS[spec]
    expected = oracle.words(PROMPT + ending, COUNT, prefill, decode)
    assert expected != oracle.words(PROMPT + ending, COUNT)
    assert call(sdk, {"steering": given}, stream=stream).strip() == expected


@pytest.mark.parametrize("door", DOORS)
def test_unsteered_requests_are_those_of_the_plain_model(sdk, oracle, door: str):
    call, ending = DOORS[door]
    assert call(sdk, {}).strip() == oracle.words(PROMPT + ending, COUNT)
    assert call(sdk, {"steering": None}).strip() == oracle.words(PROMPT + ending, COUNT)


@pytest.mark.parametrize("door", DOORS)
def test_a_json_string_in_vllm_xargs_is_the_same_spec(sdk, oracle, door: str):
    call, ending = DOORS[door]
    text = call(sdk, {"vllm_xargs": {"steering": json.dumps(add(packed(JOY)))}})
    assert text.strip() == oracle.words(PROMPT + ending, COUNT, JOY, JOY)


def test_the_messages_endpoint_takes_the_same_field(client, oracle):
    body = {"model": "tiny", "max_tokens": COUNT, "temperature": 0, "messages": [{"role": "user", "content": PROMPT}]}
    answer = client.post("/v1/messages", json={**body, "steering": add("calm")}).json()
    assert answer["content"][0]["text"].strip() == oracle.words(PROMPT + " w3", COUNT, CALM, CALM)
    refused = client.post("/v1/messages", json={**body, "stream": True, "steering": add("nobody")})
    assert (refused.status_code, "interventions[0].vector" in refused.text) == (400, True)
    plain = client.post("/v1/messages", json=body).json()  # what one request brought is not left for the next
    assert plain["content"][0]["text"].strip() == oracle.words(PROMPT + " w3", COUNT)


def test_the_token_endpoint_takes_it_in_extra_args_or_on_top_and_refuses_before_streaming(client, oracle):
    tokens = [int(word[1:]) for word in PROMPT.split()]
    sampling = {"max_tokens": COUNT, "temperature": 0}
    body = {
        "model": "tiny",
        "token_ids": tokens,
        "sampling_params": {**sampling, "extra_args": {"steering": add("calm")}},
    }
    answer = client.post("/inference/v1/generate", json=body).json()
    words = " ".join(f"w{token}" for token in answer["choices"][0]["token_ids"])
    assert words == oracle.words(PROMPT, COUNT, CALM, CALM)
    body["sampling_params"]["extra_args"]["steering"] = add("nobody")
    for stream in (False, True):
        assert client.post("/inference/v1/generate", json={**body, "stream": stream}).status_code == 400
    assert client.post("/inference/v1/generate", json={**body, "steering": add("calm")}).status_code == 400
    del body["sampling_params"]["extra_args"]
    top = client.post("/inference/v1/generate", json={**body, "steering": add("calm")}).json()
    assert top["choices"] == answer["choices"]


def test_a_rendered_request_carries_its_spec_to_the_server_that_answers_it(client, oracle):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "steering": add(packed(JOY))}
    (rendered,) = client.post("/v1/completions/render", json=body).json()
    answer = client.post("/inference/v1/generate", json=rendered).json()
    words = " ".join(f"w{token}" for token in answer["choices"][0]["token_ids"])
    assert words == oracle.words(PROMPT, COUNT, JOY, JOY)
    assert client.post("/v1/completions/render", json={**body, "steering": add("nobody")}).status_code == 400


def test_concurrent_users_with_and_without_steering_each_get_their_own_answer(sdk, oracle):
    prompts = [PROMPT, *(" ".join(f"w{17 * number + 5 * word + 3}" for word in range(6)) for number in range(7))]
    cases = [(None, {}, {}), *SPECS.values()]
    jobs = [(prompts[number % 8], *cases[number % len(cases)]) for number in range(45)]

    def ask(job: Any) -> str:
        prompt, given, _, _ = job
        return complete(sdk, {} if given is None else {"steering": given}, prompt).strip()

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, jobs))
    for (prompt, _, prefill, decode), answer in zip(jobs, answers, strict=True):
        assert answer == oracle.words(prompt, COUNT, prefill, decode)


def test_several_choices_of_one_request_are_all_steered(client, oracle):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": COUNT, "n": 3, "temperature": 1, "top_k": 1}
    answer = client.post("/v1/completions", json={**body, "steering": add("calm")}).json()
    expected = oracle.words(PROMPT, COUNT, CALM, CALM)
    assert [choice["text"].strip() for choice in answer["choices"]] == [expected] * 3


BAD = {
    "not an object": (7, "steering"),
    "not json": ("{", "steering"),
    "empty": ({}, "steering.interventions"),
    "empty list": ({"interventions": []}, "steering.interventions"),
    "too many": ({"interventions": add("calm")["interventions"] * 100}, "steering.interventions"),
    "unknown key": ({**add("calm"), "strength": 1}, "steering.strength"),
    "unknown name": (add("nobody"), "steering.interventions[0].vector"),
    "unknown kind": ({"interventions": [{"kind": "x", "vector": "calm"}]}, "steering.interventions[0].kind"),
    "undeclared kind": ({"interventions": [{"kind": "ablate", "vector": "calm"}]}, "steering.interventions[0].kind"),
    "unknown phase": (add("calm", phase="later"), "steering.interventions[0].phase"),
    "unknown hook": (add(packed(CALM, "resid_mid")), "steering.interventions[0].vector.resid_mid"),
    "unserved hook": (add(packed(CALM, "pre_attn")), "steering.interventions[0].vector.pre_attn"),
    "unserved layer": (add({"post_block": {"3": [1.0] * WIDTH}}), "steering.interventions[0].vector.post_block"),
    "unknown layer": (add({"post_block": {"40": [1.0] * WIDTH}}), "steering.interventions[0].vector.post_block"),
    "narrowed away": (add("calm", layers=[3]), "steering.interventions[0].layers"),
    "wrong width": (add({"post_block": {"0": [1.0] * 5}}), "steering.interventions[0].vector"),
    "not finite": (add(packed({0: np.full(WIDTH, np.inf)})), "steering.interventions[0].vector.post_block.data"),
    "text scale": (add("calm", scale="2"), "steering.interventions[0].scale"),
    "huge scale": (add("calm", scale=1e30), "steering.interventions[0].scale"),
    "wrong byte length": (
        add({"post_block": {**packed(CALM)["post_block"], "data": "AAAA"}}),
        "steering.interventions[0].vector.post_block.data",
    ),
    "not base64": (
        add({"post_block": {"dtype": "float16", "shape": [1, 2], "layer_indices": [0], "data": "*" * 8}}),
        "steering.interventions[0].vector.post_block.data",
    ),
    "duplicate layers": (
        add({"post_block": {**packed(CALM)["post_block"], "layer_indices": [0, 1, 1]}}),
        "steering.interventions[0].vector.post_block.layer_indices",
    ),
    "oversize": (
        add({"post_block": {"dtype": "float16", "shape": [3, 1 << 30], "layer_indices": [0, 1, 2], "data": ""}}),
        "steering.interventions[0].vector.post_block.shape",
    ),
    "unknown gate": (add("calm", gate={"probe": "p", "threshold": 0.0}), "steering.interventions[0].gate"),
}  # fmt: skip

BODIES = {
    "/v1/completions": {"model": "tiny", "prompt": PROMPT, "max_tokens": 4},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
    "/v1/responses": {"model": "tiny", "input": PROMPT, "max_output_tokens": 16},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_steering_is_a_400_that_names_the_field_before_any_stream(client, case: str):
    given, field = BAD[case]
    for path, body in BODIES.items():
        for stream in (False, True):
            answer = client.post(path, json={**body, "steering": given, "stream": stream})
            assert answer.status_code == 400, (path, stream, answer.text)
            error = answer.json()["error"]
            assert error["param"].startswith(field), (path, error)
            assert error["param"] in error["message"]
    inner = client.post(
        "/v1/completions", json={**BODIES["/v1/completions"], "vllm_xargs": {"steering": json.dumps(given)}}
    )
    assert inner.status_code == 400


Chosen = Callable[[list[int], int, int], bool]  # of all tokens so far, a position, and where the answer begins

WHERE: dict[str, tuple[dict[str, Any], Chosen]] = {
    "from the last prompt token on": ({"prompt": [[-1, None]], "answer": "all"}, lambda ids, at, end: at >= end - 1),
    "the first of the answer": ({"answer": [[0, 3]]}, lambda ids, at, end: end <= at < end + 3),
    "all but the prompt's last": ({"not": {"prompt": [[-2, None]]}}, lambda ids, at, end: not end - 2 <= at < end),
    "a text of the prompt": ({"prompt": {"text": "w88 w41"}}, lambda ids, at, end: at in (2, 3)),
    "some tokens": ({"tokens": [*range(3, 130)]}, lambda ids, at, end: ids[at] < 130),
    "all but special tokens": ({"special_tokens": False}, lambda ids, at, end: ids[at] > 2),
}

# By a word; and by its id, and whether what the prompt says of it counts: what a user says in a chat does not.
BY_WORD: dict[str, tuple[Callable[[str], dict[str, Any]], Callable[[int, bool], Chosen]]] = {
    "behind it": (
        lambda word: {"after": word},
        lambda word, _: lambda ids, at, end: word in ids[end:at] and ids[at] != word,
    ),
    "before it": (
        lambda word: {"until": word},
        lambda word, _: lambda ids, at, end: at >= end and word not in ids[end : at + 1],
    ),
    "in the response": (
        lambda word: {"section": {"name": "response", "start": "w120", "end": [int(word[1:])]}},
        lambda word, said: lambda ids, at, end: at >= end and ids[at] not in (word, 120) and word == next(
            (tag for tag in reversed(ids[end:at]) if tag in (word, 120)), 120 if said else word
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("door", DOORS)
def test_where_is_placed_on_the_prompt_that_each_door_makes(sdk, oracle, door: str, stream: bool):
    call, ending = DOORS[door]
    prompt = PROMPT + ending
    end, plain = len(prompt.split()), oracle.words(prompt, COUNT)
    added = times(2, JOY)

    def check(places: dict[str, Any], chosen: Chosen) -> None:
        expected = oracle.words_where(prompt, COUNT, added, lambda ids, at: chosen(ids, at, end))
        assert expected != plain, places
        assert call(sdk, {"steering": add(packed(JOY), scale=2, where=places)}, stream=stream).strip() == expected, (
            places
        )

    for places, chosen in WHERE.values():
        check(places, chosen)
    always = oracle.words(prompt, COUNT, {}, added).split()
    for name, (places_by, chosen_by) in BY_WORD.items():
        word = (always if name == "before it" else plain.split())[2]
        check(places_by(word), chosen_by(int(word[1:]), door.startswith("completions")))


def test_where_is_placed_on_each_prompt_of_a_body_by_itself(client, oracle):
    prompts = [PROMPT, "w41 w9", " ".join(PROMPT.split()[::-1])]
    given = add("calm", scale=2, where={"prompt": [[-2, -1], {"text": "w41"}], "answer": [[1, 3]]})
    body = {"model": "tiny", "prompt": prompts, "max_tokens": COUNT, "temperature": 1, "top_k": 1, "n": 2}
    answer = client.post("/v1/completions", json={**body, "steering": given}).json()
    told = [choice["text"].strip() for choice in answer["choices"]]
    ranges = []
    for number, prompt in enumerate(prompts):
        ids = [int(word[1:]) for word in prompt.split()]
        end = len(ids)
        chosen = {at for at in range(end) if ids[at] == 41} | {end - 2, end + 1, end + 2}
        expected = oracle.words_where(prompt, COUNT, times(2, CALM), lambda ids, at, chosen=chosen: at in chosen)
        assert told[2 * number : 2 * number + 2] == [expected] * 2
        ranges.append(chosen)
    (use,) = answer["steering"]["interventions"]
    assert [{at for first, stop in one["prompt"] for at in range(first, stop)} for one in use["where"]] == [
        {at for at in chosen if at < len(prompt.split())} for chosen, prompt in zip(ranges, prompts, strict=True)
    ]
    assert [one["answer"] for one in use["where"]] == [[[1, 3]]] * 3
    assert use["tokens"] == 2 * sum(map(len, ranges))


def test_the_roles_of_a_chat_are_found_in_the_prompt_that_the_template_made(client, oracle):
    messages = [
        {"role": "system", "content": "w17 w203"}, {"role": "user", "content": "w88 w41"},
        {"role": "assistant", "content": "w154 w9"}, {"role": "user", "content": [{"type": "text", "text": "w66 w88"}]},
    ]  # fmt: skip
    prompt = "w17 w203 w88 w41 w154 w9 w66 w88 w3"
    body = {"model": "tiny", "messages": messages, "max_tokens": COUNT, "temperature": 0}
    for role, chosen in (
        ({"role": "user"}, {2, 3, 6, 7}),
        ({"role": "user", "turns": "last"}, {6, 7}),
        ({"role": "assistant"}, {4, 5}),
    ):
        expected = oracle.words_where(prompt, COUNT, times(3, FEAR), lambda ids, at, chosen=chosen: at in chosen)
        given = add(packed(FEAR), scale=3, where={"prompt": role})
        answer = client.post("/v1/chat/completions", json={**body, "steering": given}).json()
        assert answer["choices"][0]["message"]["content"].strip() == expected
    user = {"steering": add(packed(FEAR), scale=3, where={"prompt": {"role": "user"}})}
    anthropic = {"model": "tiny", "max_tokens": COUNT, "temperature": 0, "system": "w17 w203", "messages": messages[1:]}
    answer = client.post("/v1/messages", json={**anthropic, **user}).json()
    expected = oracle.words_where(prompt, COUNT, times(3, FEAR), lambda ids, at: at in {2, 3, 6, 7})
    assert answer["content"][0]["text"].strip() == expected
    batch = {**body, "messages": [messages, messages[1:2]], **user}
    answer = client.post("/v1/chat/completions/batch", json=batch).json()
    told = [choice["message"]["content"].strip() for choice in answer["choices"]]
    assert told == [expected, oracle.words_where("w88 w41 w3", COUNT, times(3, FEAR), lambda ids, at: at < 2)]


NOWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "a text that is not there": ({"prompt": {"text": "w99"}}, "steering.interventions[0].where.prompt.text"),
    "a range behind the prompt": ({"prompt": [[400, 500]]}, "steering.interventions[0].where.prompt"),
    "a role without a chat": ({"prompt": {"role": "assistant"}}, "steering.interventions[0].where.prompt.role"),
    "a word of several tokens": ({"tokens": ["w3 w4"]}, "steering.interventions[0].where.tokens"),
    "tags that nobody knows": ({"section": "thinking"}, "steering.interventions[0].where.section"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_a_place_that_a_prompt_does_not_have_is_a_400_before_any_stream(client, case: str):
    places, field = NOWHERE[case]
    given = add("calm", where=places)
    tokens = {"token_ids": [17, 203], "sampling_params": {"max_tokens": 4}}
    messages = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": PROMPT}]}
    for path, body in {**BODIES, "/inference/v1/generate": tokens, "/v1/messages": messages}.items():
        for stream in (False, True):
            answer = client.post(path, json={**body, "steering": given, "stream": stream})
            assert (answer.status_code, field in answer.text) == (400, True), (path, stream, answer.text)
            assert "x-trimtab-steering" not in answer.headers
    several = {**BODIES["/v1/completions"], "prompt": [PROMPT + " w99", PROMPT], "steering": given, "stream": True}
    assert client.post("/v1/completions", json=several).status_code == 400


def test_steering_given_twice_is_refused(client):
    body = {**BODIES["/v1/completions"], "steering": add("calm"), "vllm_xargs": {"steering": json.dumps(add("calm"))}}
    answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, "twice" in answer.text) == (400, True)


def test_beam_search_is_refused_with_steering_and_works_without(client):
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = {**BODIES[path], "use_beam_search": True, "n": 2}
        assert client.post(path, json=body).status_code == 200
        answer = client.post(path, json={**body, "steering": add("calm")})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "use_beam_search")


def test_after_all_refusals_the_engine_answers_as_before(client, sdk, oracle):
    assert client.get("/health").status_code == 200
    assert complete(sdk, {"steering": add("calm")}).strip() == oracle.words(PROMPT, COUNT, CALM, CALM)
    assert complete(sdk, {}).strip() == oracle.words(PROMPT, COUNT)


def test_receipts_say_what_was_added_in_the_body_and_in_a_header(client):
    digest = vector(CALM).digest.hex()
    for path, body in BODIES.items():
        answer = client.post(path, json={**body, "steering": add("calm", phase="decode")})
        receipt = answer.json()["steering"]
        assert receipt["identity"]["prefill"] == ""
        assert len(receipt["identity"]["decode"]) == 64
        assert receipt["sites"] == [f"post_block:{layer}" for layer in SERVED_LAYERS]
        assert receipt["vectors"] == [{"name": "calm", "digest": digest}]
        assert answer.headers["x-trimtab-steering"] == f"prefill=, decode={receipt['identity']['decode']}"
        with client.stream("POST", path, json={**body, "steering": add("calm"), "stream": True}) as stream:
            assert receipt["identity"]["decode"] in stream.headers["x-trimtab-steering"]
            stream.read()
        plain = client.post(path, json=body)
        assert "x-trimtab-steering" not in plain.headers
        assert "steering" not in plain.json()


def test_a_vector_can_be_registered_used_replaced_and_deleted(client, sdk, oracle, tmp_path: Path):
    created = client.post("/v1/steering/vectors", json={"name": "joy", "vector": packed(JOY)})
    assert (created.status_code, created.json()["digest"]) == (201, vector(JOY).digest.hex())
    assert created.json()["loaded_at_start"] is False
    assert complete(sdk, {"steering": add("joy")}).strip() == oracle.words(PROMPT, COUNT, JOY, JOY)

    vector(FEAR).save(tmp_path / "fear.safetensors")
    replaced = client.post(
        "/v1/steering/vectors", params={"name": "joy"}, content=(tmp_path / "fear.safetensors").read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    )  # fmt: skip
    assert (replaced.status_code, replaced.json()["replaced"]) == (200, vector(JOY).digest.hex())
    assert complete(sdk, {"steering": add("joy")}).strip() == oracle.words(PROMPT, COUNT, FEAR, FEAR)

    listed = client.get("/v1/steering/vectors").json()["vectors"]
    assert {entry["name"]: entry["loaded_at_start"] for entry in listed} == {"calm": True, "joy": False}
    assert client.delete("/v1/steering/vectors/joy").status_code == 200
    assert client.delete("/v1/steering/vectors/joy").status_code == 404
    assert client.post("/v1/completions", json={**BODIES["/v1/completions"], "steering": add("joy")}).status_code == 400


def test_bad_registrations_are_refused_with_the_field(client):
    good = packed(JOY)
    cases = [
        ({"name": "a/b", "vector": good}, "name"),
        ({"name": "x"}, ""),
        ({"name": "x", "vector": "calm"}, "vector"),
        ({"name": "x", "vector": {}}, "vector"),
        ({"name": "x", "vector": {"post_block": {"3": [1.0] * WIDTH}}}, "vector.post_block"),
        ({"name": "x", "vector": {"post_block": {"0": [1.0] * 7}}}, "vector"),
        ({"name": "x", "vector": good, "file": "/etc/passwd"}, ""),
    ]
    for body, field in cases:
        answer = client.post("/v1/steering/vectors", json=body)
        assert answer.status_code == 400, body
        assert (answer.json()["error"]["param"] or "").startswith(field), answer.text
    for content in (b"not a file", b"", b"\x80\x04K\x01.", b"x" * (1 << 20)):
        raw = client.post(
            "/v1/steering/vectors", params={"name": "x"}, content=content,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        assert raw.status_code == 400, raw.text
    assert [entry["name"] for entry in client.get("/v1/steering/vectors").json()["vectors"]] == ["calm"]


def test_the_status_shows_sites_vectors_and_each_workers_state(client, server):
    status = client.get("/v1/steering").json()
    assert status["model"] == {"hidden_size": WIDTH, "num_layers": LAYERS}
    assert status["sites"] == [f"post_block:{layer}" for layer in SERVED_LAYERS]
    assert [entry["name"] for entry in status["vectors"]] == ["calm"]
    assert status["default"] is None
    assert [worker["rank"] for worker in status["workers"]] == [0]
    assert status["workers"][0]["rows_in_use"] == 0
    assert status["workers_agree"] is True


def test_the_routes_want_the_key(server):
    with httpx.Client(base_url=server.url) as stranger:
        assert stranger.get("/v1/steering").status_code == 401
        assert stranger.get("/v1/steering/vectors").status_code == 401
        assert stranger.post("/v1/steering/vectors", json={}).status_code == 401
        assert stranger.delete("/v1/steering/vectors/calm").status_code == 401


def metric(client: httpx.Client, name: str) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def test_metrics_count_requests_refusals_and_what_the_workers_report(client, sdk):
    steered, unknown = (
        metric(client, "trimtab_requests_steered_total"),
        'trimtab_requests_refused_total{reason="vector"}',
    )
    refused = metric(client, unknown)
    complete(sdk, {"steering": add("calm")})
    complete(sdk, {})
    client.post("/v1/completions", json={**BODIES["/v1/completions"], "steering": add("nobody")})
    assert metric(client, "trimtab_requests_steered_total") == steered + 1
    assert metric(client, unknown) == refused + 1
    assert metric(client, "trimtab_row_uploads_total") > 0
    assert metric(client, "trimtab_row_capacity") >= 2 * 16
    assert metric(client, "trimtab_rows_in_use") == 0
    assert metric(client, "trimtab_vectors") == 1
    assert "trimtab_late_kernel_variants_total" in client.get("/metrics").text


def test_shut_down_leaves_no_process(server):
    assert server.stop() == []
    assert server.process.returncode in (0, -15, 143)
