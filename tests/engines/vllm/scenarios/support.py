"""What scenarios share: tiny random models, specs, an engine, the oracle, and the report."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

HIDDEN, LAYERS, VOCABULARY = 64, 4, 256

SCRATCH = Path(os.environ["TRIMTAB_TEST_SCRATCH"])

Spec = dict[str, Any] | None

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}  # vLLM knows these families in no other form
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}
_OPT: dict[str, Any] = {
    "ffn_dim": 96,
    "word_embed_proj_dim": HIDDEN,
    "init_std": 0.15,
    "dropout": 0.0,
    "bos_token_id": 1,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**_TIED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "cohere": ("Cohere", {**_TIED, "logit_scale": 0.25}),
    "opt": ("OPT", {**_TIED, **_OPT}),
    "falcon": ("Falcon", {**_TIED, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48}),
    "mixtral": ("Mixtral", {**_EXPERTS, "num_local_experts": 4, "sliding_window": None}),
}


def tiny_model(family: str = "llama", seed: int = 0, parent: Path = SCRATCH, layers: int = LAYERS) -> tuple[str, Any]:
    """(folder, Transformers model) of a random float32 model of a family. Norms are random too: ones hide faults."""
    name, extra = FAMILIES[family]
    common = {key: value for key, value in _COMMON.items() if name != "OPT" or key != "intermediate_size"}
    common["num_hidden_layers"] = layers
    torch.manual_seed(seed)
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**(common | extra))).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "norm" in key and parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    folder = parent / f"{family}-{seed}"
    model.save_pretrained(folder)
    return str(folder), model


def random_spec(
    seed: int,
    *,
    layers: Sequence[int] = range(LAYERS),
    hooks: Sequence[str] = ("post_block",),
    scale: float = 1.0,
    phase: str = "all",
    strength: float = 1.0,
) -> dict[str, Any]:
    """A spec of one intervention with random directions."""
    rng = np.random.default_rng(seed)
    vector = {
        hook: {str(layer): (strength * rng.standard_normal(HIDDEN)).round(4).tolist() for layer in layers}
        for hook in hooks
    }
    return {"interventions": [{"kind": "add", "vector": vector, "scale": scale, "phase": phase}]}


def eight_specs() -> list[Spec]:
    """None and seven specs that differ in layers, phases, scales and number of interventions."""
    one, two = random_spec(1, layers=[0, 2]), random_spec(2, layers=[1, 2], phase="decode", scale=0.75)
    return [
        None,
        random_spec(3),
        random_spec(4, layers=[0], scale=2.0, phase="prefill"),
        random_spec(5, layers=[3], scale=-3.0, phase="decode"),
        random_spec(3, scale=-0.5),  # the vector of the second spec at another scale
        {"interventions": one["interventions"] + two["interventions"]},
        random_spec(6, layers=[1, 3], scale=1.25),
        random_spec(7, layers=[2], scale=1.5, phase="prefill"),
    ]


HOOKS = ("pre_attn", "attn_out", "post_attn", "mlp_in", "mlp_out", "post_block")
SLOTS: dict[str, Any] = {
    "slots": 3,
    "kinds": ["ablate", "clamp", "scale", "swap", "rotate"],
    "hook_points": list(HOOKS),
}
SLOTS["probe_layers"] = [0, 2]


def slot(
    kind: str, seed: int, layers: Sequence[int] = range(LAYERS), hooks: Sequence[str] = ("post_block",), **options: Any
) -> dict[str, Any]:
    """An intervention of a kind that does more than add, along random directions."""
    vector = random_spec(seed, layers=layers, hooks=hooks)["interventions"][0]["vector"]
    return {"kind": kind, "vector": vector} | options


def slot_specs() -> list[dict[str, Any]]:
    """Specs of all kinds: alone, in sets, beside what is added, behind gates, in either phase, at every hook point."""
    probe = random_spec(70, layers=[0])["interventions"][0]["vector"]["post_block"]
    gate, of_the_branch = {"probe": {"post_attn": probe}}, {"probe": {"attn_out": probe}}
    turned = slot("ablate", 47, [1, 2])  # overlaps with the direction that it stands beside
    for layer, values in turned["vector"]["post_block"].items():
        other = slot("clamp", 48, [1, 2])["vector"]["post_block"][layer]
        turned["vector"]["post_block"][layer] = [round(a + 0.7 * b, 4) for a, b in zip(values, other, strict=True)]
    spread = slot("clamp", 49, [2], max=-3.0) | {"layers": [1, 2, 3], "hooks": ["pre_attn", "post_attn", "mlp_in"]}
    steps = [
        [slot("ablate", 41, strength=2.0)],
        [slot("clamp", 42, [1, 2], value=7.0)],
        [slot("scale", 43, factor=-4.0, phase="decode")],
        [slot("swap", 44, [0, 3], to=slot("swap", 45, [0, 3])["vector"])],
        [turned, slot("clamp", 48, [1, 2], min=5.0, strength=0.75), slot("scale", 46, [2, 3], factor=3.0)],
        [*random_spec(3, strength=2.0)["interventions"], slot("clamp", 50, value={str(n): 3.0 + n for n in range(4)})],
        [slot("clamp", 51, [0, 1, 3], value=-8.0, gate=gate | {"threshold": 0.0, "hard": True})],
        [slot("clamp", 52, hooks=HOOKS, value=3.0, phase="prefill"), slot("clamp", 53, hooks=HOOKS[4:], value=-4.0)],
        [spread, *random_spec(5, layers=[3], phase="decode")["interventions"]],
        [
            slot("scale", 54, [1, 2], factor=5.0, gate=gate | {"threshold": 0.2, "sharpness": 0.5}),
            {**random_spec(6, layers=[2])["interventions"][0], "gate": gate | {"threshold": 0.2, "sharpness": 0.5}},
            slot("clamp", 55, [2], ["post_attn"], min=2.0, max=6.0),
        ],
        [slot("rotate", 56, [1, 2], plane=slot("rotate", 57, [1, 2])["vector"], to=30.0), slot("ablate", 58, [2])],
        [slot("clamp", 59, [0, 1], ["attn_out"], value=6.0, gate=of_the_branch | {"threshold": 0.1})],
    ]
    return [{"interventions": some} for some in steps]


ALL_KINDS = [*SLOTS["kinds"], "lowrank", "feature", "replace", "add:norm", "keep_norm"]


def rarer_specs() -> list[dict[str, Any]]:
    """Specs of the kinds that make a graph larger for all: of low rank, features, and those that look at the stream
    before."""
    gate = slot_specs()[6]["interventions"][0]["gate"]
    small = [random_spec(80 + i, layers=[1, 3], strength=0.1)["interventions"][0]["vector"] for i in range(4)]
    steps = [
        [{"kind": "lowrank", "read": small[:2], "write": small[2:], "bias": [4.0, -3.0]}],
        [slot("replace", 84, [2], amount=0.5, gate=gate), *random_spec(6, layers=[2])["interventions"]],
        [slot("replace", 85, [1], amount=0.25), slot("replace", 86, [1], amount=0.5), slot("ablate", 87, [1])],
        [{**slot("add", 88, [0, 2], ["post_attn", "post_block"]), "unit": "norm", "scale": 0.75}],
    ]
    rows = [random_spec(90 + i, layers=[1], strength=0.3)["interventions"][0]["vector"] for i in range(4)]
    steps += [
        [{"kind": "feature", "encoder": rows[0], "decoder": rows[1], "architecture": "jumprelu", "bias": 0.5,
          "threshold": 0.75, "scale": 3.0, "add": 4.0, "layers": [1, 2]},
         {"kind": "feature", "encoder": rows[2], "decoder": rows[3], "architecture": "gated", "bias": 0.25,
          "gate_bias": 0.5, "gain": 1.5, "set": 9.0, "gate": gate | {"threshold": 0.0, "hard": True}},
         slot("ablate", 47, [1, 2])],
    ]  # fmt: skip
    specs: list[dict[str, Any]] = [{"interventions": some} for some in steps]
    specs.append({"interventions": [slot("clamp", 89, [1, 2], value=9.0)], "keep_norm": True})
    return [*specs, {"interventions": random_spec(7, layers=[3])["interventions"], "keep_norm": "if_grown"}]


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCABULARY, length).tolist() for length in lengths]


def engine(folder: str, *, steering: Any = None, mode: str = "eager", **options: Any) -> Any:
    """A vLLM engine on this process's CPU, steered with settings `steering` unless that is None."""
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 384,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 64,
        "skip_tokenizer_init": True,
    }
    if mode == "eager":
        defaults["enforce_eager"] = True
    else:
        defaults["compilation_config"] = {"mode": 3, **({"backend": "eager"} if mode == "traced" else {})}
    if steering is not None:
        defaults["additional_config"] = {"steering": steering}
    return LLM(model=folder, **(defaults | options))


