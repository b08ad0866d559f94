"""The memory of small values: what has a key, when keys are equal, and that it stays small."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.recent import Recent
from trimtab.serving.memo import key_of

ATOMS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 2.0]) | st.sampled_from("ab1")
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab1"), inner, max_size=3)
)


@given(VALUES, VALUES)
def test_keys_are_equal_exactly_where_the_json_is(one: Any, other: Any) -> None:
    assert (key_of(one) == key_of(other)) == (json.dumps(one) == json.dumps(other))
    hash(key_of(one))


class Named(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        (1, 2),
        {1, 2},
        [range(3)],
        {"a": Named("b")},
        bytearray(b"a"),
        "a" * 5000,
        ["a" * 300],
        [0.0] * 100,
        {"a": ["b" * 300]},
    ],
)
def test_what_is_large_or_not_plain_has_no_key(value: Any) -> None:
    assert key_of(value) is None


def test_nesting_ends_in_no_key_rather_than_in_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert key_of(deep) is None
    while deep:  # freed step by step: the interpreter would do it by recursion
        deep = deep.pop()


def test_a_key_holds_a_copy() -> None:
    value = {"a": [1]}
    key = key_of(value)
    value["a"].append(2)
    assert key == key_of({"a": [1]}) != key_of(value)


def test_what_values_hold_is_bounded_too() -> None:
    memory: Recent[int] = Recent(kept_bytes=10)
    for number, nbytes in enumerate([4, 5, 1, 7, 11]):
        memory.put(number, number, nbytes)
    assert [memory.get(number) for number in range(5)] == [None, None, 2, 3, None]
    memory.put(3, 3, 9)  # again, and larger: it does not count twice
    assert [memory.get(number) for number in (2, 3)] == [2, 3]


def test_threads_may_share_a_memory() -> None:
    memory: Recent[int] = Recent(8)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            puts = [pool.submit(lambda n=n: [memory.put(i * n, i) for i in range(2000)]) for n in (1, 3, 5, 7)]
            assert all(len(put.result()) == 2000 for put in puts)
    finally:
        sys.setswitchinterval(interval)
    assert len(memory._made) == 8


def test_the_oldest_is_forgotten_and_a_value_without_a_key_is_never_kept() -> None:
    memory: Recent[int] = Recent(2)
    memory.put(None, 0)
    assert memory.get(None) is None
    for number in range(3):
        memory.put(number, number)
    assert [memory.get(number) for number in range(3)] == [None, 1, 2]


def test_a_value_of_many_parts_has_no_key_so_that_all_keys_together_stay_small() -> None:
    step = {"kind": "add", "vector": "v" * 128, "layers": list(range(32))}
    assert key_of({"interventions": [step] * 4}) is not None
    assert key_of({"interventions": [step] * 16}) is None
    assert key_of([[[0] * 64] * 64] * 64) is None
