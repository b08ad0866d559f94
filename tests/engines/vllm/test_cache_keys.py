"""The extra keys of one block, by the tokens it holds."""

import pickle
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trimtab import Steering, SteeringVector
from trimtab.engines.vllm import plugin
from trimtab.engines.vllm.carried import Carried
from trimtab.engines.vllm.core.cache_keys import steering_keys
from trimtab.engines.vllm.patches.core import STEERED
from trimtab.engines.vllm.patches.patching import put_on
from trimtab.errors import SteeringError
from trimtab.program import EMPTY, ResolvedSteering, Spans
from trimtab.program.codec import encode
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.sites import HookPoint, ModelSites, Phase, Site

MODEL = ModelSites(4, 2, frozenset({Site(0, HookPoint.POST_BLOCK), Site(1, HookPoint.POST_BLOCK)}))
BLOCK = 16


def request(phase: str | None, prompt: int = 40, scale: float = 1.0, monitor: ResolvedGate | None = None) -> Any:
    extra = None
    if phase is not None:
        vector = {"post_block": {"1": [1.0, 2.0, 3.0, 4.0]}}
        spec = {"interventions": [{"kind": "add", "vector": vector, "phase": phase, "scale": scale}]}
        steering = Steering.parse(spec).resolve({}, MODEL)
        steering = steering if monitor is None else behind(steering, monitor)
        extra = {"steering": Carried(encode(steering), steering)}
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), num_prompt_tokens=prompt)


def keys(of: Any, blocks: int = 6) -> list[Any]:
    return [steering_keys(of, start, start + BLOCK) for start in range(0, blocks * BLOCK, BLOCK)]


def test_an_unsteered_request_has_no_keys() -> None:
    assert keys(request(None)) == [()] * 6


def test_prefill_steering_is_named_once_and_so_is_its_end() -> None:
    first, second, boundary, *rest = keys(request("prefill"))
    identity = request("prefill").sampling_params.extra_args["steering"].steering.identity(Phase.PREFILL)
    assert first == (("trimtab", f"{identity}@0"),)
    assert second == ()
    assert boundary == (("trimtab", "-@8"),)
    assert rest == [()] * 3


def test_decode_steering_is_named_where_the_answer_begins() -> None:
    first, second, boundary, *rest = keys(request("decode"))
    identity = request("decode").sampling_params.extra_args["steering"].steering.identity(Phase.DECODE)
    assert first == second == ()
    assert boundary == (("trimtab", f"{identity}@8"),)
    assert rest == [()] * 3


def test_steering_of_both_phases_alike_has_no_boundary() -> None:
    first, *rest = keys(request("all"))
    assert [tag for tag, _ in first] == ["trimtab"]
    assert rest == [()] * 5


def test_each_run_of_spans_is_named_in_the_block_in_which_it_begins() -> None:
    one, two = (request("all", scale=scale).sampling_params.extra_args["steering"].steering for scale in (1.0, 2.0))
    programs = (EMPTY, one.prefill, two.prefill, EMPTY, one.decode, two.decode)
    starts, received = (0, 3, 7, 33, 40, 41, 64, 80), (0, 1, 2, 2, 5, 4, 3, 4)
    choices = tuple((place,) for place in range(len(programs)))
    spans = Spans(40, starts, received, choices, (Phase.PREFILL,) * 3 + (Phase.DECODE,) * 3)
    steering = ResolvedSteering(programs, spans=spans)
    carried = SimpleNamespace(extra_args={"steering": Carried(encode(steering), steering)})
    first, second = (program.identity for program in programs[1:3])
    assert keys(SimpleNamespace(sampling_params=carried, num_prompt_tokens=40), 7) == [
        (("trimtab", f"{first}@3"), ("trimtab", f"{second}@7")),
        (),
        (("trimtab", f"{first}@9"),),
        (),
        (("trimtab", "-@0"),),
        (("trimtab", f"{first}@0"),),
        (),
    ]


def test_behind_a_monitor_an_answer_steered_like_its_prompt_is_not_found_as_a_prompt() -> None:
    monitor = ResolvedGate.of(SteeringVector({Site(0, HookPoint.POST_BLOCK): [1.0] * 4}), 0.0, 1.0)
    monitored = request("all", monitor=monitor)
    identity = monitored.sampling_params.extra_args["steering"].steering.identity(Phase.DECODE)
    first, second, boundary, *rest = keys(monitored)
    assert first == keys(request("all"))[0]
    assert second == ()
    assert boundary == (("trimtab", f"{identity}@8"),)
    assert rest == [()] * 3
    assert keys(request("prefill", monitor=monitor)) == keys(request("prefill"))


def test_a_prompt_shorter_than_a_block_is_named_in_the_block_that_its_answer_fills() -> None:
    """A short chat turn: its first block is prompt and answer at once, and carries both."""
    for phase in ("prefill", "all", "decode"):
        short = request(phase, prompt=5)
        steering = short.sampling_params.extra_args["steering"].steering
        prefill, decode = steering.identity(Phase.PREFILL), steering.identity(Phase.DECODE)
        first, second = keys(short, 2)
        assert (("trimtab", f"{prefill}@0") in first) == bool(prefill)
        assert (("trimtab", f"{decode or '-'}@5") in first) == (phase != "all")
        assert second == ()


def test_a_prompt_that_ends_with_its_block_leaves_that_block_pure() -> None:
    assert keys(request("decode", prompt=2 * BLOCK), 3)[:2] == [(), ()]
    assert keys(request("decode", prompt=2 * BLOCK - 1), 3)[1] != ()


@pytest.mark.parametrize("other", [{"scale": 2.0}, {"prompt": 41}])
def test_another_scale_or_another_prompt_length_gives_other_keys(other: dict[str, Any]) -> None:
    assert keys(request("decode")) != keys(request("decode", **other))