class _Unmeasured(logging.Handler):
    """What engines of this process say about additions whose size was not measured at their start."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []
        logger = logging.getLogger("vllm.trimtab")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "was not measured" in record.getMessage():
            self.said.append(record.getMessage())


unmeasured = _Unmeasured().said


def two_ranks(kind: str) -> dict[str, Any]:
    """Options of an engine on two worker processes: tensor ranks ("tp") or pipeline stages ("pp")."""
    sizes = {"tp": {"tensor_parallel_size": 2}, "pp": {"pipeline_parallel_size": 2, "async_scheduling": False}}
    return {"distributed_executor_backend": "mp", **sizes[kind]}


def tight_engine(folder: str, *, steering: Any, **options: Any) -> Any:
    """An engine whose KV cache is too small for eight growing requests, prefix caching on: some are thrown out."""
    block = 2 * 32 * 2 * 16 * 4 * 4  # keys and values, block size, kv heads, head size, bytes, layers
    return engine(
        folder, steering=steering, kv_cache_memory_bytes=14 * block, max_num_seqs=8, max_model_len=128,
        enable_prefix_caching=True, disable_log_stats=False, **options,
    )  # fmt: skip


def preemptions(llm: Any) -> int:
    """How often a request was thrown out and computed anew."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def generate(
    llm: Any, prompts: Sequence[list[int]], specs: Sequence[Spec], tokens: int | Sequence[int] = 8, **options: Any
) -> list[list[int]]:
    """Greedy continuations of `prompts`, all submitted at once, each under its own spec."""
    return [list(output.outputs[0].token_ids) for output in outputs_of(llm, prompts, specs, tokens, **options)]


