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
from typing import Any

from trimtab.engines.vllm.carried import TICKET, Carried
from trimtab.program.counting import steered_tokens
from trimtab.serving.interventions import tokens_of
from trimtab.serving.metrics import metrics

ACCOUNT_NAME = re.compile("[0-9a-f]{32}")

KEPT_ANSWERS = 4096  # whose gates can be asked for by the id of the answer


class Account:
    """What is known of one answer. Not for several threads."""

    __slots__ = ("_finished", "_receipt", "_running", "carried", "name")

    def __init__(self, carried: Carried) -> None:
        self.name = secrets.token_hex(16)
        self.carried = carried
        self._receipt: dict[str, Any] | None = None
        self._running = self._finished = 0

    @property
    def gated(self) -> bool:
        """Whether the steering has gates."""
        return bool(self.carried.steering.gates)

    @property
    def slots(self) -> list[set[tuple[str, str]]]:
        """The slots of each intervention, by phase and digest."""
        return self.carried.slots

    @property
    def measured(self) -> bool:
        """Whether only workers know all of what was done."""
        return self.gated or any(self.slots)

    @property
    def complete(self) -> bool:
        """Whether requests of the answer have begun, and all that have are finished."""
        return self._finished > 0 and not self._running

    @property
    def receipt(self) -> dict[str, Any]:
        """The receipt of the admission, and the tokens of all requests that are finished: the same object always,
        brought up to date as they finish."""
        if self._receipt is None:
            told = self.carried.receipt
            own = {"steered_tokens": dict(told["steered_tokens"]), "interventions": [*map(dict, told["interventions"])]}
            self._receipt = {**told, **own}
        return self._receipt

    def begun(self) -> None:
        """A request of the answer is on its way to the engine."""
        self._running += 1

    def finished(self, prompt_length: int, new_tokens: int) -> None:
        """A request of the answer has ended with this many tokens."""
        self._running -= 1
        self._finished += 1
        counts = self.receipt["steered_tokens"]
        for phase, number in steered_tokens(self.carried.steering, prompt_length, new_tokens).items():
            counts[phase.value] += number
        tokens = tokens_of(self.carried.steering, prompt_length, new_tokens)
        for told, number in zip(self.receipt["interventions"], tokens, strict=True):
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