def test_steering_that_no_engine_core_has_read_gets_no_hash() -> None:
    """No keys would mean that everyone shares the KV. What another process sent is a plain dict of the same form."""
    steered = request("all")
    wire = steered.sampling_params.extra_args["steering"]
    spec = {"interventions": [{"kind": "add", "vector": "calm"}]}
    for unread in (dict(wire), pickle.loads(pickle.dumps(wire)), spec):
        steered.sampling_params.extra_args["steering"] = unread
        with pytest.raises(SteeringError, match="that the engine core has not read"):
            steering_keys(steered, 0, BLOCK)


def test_what_other_plugins_put_under_the_same_name_is_left_alone() -> None:
    foreign = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={"steering": {"theirs": 1}}), num_prompt_tokens=1
    )
    assert steering_keys(foreign, 0, BLOCK) == ()
    pooling = SimpleNamespace(sampling_params=None, num_prompt_tokens=1)
    assert steering_keys(pooling, 0, BLOCK) == ()


@pytest.mark.vllm
class TestOnThisVllm:
    """With vLLM's own hasher, as an engine core makes it."""

    @pytest.fixture
    def utils(self) -> Iterator[Any]:
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import block_pool, kv_cache_utils

        plugin.register()
        kv_cache_utils.init_none_hash(sha256_cbor)
        before = kv_cache_utils.generate_block_hash_extra_keys, block_pool.generate_block_hash_extra_keys
        yield kv_cache_utils
        kv_cache_utils.generate_block_hash_extra_keys, block_pool.generate_block_hash_extra_keys = before

    @staticmethod
    def core(utils: Any, block: int = BLOCK) -> Any:
        from vllm.utils.hashing import sha256_cbor

        return SimpleNamespace(request_block_hasher=utils.get_request_block_hasher(block, sha256_cbor))

    @pytest.mark.parametrize("block", [1, 7, 11, 16, 128, 544])
    def test_an_engine_core_whose_hasher_asks_us_starts_and_hashes_as_it_did(self, utils: Any, block: int) -> None:
        core, stock = self.core(utils, block), self.core(utils, block)
        put_on(core, STEERED)
        plain = SimpleNamespace(
            sampling_params=SimpleNamespace(extra_args=None), block_hashes=[], num_tokens=3 * block, cache_salt=None,
            all_token_ids=list(range(3 * block)), mm_features=[], lora_request=None, prompt_embeds=None,
            num_prompt_tokens=block,
        )  # fmt: skip
        assert core.request_block_hasher(plain) == stock.request_block_hasher(plain)
        assert len(core.request_block_hasher(plain)) == 3

    def test_an_engine_core_whose_hasher_passes_us_by_does_not_start(self, utils: Any) -> None:
        core = self.core(utils)
        ours = utils.generate_block_hash_extra_keys
        utils.generate_block_hash_extra_keys = ours.__wrapped__
        with pytest.raises(SteeringError, match="of a steered prompt the keys of an unsteered one"):
            put_on(core, STEERED)

    def test_a_hasher_that_asks_for_the_first_block_alone_is_found_out(self, utils: Any) -> None:
        ours = utils.generate_block_hash_extra_keys
        first_only = lambda request, start, end, mm: (ours if start == 0 else ours.__wrapped__)(request, start, end, mm)  # noqa: E731
        utils.generate_block_hash_extra_keys = first_only
        with pytest.raises(SteeringError, match="of a steered answer the keys of an unsteered one"):
            put_on(self.core(utils), STEERED)

    def test_a_hasher_that_asks_for_the_edges_of_phases_alone_is_found_out(self, utils: Any) -> None:
        ours = utils.generate_block_hash_extra_keys

        def at_edges(request: Any, start: int, end: int, mm: int) -> Any:
            asked = start == 0 or start <= request.num_prompt_tokens < end
            return (ours if asked else ours.__wrapped__)(request, start, end, mm)

        utils.generate_block_hash_extra_keys = at_edges
        with pytest.raises(SteeringError, match="of a steered part of a prompt the keys of an unsteered one"):
            put_on(self.core(utils), STEERED)
        prompts_alone = lambda request, start, end, mm: (  # noqa: E731
            ours if start <= request.num_prompt_tokens else ours.__wrapped__
        )(request, start, end, mm)
        utils.generate_block_hash_extra_keys = prompts_alone
        with pytest.raises(SteeringError, match="of a steered part of an answer the keys of an unsteered one"):
            put_on(self.core(utils), STEERED)

    def test_a_module_that_bound_the_function_before_us_is_named(
        self, utils: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        early = ModuleType("vllm.v1.early")
        early.generate_block_hash_extra_keys = utils.generate_block_hash_extra_keys.__wrapped__  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, early.__name__, early)
        with pytest.raises(SteeringError, match=r"vllm\.v1\.early\.generate_block_hash_extra_keys is vLLM's own"):
            put_on(self.core(utils), STEERED)

    def test_a_steered_engine_core_hashes_nothing_that_it_has_not_read(self, utils: Any) -> None:
        core = self.core(utils)
        put_on(core, STEERED)
        for unread in (dict(request("all").sampling_params.extra_args["steering"]), {"theirs": 1}, "calm"):
            sent = SimpleNamespace(request_id="r1", sampling_params=SimpleNamespace(extra_args={"steering": unread}))
            with pytest.raises(SteeringError, match="request 'r1' reached the scheduler with steering"):
                core.request_block_hasher(sent)

    def test_without_a_prefix_cache_there_is_nothing_to_keep(self) -> None:
        core = SimpleNamespace(request_block_hasher=None)
        put_on(core, STEERED)
        assert core.request_block_hasher is None
