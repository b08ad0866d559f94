"""The extra keys of one block, by the tokens it holds."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab import Steering
from trimtab.engines.vllm.cache_keys import steering_keys
from trimtab.engines.vllm.wire import DecodedWire
from trimtab.sites import HookPoint, ModelSites, Phase, Site

MODEL = ModelSites(4, 2, frozenset({Site(0, HookPoint.POST_BLOCK), Site(1, HookPoint.POST_BLOCK)}))
BLOCK = 16


def request(phase: str | None, prompt: int = 40, scale: float = 1.0, monitor: str = "") -> Any:
    extra = None
    if phase is not None:
        vector = {"post_block": {"1": [1.0, 2.0, 3.0, 4.0]}}
        spec = {"interventions": [{"kind": "add", "vector": vector, "phase": phase, "scale": scale}]}
        steering = Steering.parse(spec).resolve({}, replace(MODEL, monitor=monitor))
        extra = {"steering": DecodedWire(steering.to_wire(), steering)}
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), num_prompt_tokens=prompt)


def keys(of: Any, blocks: int = 6) -> list[Any]:
    return [steering_keys(of, start, start + BLOCK) for start in range(0, blocks * BLOCK, BLOCK)]


def test_an_unsteered_request_has_no_keys() -> None:
    assert keys(request(None)) == [()] * 6


def test_prefill_steering_is_named_once_and_its_end_in_every_block_beyond_it() -> None:
    first, second, boundary, after, *rest = keys(request("prefill"))
    identity = request("prefill").sampling_params.extra_args["steering"].steering.identity(Phase.PREFILL)
    assert first == (("trimtab_prefill", identity),)
    assert second == ()
    assert boundary == (("trimtab_decode", "-@8"),)
    assert after == rest[0] == rest[1] == (("trimtab_decode", "-@0"),)


def test_decode_steering_leaves_pure_prompt_blocks_unnamed() -> None:
    first, second, boundary, after, *_ = keys(request("decode"))
    identity = request("decode").sampling_params.extra_args["steering"].steering.identity(Phase.DECODE)
    assert first == second == ()
    assert boundary == (("trimtab_decode", f"{identity}@8"),)
    assert after == (("trimtab_decode", f"{identity}@0"),)


def test_steering_of_both_phases_alike_has_no_boundary() -> None:
    first, *rest = keys(request("all"))
    assert [tag for tag, _ in first] == ["trimtab_prefill"]
    assert rest == [()] * 5


def test_behind_a_monitor_an_answer_steered_like_its_prompt_is_not_found_as_a_prompt() -> None:
    monitored = request("all", monitor="ab" * 32)
    identity = monitored.sampling_params.extra_args["steering"].steering.identity(Phase.DECODE)
    first, second, boundary, after, *_ = keys(monitored)
    assert first == keys(request("all"))[0]
    assert second == ()
    assert boundary == (("trimtab_decode", f"{identity}@8"),)
    assert after == (("trimtab_decode", f"{identity}@0"),)
    assert keys(request("prefill", monitor="ab" * 32)) == keys(request("prefill"))


def test_a_prompt_that_ends_with_its_block_leaves_that_block_pure() -> None:
    assert keys(request("decode", prompt=2 * BLOCK), 3)[:2] == [(), ()]
    assert keys(request("decode", prompt=2 * BLOCK - 1), 3)[1] != ()


@pytest.mark.parametrize("other", [{"scale": 2.0}, {"prompt": 41}])
def test_another_scale_or_another_prompt_length_gives_other_keys(other: dict[str, Any]) -> None:
    assert keys(request("decode")) != keys(request("decode", **other))


def test_what_other_plugins_put_under_the_same_name_is_left_alone() -> None:
    foreign = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={"steering": {"theirs": 1}}), num_prompt_tokens=1
    )
    assert steering_keys(foreign, 0, BLOCK) == ()
    pooling = SimpleNamespace(sampling_params=None, num_prompt_tokens=1)
    assert steering_keys(pooling, 0, BLOCK) == ()
