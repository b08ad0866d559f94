"""What only the workers know, asked of them through the engine's client: their state, what gates and slots did.

An executor matches replies to calls by their order alone. A call that gave up waiting would leave its reply in the
queue, and every later call, the engine's own steps included, would read the one before its own. So no call carries a
timeout: who asks stops waiting, and the call goes on. There is at most one under way per engine; what is asked
meanwhile goes with the next, so a worker that stands still is not buried under calls.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimtab.engines.vllm.frontend.requests import current_front_end
from trimtab.program.counting import GateKey, GateUse, SlotUse, summed
from trimtab.serving.metrics import metrics

CORE_METHOD = "trimtab_status"

State = dict[str, Any]  # of one worker

RECEIPT_WAIT = 1.0  # seconds that an answer waits for what its gates and slots did
SCRAPE_WAIT = 1.0  # seconds that a scrape of /metrics waits
PAGE_WAIT = 5.0  # seconds that a page which shows nothing else waits
_STATUS_AGE = 1.0  # seconds for which a scrape of /metrics reuses the last answers

logger = logging.getLogger("vllm.trimtab")


class Uses(NamedTuple):
    """What was done for one account."""

    gates: list[GateUse]
    slots: list[SlotUse]


class Told(NamedTuple):
    """What workers answered: their states by the data-parallel rank of their engine, and the engines that did not."""

    engines: dict[int, list[State]]
    silent: tuple[int, ...]


class Workers:
    """Asks the workers of every engine, in the event loop of the server."""

    def __init__(self) -> None:
        self.client: Any = None
        self._lines: dict[bytes, _Line] = {}
        self._asked = -_STATUS_AGE
        self._last: dict[int, list[State]] = {}  # what metrics show of engines that are silent now

    async def ask(self, seconds: float | None, *, digest: bool = False, answers: Iterable[str] = ()) -> Told:
        """The state of each worker, with its `digest`, and with what gates and slots did for the accounts `answers`.

        Engines that do not answer within `seconds`, or are dead, are `silent`. Never raises for them.
        """
        if self.client is None:
            return Told({}, ())
        core = self.client.engine_core
        ranks = [int.from_bytes(engine, "little") for engine in core.core_engines]  # vLLM names an engine by its rank
        self._lines = {engine: self._lines.get(engine) or self._line(core, engine) for engine in core.core_engines}
        asked = tuple(answers)
        replies = [line.ask(digest, asked) for line in self._lines.values()]
        if replies:
            await asyncio.wait(replies, timeout=seconds)
        told = {rank: reply.result() for rank, reply in zip(ranks, replies, strict=True) if _answered(reply)}
        return Told(told, tuple(rank for rank in ranks if rank not in told))

    async def uses(self, answer: str, seconds: float = RECEIPT_WAIT) -> Uses | None:
        """What each gate and slot did for the account `answer`; None if workers did not say so in time."""
        told = await self.ask(seconds, answers=[answer])
        if told.silent or not all("uses" in state for states in told.engines.values() for state in states):
            return None
        gates = [use for states in told.engines.values() for use in _of_one_engine(states, answer)]
        slots = [use for states in told.engines.values() for use in slots_of_one_engine(states, answer)]
        return Uses(summed(gates), summed(slots))  # the requests of one answer may have run in several engines

    async def refresh_metrics(self) -> None:
        """Bring the gauges up to date; the page is served with the old values where workers do not answer."""
        if time.monotonic() - self._asked < _STATUS_AGE:
            return
        self._asked = time.monotonic()
        told = await self.ask(SCRAPE_WAIT)
        self._last = {rank: states for rank, states in self._last.items() if rank in told.silent} | told.engines
        metrics().workers(list(self._last.values()))
        metrics().silent(len(told.silent))
        if (front_end := current_front_end()) is not None:
            metrics().vectors(len(front_end.registry.vectors()))

    def _line(self, core: Any, engine: bytes) -> "_Line":
        async def call(digest: bool, answers: list[str]) -> list[State]:
            # Why not `collective_rpc`: it asks every engine, and returns what the first one answers. Until: it returns
            # all.
            states = await core._call_utility_async(CORE_METHOD, digest, answers, engine=engine)
            return [state for state in states if isinstance(state, dict)]

        return _Line(call)


@dataclass
class _Round:
    """All that is asked of an engine's workers in one call."""

    reply: asyncio.Future[list[State]]
    digest: bool = False
    answers: set[str] = field(default_factory=set)


class _Line:
    """The way to the workers of one engine: one call at a time, waiting ones joined."""

    def __init__(self, call: Callable[[bool, list[str]], Awaitable[list[State]]]) -> None:
        self._call = call
        self._next: _Round | None = None
        self._task: asyncio.Task[None] | None = None

    def ask(self, digest: bool, answers: Iterable[str]) -> asyncio.Future[list[State]]:
        """The reply to the next call, which asks for this too. Wait for it; do not cancel it, others share it."""
        if self._next is None:
            self._next = _Round(asyncio.get_running_loop().create_future())
        self._next.digest |= digest
        self._next.answers.update(answers)
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return self._next.reply

    async def _work(self) -> None:
        try:
            while (now := self._next) is not None:
                self._next = None
                try:
                    now.reply.set_result(await self._call(now.digest, sorted(now.answers)))
                except Exception as error:  # an engine that is stopping or dead: observing it must not fail
                    logger.warning("the workers did not say what steering does: %s", error)
                    now.reply.set_exception(error)
                    now.reply.exception()  # seen, even if nobody waits any more
        finally:
            self._task = None


def _answered(reply: "asyncio.Future[list[State]]") -> bool:
    return reply.done() and not reply.cancelled() and reply.exception() is None


def _of_one_engine(states: Iterable[State], answer: str) -> Iterable[GateUse]:
    """By gate, from the worker that evaluated it; ranks that share one count the same, if none is a step behind."""
    uses: dict[GateKey, GateUse] = {}
    for use in (GateUse(**use) for state in states for use in state["uses"].get(answer, ())):
        known = uses.get(use.key)
        if known is None or (use.tokens, use.lowered) >= (known.tokens, known.lowered):
            uses[use.key] = use
    return uses.values()


def slots_of_one_engine(states: Iterable[State], answer: str) -> Iterable[SlotUse]:
    """By the sites where they acted: those of another stage begin elsewhere, and ranks of one stage count the same."""
    uses: dict[tuple[str, str, str], SlotUse] = {}
    for use in (SlotUse(**use) for state in states for use in state["slot_uses"].get(answer, ())):
        known = uses.setdefault(use.key, use)
        if use.measured > known.measured:
            uses[use.key] = use
    return uses.values()
