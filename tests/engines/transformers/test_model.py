"""SteeredModel as an object: loading, names, refusals, and leaving the model as it was."""

import json

import numpy as np
import pytest
import torch
from oracle import Addition

from trimtab import spec as spec_module
from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.vector import SteeringVector

PROMPTS = [[5, 17, 3, 44, 9], [7, 8]]


def calm(seed: int = 1, layers=(0, 2)) -> SteeringVector:
    rng = np.random.default_rng(seed)
    return SteeringVector({Site(layer, HookPoint.POST_BLOCK): rng.normal(size=32) for layer in layers})


def state_of(model) -> dict:
    """Everything about a model's modules that instrumenting could leave behind."""
    state = {}
    for name, module in model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)}
        buffers = {key: value.clone() for key, value in module.named_buffers(recurse=False)}
        state[name] = (type(module), sorted(vars(module)), module.training, hooks, buffers)
    return state


def assert_unchanged(before, after) -> None:
    assert before.keys() == after.keys()
    for name, (kind, attributes, training, hooks, buffers) in before.items():
        assert after[name][:4] == (kind, attributes, training, hooks), name
        for key, value in buffers.items():
            assert torch.equal(value, after[name][4][key])


@pytest.mark.parametrize("training", [False, True])
def test_leaving_restores_hooks_modes_weights_random_state_and_outputs(llama, training):
    llama.train(training)
    llama.model.layers[1].mlp.eval()  # modes may differ inside a model
    ids = torch.tensor([PROMPTS[0]])
    logits = llama(input_ids=ids, use_cache=False).logits
    before, random_state = state_of(llama), torch.get_rng_state()
    weights = {key: value.clone() for key, value in llama.state_dict().items()}
    steering = {"interventions": [{"kind": "add", "vector": calm()}]}
    with SteeredModel(llama) as model:
        model.generate(PROMPTS, [steering, None], max_new_tokens=3)
        assert_unchanged(before, state_of(llama))  # between calls too
        model.activations(PROMPTS, [(0, "mlp_in"), (1, "post_attn")])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_unchanged(before, state_of(llama))
    after = llama.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in weights.items())
    assert torch.equal(llama(input_ids=ids, use_cache=False).logits, logits)


def test_a_generation_that_fails_leaves_nothing_behind(llama):
    def fail(input_ids, scores):
        raise OSError("from inside the loop")

    before = state_of(llama)
    steering = {"interventions": [{"kind": "add", "vector": calm()}]}
    with SteeredModel(llama) as model, pytest.raises(OSError, match="from inside"):
        model.generate(PROMPTS, steering, max_new_tokens=3, logits_processor=[fail])
    assert_unchanged(before, state_of(llama))


def test_a_closed_model_refuses_to_work(llama):
    model = SteeredModel(llama)
    model.close()
    model.close()
    with pytest.raises(SteeringError, match="closed"):
        model.generate(PROMPTS)
    with pytest.raises(SteeringError, match="closed"):
        model.activations(PROMPTS, [(0, "post_block")])


def test_a_spec_may_be_a_dict_json_text_or_object_and_a_vector_a_name_an_object_or_numbers(llama):
    vector = calm()
    numbers = {"post_block": {str(site.layer): row.tolist() for site, row in vector.directions.items()}}
    named = {"interventions": [{"kind": "add", "vector": "calm", "scale": 2.0}]}
    with SteeredModel(llama, vectors={"calm": vector}) as model:
        forms = [
            named,
            json.dumps(named),
            spec_module.Steering.parse(named),
            {"interventions": [{"kind": "add", "vector": vector, "scale": 2.0}]},
            {"interventions": [{"kind": "add", "vector": numbers, "scale": 2.0}]},
        ]
        one_each = [model.generate([PROMPTS[0]], form, max_new_tokens=5)[0] for form in forms]
        together = model.generate([PROMPTS[0]] * 5, forms, max_new_tokens=5)
        plain = model.generate([PROMPTS[0]], max_new_tokens=5)[0]
    tokens = {tuple(out.token_ids) for out in [*one_each, *together]}
    assert len(tokens) == 1
    assert tokens != {tuple(plain.token_ids)}
    assert len({out.receipt.identity["decode"] for out in [*one_each, *together]}) == 1


def test_registering_checks_the_width_and_replaces_an_earlier_vector(llama):
    named = {"interventions": [{"kind": "add", "vector": "calm"}]}
    with SteeredModel(llama) as model:
        model.register("calm", calm(1))
        first = model.generate([PROMPTS[0]], named, max_new_tokens=1)[0].receipt.identity
        model.register("calm", calm(2))
        assert model.generate([PROMPTS[0]], named, max_new_tokens=1)[0].receipt.identity != first
        with pytest.raises(SteeringError, match=r"vectors\['wide'\].*width 16.*needs 32"):
            model.register("wide", SteeringVector({Site(0, HookPoint.POST_BLOCK): np.ones(16)}))
        with pytest.raises(SteeringError, match="want a SteeringVector"):
            model.register("list", [1.0])
        with pytest.raises(SteeringError, match="reports call the monitor"):
            model.register("(monitor)", calm(1))


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ([None], r"steering: has 1 entries for 2 prompts"),
        (3, r"steering: is a int"),
        (
            [None, {"interventions": [{"kind": "add", "vector": "calmer"}]}],
            r"steering\[1\]\.interventions\[0\]\.vector",
        ),
        ([None, {"interventions": []}], r"steering\[1\]\.interventions"),
        ({"interventions": [{"kind": "add", "vector": "calm", "scale": "x"}]}, r"^interventions\[0\]\.scale"),
        ({"interventions": [Addition("post_block", (9,), torch.ones(32)).spec()]}, r"layer 9"),
    ],
)
def test_a_bad_steering_is_refused_where_it_stands(llama, steering, message):
    with SteeredModel(llama, vectors={"calm": calm()}) as model, pytest.raises(SteeringError, match=message):
        model.generate(PROMPTS, steering, max_new_tokens=1)


