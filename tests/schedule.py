"""Which tests go to one process together, and which are begun first.

Tests of a file stay together. Where fixtures of a file start engines or servers, only the tests that share one do; a
test that runs a scenario by itself goes alone. What takes longest is begun first, so that no process ends long after
the others.
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import pytest

LONGEST = (  # parts of node ids, by falling CPU time
    "share_a_compile_cache",
    "V2 compiled",
    "test_server.py",
    "test_server_shared",
    "test_observing_server",
    "test_layer_families.py::test_a_family_answers_as_the_embedded_engine_does[traced",
    "V2 eager",
    "traced",
    "test_scale_out",
    "V1 eager",
    "test_data_parallel",
    "test_layer_families",
    "server",
    "test_ranks",
    "test_foreign_front_end",
    "test_prefix_cache",
    "test_engine_start",
    "test_demo.py",
    "test_slots_kernel",
    "test_kernels_without_gpu",
    "test_families",
    "transformers/test_kinds.py",
    "test_looking_back",
    "test_lowering",
    "test_compile_caches",
    "test_tuning",
    "test_ops_",
)


def schedule(items: list[pytest.Item], told: Path | None) -> None:
    """Put the groups in the order in which they are begun; the file `told` learns the group of each test."""
    shared = _components({item: list(_engines(item)) for item in items})
    groups: dict[Hashable, list[pytest.Item]] = defaultdict(list)
    for item in items:
        alone = "run_scenario" in getattr(getattr(item, "function", None), "__code__", compile("", "", "exec")).co_names
        groups[shared.get(item, item.nodeid if alone else item.path)].append(item)
    ordered = sorted(groups.values(), key=_rank)
    items[:] = [item for group in ordered for item in group]
    if told:
        told.write_text(
            json.dumps({item.nodeid: f"{number}" for number, group in enumerate(ordered) for item in group})
        )


def scheduler(config: pytest.Config, log: Any, told: Path) -> Any:
    """What hands groups to processes. xdist's own writes a group into the ids of its tests, which pytest 9.2 ignores:
    each test then goes alone, and every process starts every server."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def schedule(self) -> None:
            self.groups = json.loads(told.read_text())
            super().schedule()

        def _split_scope(self, nodeid: str) -> str:
            return self.groups[nodeid]

    return Groups(config, log)


def _engines(item: pytest.Item) -> Iterable[Hashable]:
    """What a test of stock vLLM shares with others of its file: fixtures of the file, each with its parameter."""
    if item.get_closest_marker("vllm") is None:
        return
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for name, definitions in item._fixtureinfo.name2fixturedefs.items():  # type: ignore[attr-defined]
        if definitions[-1].scope == "module":
            yield item.path, name, repr(parameters.get(name))


def _components(uses: dict[pytest.Item, list[Hashable]]) -> dict[pytest.Item, Hashable]:
    """One name for each set of tests that hang together by what they use; none for a test that uses nothing."""
    parent: dict[Hashable, Hashable] = {}

    def root(use: Hashable) -> Hashable:
        while (above := parent.setdefault(use, use)) != use:
            use = above
        return use

    for shared in uses.values():
        for use in shared[1:]:
            parent[root(use)] = root(shared[0])
    return {item: root(shared[0]) for item, shared in uses.items() if shared}


def _rank(group: list[pytest.Item]) -> int:
    return min(next((i for i, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST)) for item in group)