def outputs_of(
    llm: Any, prompts: Sequence[list[int]], specs: Sequence[Spec], tokens: int | Sequence[int], **options: Any
) -> list[Any]:
    """The same as vLLM returns it."""
    from vllm import SamplingParams

    counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    params = [
        SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False,
            extra_args=None if spec is None else {"steering": spec},
        )
        for count, spec in zip(counts, specs, strict=True)
    ]  # fmt: skip
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return list(llm.generate(inputs, params, use_tqdm=False, **options))


def oracle(
    model: Any,
    prompts: Sequence[list[int]],
    specs: Sequence[Spec],
    tokens: int | Sequence[int] = 8,
    batch: int = 16,
    monitor: Any = None,
) -> list[list[int]]:
    """The embedded engine's greedy continuations of the same requests, behind a monitor if one is given."""
    from trimtab import SteeredModel

    counts = [tokens] * len(prompts) if isinstance(tokens, int) else list(tokens)
    answers: list[list[int]] = []
    with SteeredModel(model, None, monitor=monitor) as steered:
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            outputs = steered.generate(
                list(prompts[part]), steering=list(specs[part]), max_new_tokens=max(counts[part]), do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            answers += [list(o.token_ids)[:count] for o, count in zip(outputs, counts[part], strict=True)]
    return answers


def receipts(
    llm: Any, model: Any, prompts: Sequence[list[int]], specs: Sequence[Spec], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Where the identities and steered tokens of offline outputs, and what they tell of interventions, differ from what
    the embedded engine says."""
    from trimtab import SteeredModel

    keys = ("identity", "steered_tokens", "interventions")
    told = [getattr(output, "steering", None) for output in outputs_of(llm, prompts, specs, counts)]
    found = [receipt and {key: receipt[key] for key in keys} for receipt in told]
    due: list[Any] = []
    with SteeredModel(model, None) as steered:
        for prompt, spec, count in zip(prompts, specs, counts, strict=True):
            (output,) = steered.generate(
                [prompt], steering=[spec], max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            identity = {phase.value: text for phase, text in output.receipt.identity.items()}
            tokens = {phase.value: number for phase, number in output.receipt.steered_tokens.items()}
            told = [replace(use, corrections=None).as_json() for use in output.receipt.interventions]
            due.append(
                None if spec is None else {"identity": identity, "steered_tokens": tokens, "interventions": told}
            )
    return differences(found, due)


def corrections(llm: Any, model: Any, prompts: Sequence[list[int]], specs: Sequence[Spec], count: int) -> list[str]:
    """What workers tell of the slots of each request, where it is not what the embedded engine tells. The requests must
    find nothing in the prefix cache."""
    from trimtab import SteeredModel
    from trimtab.engines.vllm.frontend import accounts
    from trimtab.engines.vllm.frontend.workers import slots_of_one_engine
    from trimtab.serving.interventions import corrections_of

    opened: list[accounts.Account] = []
    init = accounts.Account.__init__

    def noted(self: Any, carried: Any) -> None:
        init(self, carried)
        opened.append(self)

    accounts.Account.__init__ = noted  # type: ignore[method-assign]
    try:
        generate(llm, prompts, specs, count)
    finally:
        accounts.Account.__init__ = init  # type: ignore[method-assign]
    states = llm.collective_rpc("trimtab_status", args=(False, [account.name for account in opened]))
    wrong, steered = [], [(prompt, spec) for prompt, spec in zip(prompts, specs, strict=True) if spec is not None]
    assert len(opened) == len(steered)
    with SteeredModel(model, None) as embedded:
        for (prompt, spec), account in zip(steered, opened, strict=True):
            found = corrections_of(account.slots, slots_of_one_engine(states, account.name))
            (output,) = embedded.generate(
                [prompt], steering=[spec], max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            for use, own in zip(output.receipt.interventions, found, strict=True):
                due = use.corrections
                if not _alike(own, due):
                    wrong.append(f"{use.asked.kind} {use.asked.place}: {own}, due {due}")
    return wrong


def _alike(found: Any, due: Any) -> bool:
    if found is None or due is None:
        return found is due
    near = abs(found.mean - due.mean) <= 1e-3 * due.mean + 1e-5  # below: what rounding leaves of an ablated stream
    return found.measured == due.measured and near and abs(found.touched - due.touched) <= 0.1


def differences(found: Sequence[Any], expected: Sequence[Any]) -> list[dict[str, Any]]:
    """Where two lists of answers differ; empty if they are the same."""
    assert len(found) == len(expected)
    return [
        {"request": i, "found": f, "expected": e}
        for i, (f, e) in enumerate(zip(found, expected, strict=True))
        if f != e
    ]


def status(llm: Any) -> list[dict[str, Any]]:
    """What each worker reports, once all finished requests have been told to the workers."""
    generate(llm, [[5, 6, 7]], [None], 1)
    return list(llm.collective_rpc("trimtab_status"))


def report(outcome: dict[str, Any]) -> None:
    """End the scenario with this outcome, and the version of vLLM that it was found on."""
    import vllm

    outcome = outcome | {"vllm": vllm.__version__}
    Path(os.environ["TRIMTAB_TEST_REPORT"]).write_text(json.dumps(outcome))
