"""The account of one answer: what its receipt says, and how many tokens of its requests were steered.

An answer over HTTP may be made by several requests of the engine (prompts, choices, pieces of audio); they share one
account. An offline prompt has one of its own. A request carries a `Ticket`, which is the account itself in the process
that opened it, and a random name everywhere else: workers report what gates did by that name. Ids of requests are no
such names, since callers may choose them, alike even.
"""

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.engines.vllm.carried import TICKET, Carried
from trimtab.engines.vllm.frontend.pending import Pending
from trimtab.program.counting import steered_tokens
from trimtab.serving.interventions import tokens_of
from trimtab.serving.metrics import metrics
from trimtab.sites import Phase

ACCOUNT_NAME = re.compile("[0-9a-f]{32}")

KEPT_ANSWERS = 4096  # whose gates can be asked for by the id of the answer


class Account:
    """What is known of one answer. Not for several threads."""

    __slots__ = ("_finished", "_last", "_receipt", "_running", "admitted", "gated", "name", "slots")

    def __init__(self, admitted: Carried | Pending) -> None:
        self.name = secrets.token_hex(16)
        self.admitted = admitted
        self.gated = False  # whether the steering has gates
        self.slots: list[set[tuple[str, str]]] = []  # of each intervention, by phase and digest
        self._receipt: dict[str, Any] | None = None
        self._last: tuple[Any, Carried] | None = None  # the prompt that was placed last
        self._running = self._finished = 0
        if isinstance(admitted, Carried):
            self.place(admitted)

    @property
    def measured(self) -> bool:
        """Whether only workers know all of what was done."""
        return self.gated or any(self.slots)

    @property
    def complete(self) -> bool:
        """Whether requests of the answer have begun, and all that have are finished."""
        return self._finished > 0 and not self._running

    @property
    def placed(self) -> bool:
        """Whether it is known what any prompt of the answer is steered with."""
        return self._receipt is not None

    @property
    def receipt(self) -> dict[str, Any]:
        """The receipt of the admission, and the tokens of all requests that are finished: the same object always,
        brought up to date as they finish. There is none before a prompt is placed."""
        assert self._receipt is not None, "no prompt is placed"
        return self._receipt

    def placed_on(self, prompt: Any) -> Carried | None:
        """What `prompt`, this very object, is steered with, if it was the last that was placed."""
        return self._last[1] if self._last is not None and self._last[0] is prompt else None

    def place(self, carried: Carried, prompt: Any = None) -> None:
        """A prompt of the answer is steered with `carried`: where steering says where it acts, each has its own."""
        self._last = prompt, carried
        told = carried.receipt
        self.gated = self.gated or any(program.lane_count for program in carried.steering.programs)
        if self._receipt is None:
            self.slots = [set(own) for own in carried.slots]
            own = {"steered_tokens": dict(told["steered_tokens"]), "interventions": [*map(dict, told["interventions"])]}
            self._receipt = {**told, "identity": dict(told["identity"]), **own}
            return
        for known, slots in zip(self.slots, carried.slots, strict=True):
            known |= slots
        self._add(self._receipt, told)

    def _add(self, receipt: dict[str, Any], told: Mapping[str, Any]) -> None:
        """Let the receipt of some prompts speak of one more, in whose receipt this is `told`."""
        if told["identity"] != receipt["identity"]:
            assert isinstance(self.admitted, Pending), "else every prompt carries the same"
            receipt["identity"] = {phase.value: self.admitted.unplaced.identity_of_spec for phase in Phase}
        for key in ("sites", "vectors", "probes"):
            receipt[key] = [*receipt[key], *(one for one in told[key] if one not in receipt[key])]
        if "default_left" in told:
            receipt["default_left"] = min(receipt["default_left"], told["default_left"])
        for entry, also in zip(receipt["interventions"], told["interventions"], strict=True):
            before = entry["where"] if isinstance(entry["where"], list) else [entry["where"]]
            entry["where"] = [*before, also["where"]]

    def begun(self) -> None:
        """A request of the answer is on its way to the engine."""
        self._running += 1

    def finished(
        self, carried: Carried, prompt_length: int, answer: Sequence[int], prompt: Sequence[int] | None = None
    ) -> None:
        """A request of the answer has ended, which carried this and answered these tokens; `prompt` are its own, None
        where it had embeddings."""
        self._running -= 1
        self._finished += 1
        if not answer:  # refused by the core, or ended before its first token: nothing is known to have been computed
            return
        counts = self.receipt["steered_tokens"]
        what = carried.steering, prompt_length, len(answer), None if prompt is None else [*prompt, *answer]
        for phase, number in steered_tokens(*what).items():
            counts[phase.value] += number
        for told, number in zip(self.receipt["interventions"], tokens_of(*what), strict=True):
            told["tokens"] += number
            metrics().acted(told["kind"], number)


class Ticket(dict[str, str]):
    """Names an account to the workers, and holds it here. Serialised, it is a plain dict; a caller's is never taken."""

    account: Account

    def __init__(self, account: Account) -> None:
        super().__init__({"answer": account.name})
        self.account = account

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ticket":
        return self  # clones of sampling parameters belong to the same answer


def ticket_in(extra_args: Any) -> Ticket | None:
    """The ticket among the `extra_args` of sampling parameters, None if this process gave none."""
    ticket = extra_args.get(TICKET) if extra_args else None
    return ticket if isinstance(ticket, Ticket) else None


class Answers:
    """Which account an answer's id belongs to, for the last `KEPT_ANSWERS`. Ids are the callers': only their digests
    are kept, and one that two answers bear names neither."""

    def __init__(self) -> None:
        self._names: OrderedDict[bytes, str | None] = OrderedDict()

    def add(self, answer_id: str, name: str) -> None:
        """Remember an answer."""
        key = _key(answer_id)
        self._names[key] = name if self._names.get(key, name) == name else None
        self._names.move_to_end(key)
        if len(self._names) > KEPT_ANSWERS:
            self._names.popitem(last=False)

    def find(self, answer_id: str) -> str | None:
        """The account of an answer; None where several bear this id. Raises `KeyError` where none is known."""
        return self._names[_key(answer_id)]


def _key(answer_id: str) -> bytes:
    return hashlib.sha256(answer_id.encode(errors="replace")).digest()
