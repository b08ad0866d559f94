"""Asking workers: how many calls are made, what they carry, and what is told where some do not answer.

The other end is played by coroutines that answer when they are let; a real executor is in `test_observing_server`.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.engines.vllm.frontend import workers
from trimtab.engines.vllm.frontend.workers import Workers
from trimtab.program.counting import GateUse

pytest.importorskip("prometheus_client")


class Core:
    """The client of engine cores of the given ranks: each call waits for its engine's gate."""

    def __init__(self, *ranks: int) -> None:
        self.core_engines = [rank.to_bytes(2, "little") for rank in ranks]
        self.open = {engine: asyncio.Event() for engine in self.core_engines}
        self.calls: list[tuple[int, Any]] = []
        self.dead: set[bytes] = set()

    async def _call_utility_async(self, name: str, digest: bool, answers: list[str], *, engine: bytes) -> list[Any]:
        assert name == "trimtab_status"
        self.calls.append((int.from_bytes(engine, "little"), (digest, answers)))
        if engine in self.dead:
            raise RuntimeError("EngineCore encountered an issue")
        await self.open[engine].wait()
        rank = int.from_bytes(engine, "little")
        use = {"gate": "g", "probe": "p", "tokens": 3 + rank, "mean": 0.5, "above_half": rank}
        slots = [slot_use(sites, 10 + rank) for sites in ("post_block:0", "post_block:2")]
        told = {"uses": {answer: [use] for answer in answers}, "slot_uses": {answer: slots for answer in answers}}
        behind = {"uses": {}, "slot_uses": {answer: [slot_use("post_block:0", 5)] for answer in answers}}
        return [{"rank": 0, **told}, {"rank": 1, **behind}, None]


def slot_use(begins: str, measured: int) -> dict[str, Any]:
    """What a rank tells of a slot at the sites of its stage."""
    return {"phase": "prefill", "slot": "s", "begins": begins, "measured": measured, "total": 1.0, "moved": 2}


def workers_of(core: Core) -> Workers:
    workers = Workers()
    workers.client = SimpleNamespace(engine_core=core)
    return workers


def test_no_call_carries_a_timeout_and_one_alone_is_under_way_however_many_ask() -> None:
    async def run() -> None:
        core = Core(0)
        workers = workers_of(core)
        for _ in range(50):
            assert (await workers.ask(0.0)).silent == (0,)
        asking = [asyncio.create_task(workers.uses(f"a{number}", 60)) for number in range(50)]
        page = asyncio.create_task(workers.ask(60, digest=True))
        await asyncio.sleep(0)
        given_up = asyncio.create_task(workers.ask(60))
        await asyncio.sleep(0)
        given_up.cancel()
        assert core.calls == [(0, (False, []))]
        core.open[core.core_engines[0]].set()
        told = await asyncio.gather(*asking)
        assert [uses and uses.gates[0].tokens for uses in told] == [3] * 50
        assert len((await page).engines[0]) == 2
        assert core.calls[1:] == [(0, (True, sorted(f"a{number}" for number in range(50))))]
        assert (await workers.ask(60)).silent == ()
        assert len(core.calls) == 3

    asyncio.run(run())


def test_what_several_engines_did_for_one_answer_adds_up_and_is_not_told_in_part() -> None:
    async def run() -> None:
        core = Core(0, 1)
        workers = workers_of(core)
        core.open[core.core_engines[0]].set()
        assert await workers.uses("a", 0.01) is None
        told = await workers.ask(0.01)
        assert (list(told.engines), told.silent) == ([0], (1,))
        core.open[core.core_engines[1]].set()
        uses = await workers.uses("a", 60)
        assert uses is not None
        assert uses.gates == [GateUse("p", "g", tokens=7, mean=0.5, above_half=1)]
        assert [(use.begins, use.measured) for use in uses.slots] == [("post_block:0", 21), ("post_block:2", 21)]

    asyncio.run(run())


def test_a_dead_engine_is_silent_and_harms_nobody() -> None:
    async def run() -> None:
        core = Core(0, 1)
        core.dead.add(core.core_engines[1])
        core.open[core.core_engines[0]].set()
        workers = workers_of(core)
        for _ in range(2):
            told = await workers.ask(60)
            assert (list(told.engines), told.silent) == ([0], (1,))
        assert await workers.uses("a", 60) is None
        await workers.refresh_metrics()
        workers.client = None
        assert await workers.ask(60) == ({}, ())

    asyncio.run(run())


def test_scrapes_of_one_second_share_one_call_and_a_silent_engine_keeps_its_last_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Any] = []
    told = SimpleNamespace(workers=shown.append, silent=lambda number: None, vectors=lambda number: None)
    monkeypatch.setattr(workers, "metrics", lambda: told)
    monkeypatch.setattr(workers, "SCRAPE_WAIT", 0.01)
    now = [100.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def run() -> None:
        core = Core(0, 1)
        workers = workers_of(core)
        for gate in core.open.values():
            gate.set()
        for _ in range(20):
            await workers.refresh_metrics()
        assert len(core.calls) == 2  # one of each engine
        core.open[core.core_engines[1]].clear()
        now[0] += 1.5
        await workers.refresh_metrics()
        assert [len(engines) for engines in shown] == [2, 2]

    asyncio.run(run())