def test_its_sites_say_how_many_gates_it_serves_and_where(llama):
    for gates in (4, 2, 0):
        with SteeredModel(llama, gates=gates) as model:
            assert model.sites.gates.count == gates
            assert model.sites.gates.probe_sites == model.sites.sites


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: want a list"),
        ([[1], []], r"prompts\[1\]: holds no tokens"),
        ([[1, 96]], r"prompts\[0\]\[1\]: is 96; want a token id from 0 to 95"),
        ([[1.5]], r"prompts\[0\]\[0\]: is 1\.5"),
        ([1, 2], r"prompts\[0\]: is a int"),
        (["the sea"], r"prompts\[0\]: is a string, but the model has no tokenizer"),
    ],
)
def test_a_bad_prompt_is_refused_by_its_place(llama, prompts, message):
    with SteeredModel(llama) as model, pytest.raises(SteeringError, match=message):
        model.generate(prompts, max_new_tokens=1)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "past_key_values", "assistant_model"])
def test_generation_options_that_would_break_steering_by_position_are_refused(llama, name):
    with SteeredModel(llama) as model, pytest.raises(SteeringError, match=f"{name}: cannot be given"):
        model.generate(PROMPTS, max_new_tokens=1, **{name: object()})


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([], "sites: at least one"),
        ([(3, "post_block")], r"post_block:3: layer 3 does not exist: the model has layers 0 to 2"),
        ([(0, "resid")], "resid"),
    ],
)
def test_activations_refuse_sites_that_do_not_exist(llama, sites, message):
    with SteeredModel(llama) as model, pytest.raises(SteeringError, match=message):
        model.activations(PROMPTS, sites)


def test_from_pretrained_loads_model_and_tokenizer_from_a_folder(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with SteeredModel(llama, tokenizer) as model:
        expected = model.generate(["the storm rises"], max_new_tokens=4)[0].text
    with SteeredModel.from_pretrained(tmp_path, vectors={"calm": calm()}, dtype=torch.float32) as loaded:
        assert loaded.generate(["the storm rises"], max_new_tokens=4)[0].text == expected
        assert list(loaded.vectors) == ["calm"]
        assert (loaded.sites.hidden_size, loaded.sites.num_layers) == (32, 3)
        assert loaded.sites.hook_points == tuple(HookPoint)


def norms_of(llama, norms: dict[str, str], width: int = 32) -> SteeringVector:
    extra = {f"stream_norm.{key}": value for key, value in norms.items()}
    metadata = VectorMetadata(base_model="org/other", extra=extra)
    return SteeringVector({Site(0, HookPoint.POST_BLOCK): np.ones(width)}, metadata)


def test_a_dose_is_counted_in_the_norms_that_the_model_was_given(llama, tmp_path, caplog):
    """Against the same addition with its scale written out."""
    vector, told = calm(layers=(1,)), norms_of(llama, {"post_block.1": "6.0"})
    told.save(tmp_path / "told.safetensors")
    raw = 2.0 * 6.0 / np.linalg.norm(vector.directions[Site(1, HookPoint.POST_BLOCK)].astype(np.float64))

    def ask(model, **more):
        step = {"kind": "add", "vector": vector, **more}
        return model.generate(PROMPTS, {"interventions": [step]}, max_new_tokens=2, output_logits=True)

    with SteeredModel(llama) as model:
        expected = ask(model, scale=raw)
        with pytest.raises(SteeringError, match="`norms`"):
            ask(model, scale=2.0, unit="dose")
    llama.config._name_or_path = "org/tiny"
    for norms in (told, tmp_path / "told.safetensors", str(tmp_path / "told.safetensors")):
        with SteeredModel(llama, norms=norms) as model:
            for one, other in zip(ask(model, scale=2.0, unit="dose"), expected, strict=True):
                np.testing.assert_allclose(np.array(one.logits), np.array(other.logits), rtol=1e-5, atol=1e-6)
    assert "norms: measured in org/other, where org/tiny is served" in caplog.text


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ({}, "has no norms"),
        ({"post_block.1": "0"}, "above 0"),
        ({"post_block.99": "1"}, "post_block:99; the model has layers"),
        ({"post_block.1": "1", "width": 16}, "width 16"),
    ],
)
def test_norms_that_are_none_of_this_model_are_refused(llama, norms, said):
    given = norms_of(llama, {key: value for key, value in norms.items() if key != "width"}, norms.get("width", 32))
    with pytest.raises(SteeringError, match=said) as caught:
        SteeredModel(llama, norms=given)
    assert caught.value.field == "norms"


@pytest.mark.parametrize("norms", ["/nowhere.safetensors", 3.0])
def test_norms_that_cannot_be_read_are_refused(llama, norms):
    with pytest.raises(SteeringError) as caught:
        SteeredModel(llama, norms=norms)
    assert caught.value.field == "norms"
