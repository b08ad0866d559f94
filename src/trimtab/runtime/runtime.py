"""The host side of steering: who is steered with what, and what the device must be told before each forward pass.

Free of any engine. An engine reports admissions and releases as they happen and calls `step` before each forward pass;
all that reaches the device are the rows, flags and token records that changed since the last one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.errors import SteeringError
from trimtab.ops.buffers import SteeringBuffers
from trimtab.ops.route import route
from trimtab.program import PhaseProgram, ResolvedSteering
from trimtab.program.counting import GateUse, SlotUse
from trimtab.program.lowering import Contents, contents, placed, row_key
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime.admission import check_admission, check_past
from trimtab.runtime.gate_lanes import GateLanes
from trimtab.runtime.meters import GateMeters
from trimtab.runtime.monitors import RowMonitors, RowProbes, SiteMonitors, require_row_monitor, row_probes
from trimtab.runtime.slot_meters import SlotMeters
from trimtab.runtime.slot_rows import SlotRows
from trimtab.runtime.span_lines import schedules_of
from trimtab.runtime.span_tables import SpanTables
from trimtab.runtime.state_digest import digest_of
from trimtab.runtime.step_plan import NO_SLOT, RECORD_NAMES, RowUse, StepPlanner, as_ints
from trimtab.runtime.table_rows import RowContent, TableRows
from trimtab.runtime.upload import NO_TOKENS, TokenUploader
from trimtab.sites import Phase, Site


class SteeringRuntime:
    """Routes every token of a running batch to the steering row that its request and position ask for.

    State is a pure function of the calls made, so ranks that see the same calls agree (`digest` compares them).
    Nothing is written to the device outside `step`, and `step` writes to the current stream only.
    """

    def __init__(self, buffers: SteeringBuffers, *, max_requests: int, lowers: bool = False) -> None:
        """`max_requests` steered requests can be admitted at one time, as far as their contents fit the tables. Any do
        with `rows_needed` rows and `probes_needed` probes; with fewer, those that a `RowPool` of that size lets run.
        `lowers`: run gates as probes of rows where they are no more than that (see `trimtab.program.lowering`).
        """
        if max_requests < 1:
            raise SteeringError("max_requests", f"{max_requests} given; at least 1 is needed")
        if lowers:
            require_row_monitor(buffers)
        self._buffers, self._max_requests = buffers, max_requests
        self._rows = TableRows(buffers)
        self._planner = StepPlanner(max_requests)
        self._tokens = TokenUploader(buffers.token_slab)
        self._site_position = {site: position for position, site in enumerate(buffers.sites)}
        self._no_site = np.zeros(len(buffers.sites), np.bool_)
        self._used = ~self._no_site  # sites that do not rest: all, until the first step
        decided = None if buffers.spans is None else buffers.spans.decided
        self._gates = None if buffers.gates is None else GateLanes(buffers.gates, max_requests, decided)
        self._spans: SpanTables | None = None
        if buffers.spans is not None:
            gate_slab = None if buffers.gates is None else buffers.gates.slab
            self._spans = SpanTables(buffers.spans, buffers.token_slab, gate_slab, max_requests, len(buffers.sites))
        self._monitors = SiteMonitors(buffers)
        self._slot_rows = None if buffers.slots is None else SlotRows(buffers, buffers.slots)
        self._slot_meters = None if buffers.slots is None else SlotMeters(buffers, buffers.slots, max_requests)
        self._meters: list[GateMeters | SlotMeters] = [] if self._gates is None else [self._gates.meters]
        self._meters += [] if self._slot_meters is None else [self._slot_meters]
        self._directions: dict[str, list[int]] = {}  # of requests with slots: the rows that these read and write along
        self._lowers = lowers
        self._row_monitors = RowMonitors(buffers) if lowers or buffers.row_monitor_sites else None

    @property
    def capacity(self) -> int:
        """Rows that can hold content at one time (row 0 never does)."""
        return self._rows.capacity

    @property
    def rows_in_use(self) -> int:
        """Rows that admitted requests hold."""
        return self._rows.in_use

    @property
    def row_uploads(self) -> int:
        """Rows written to the device since construction."""
        return self._rows.uploads

    @property
    def monitors(self) -> Mapping[Site, ResolvedGate]:
        """The monitor of each site that has one; for reading."""
        return self._monitors.gates

    def set_monitor(self, gate: ResolvedGate, *, elsewhere: bool = False) -> None:
        """Let `gate` multiply the rows of all decode tokens at its probe's site, from the next `step` on.

        Where the site's module emits across layers (`Emission.cross_layer`), it multiplies them at all later sites too,
        and what the device holds of a plan is written anew in each step. Sums behind gates are not touched, so where
        gates are lowered it is refused. Replaces the site's monitor. Raises SteeringError for a hard gate, a site that
        the buffers lack, or another width. `elsewhere` says that another pipeline stage has the site: it is noted, so
        that `digest` agrees, and does nothing here.
        """
        if self._lowers:
            raise SteeringError("monitor", "would multiply what gates let through that are probes of rows")
        (self._monitors.note if elsewhere else self._monitors.set)(gate)

    def clear_monitor(self, site: Site) -> None:
        """Leave `site` without a monitor from the next `step` on. One that has none is no error."""
        self._monitors.clear(site)

    def admit(
        self,
        request_id: str,
        steering: ResolvedSteering | None,
        *,
        probes: Sequence[ResolvedGate] = (),
        owner: str | None = None,
        tokens: Sequence[int] | None = None,
        upto: int = 0,
    ) -> None:
        """Hold the rows of all programs for `request_id`; replaces what it held. None or empty steering holds nothing.

        A request with spans begins at position `upto`, which is not 0 where a prefix cache has tokens of it, or where
        it comes back from preemption; `tokens` are the ids of those before it, or more (see `seed`).

        `owner` is the name under which `gate_report` and `slot_report` tell what was done, together with all of one
        owner; by default the request's own id. `probes` are the row monitor of its decode tokens: each multiplies their
        row at its own site, and only there. They need buffers with `row_monitor=True`, and with them no gate of the
        request is lowered. Admit again, without them, to clear them.

        Raises SteeringError if a vector's width is not the model's, if `max_requests` others are admitted already, if
        the tables have no room, if the buffers cannot hold the probes, the gates, the slots or the spans, or if the
        `tokens` are missing that spans look back to. The request then keeps what it held before.
        """
        if steering is None or not any(program.identity for program in steering.programs):
            self.release(request_id)
            return
        check_admission(request_id, steering, self._buffers)
        check_past(request_id, steering, tokens, upto)
        admitted = self._planner.slots
        if len(admitted) >= self._max_requests and request_id not in admitted:
            said = f"would be steered request {len(admitted) + 1}; the limit is {self._max_requests}"
            raise SteeringError("max_requests", f"request {request_id!r} {said}")
        behind = row_probes(probes, self._buffers)
        programs = list(placed(steering, lowers=self._lowers and not behind))
        lowered = {gate.digest: gate for program in programs for gate in program.probes}
        if behind:
            programs = [
                program._replace(probes=behind) if phase is Phase.DECODE else program
                for phase, program in zip(steering.phases, programs, strict=True)
            ]
        self._check_room(request_id, contents(programs))
        self.release(request_id)
        directions = self._hold_directions(request_id, [program.row for program in programs])
        uses = [self._acquire(program.row, program.probes, directions) for program in programs]
        decided = steering.spans is not None
        slot = self._planner.add(request_id, None if decided else uses)
        owner = request_id if owner is None else owner
        if self._gates is not None:
            gated = [program.gated for program in programs]
            self._gates.add(slot, owner, gated, [*lowered.values()], self._acquire, decided=decided)
        if self._slot_meters is not None:
            self._slot_meters.open_slots(slot, owner, steering)
        if self._spans is not None and steering.spans is not None:
            gates = None if self._gates is None else self._gates.words_of_programs(slot)
            sites = self._rows.sites_of(np.array([use.row for use in uses]))
            self._spans.add(slot, steering.spans, uses, gates, schedules_of(programs), sites)
            self._spans.seed(slot, tokens or (), upto)

    def seed(self, request_id: str, tokens: Sequence[int], upto: int) -> None:
        """`request_id` goes on at position `upto`, and what lies before it was not computed here: `tokens` are the ids
        of that, prompt and answer, or more. One without spans, or not admitted, is no error."""
        slot = self._planner.slots.get(request_id)
        if slot is not None and self._spans is not None:
            self._spans.seed(slot, tokens, upto)

    def release(self, request_id: str) -> None:
        """Let go of what `request_id` holds (finished or preempted). An id that holds nothing is no error."""
        slot = self._planner.slots.get(request_id)
        if slot is None:
            return
        gated = [] if self._gates is None else self._gates.remove(slot)
        if self._slot_meters is not None:
            self._slot_meters.close(slot)
        gated += [] if self._spans is None else self._spans.remove(slot)
        for row in (*self._planner.remove(request_id), *gated, *self._directions.pop(request_id, ())):
            if row and self._rows.release(row) and self._slot_rows is not None:
                self._slot_rows.let_go(row)

    def step(
        self,
        request_ids: Sequence[str],
        first_positions: npt.ArrayLike,
        token_counts: npt.ArrayLike,
        prompt_lengths: npt.ArrayLike,
        *,
        padded_tokens: int | None = None,
        positions: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        """Prepare the device for one forward pass over the requests' tokens, concatenated in this order.

        Request i brings `token_counts[i]` tokens from position `first_positions[i]` on; its tokens at positions below
        `prompt_lengths[i]` are prefill, the others decode. An id that is not admitted is not steered. Every token
        beyond the given ones, up to the end of the buffers, is routed to row 0; `padded_tokens`, the length of the
        forward pass where it is longer than its tokens, is only checked.

        Requests with spans receive what the device decides by its own `positions` and `token_ids` of the tokens, int32
        or int64, which are read in stream order; behind the tokens they may hold anything. For them, what the host
        believes of `first_positions` may be wrong.

        Raises ValueError if the tokens exceed `padded_tokens` or the buffers, or where positions or ids are missing
        that decide. Never raises for what a request holds.
        """
        gates = self._gates
        for meters in self._meters:
            meters.collect()
        if (
            not self._planner.slots
            and not self._tokens.tokens
            and not self._rows.stale
            and (gates is None or gates.idle)
        ):
            self._rest(self._no_site)
            return
        self._rows.write()
        if self._slot_rows is not None and self._slot_meters is not None and self._slot_rows.stale:
            self._slot_meters.sum_up()
            self._slot_rows.write()
        if self._row_monitors is not None:
            self._row_monitors.write()
        unmonitored = self._monitors.idle
        worn = self._monitors.write()
        words = NO_TOKENS
        gated, decision = None, None
        if self._spans is not None:
            self._spans.write()
        if self._planner.steers(request_ids):
            same = self._planner.count(as_ints(first_positions), as_ints(token_counts), as_ints(prompt_lengths))
            tokens = int(self._planner.counts.sum())
            limit = len(self._buffers.token_slab) if padded_tokens is None else padded_tokens
            if not tokens <= limit <= len(self._buffers.token_slab):
                raise ValueError(
                    f"{tokens} tokens in a forward pass of {limit}; the buffers hold {len(self._buffers.token_slab)}"
                )
            if self._spans is not None:
                decision = self._spans.decision(self._planner.batch, positions, token_ids)
            if same and unmonitored:  # all that follows was done before the last pass, but what the device decides
                if decision is not None:
                    route(decision, tokens)
                for meters in self._meters:
                    meters.expect_again()
                return
            planned = self._planner.plan()
            if planned[:, RECORD_NAMES].any():
                words = planned
            if gates is not None and gates.in_batch(self._planner.batch):
                gated = self._planner.counts
        self._tokens.write(words, worn=worn)
        if gates is not None:
            gates.write(self._planner.batch, gated)
        if decision is not None:
            route(decision, tokens)
        if self._slot_meters is not None:
            self._slot_meters.expect_of(self._planner.batch, self._planner.counts)
        self._rest(self._sites_in_use() if len(words) or gated is not None else self._no_site)

    def warm_up(self, positions: torch.dtype = torch.int64, token_ids: torch.dtype = torch.int32) -> int:
        """Compile what `step` launches for requests with spans, given positions and ids of these types. To be called
        before any request is admitted. Returns how many variants that compiled."""
        return 0 if self._spans is None else self._spans.warm_up(positions, token_ids)

    def before_unplanned_pass(self) -> None:
        """To be called before a forward pass that `step` does not prepare, such as one over no requests: it runs with
        the gates and slots of the last one, and would overwrite what they did before that is counted."""
        for meters in self._meters:
            meters.collect()

    def gate_report(self, owner: str) -> tuple[GateUse, ...]:
        """What each gate of an owner's requests, running or recently gone, has done; waits for the pass under way."""
        return () if self._gates is None else self._gates.meters.report(owner)

    def slot_report(self, owner: str) -> tuple[SlotUse, ...]:
        """What each slot of an owner's requests, running or recently gone, has done at the sites of these buffers, for
        each phase; waits for the pass under way."""
        return () if self._slot_meters is None else self._slot_meters.report(owner)

    def gate_totals(self) -> tuple[GateUse, ...]:
        """What gates have done since start, by their probes' names; waits for the pass under way."""
        return () if self._gates is None else self._gates.meters.totals()

    def digest(self) -> str:
        """Hex SHA-256 of all that later choices or the device's content follow from: not of what gates were seen to do.

        Equal on ranks that saw the same calls, those of other pipeline stages included.
        """
        return digest_of(self._state())

    def _state(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        table, tokens = self._buffers.table, len(self._buffers.token_slab)
        yield "made with", (repr((*table.shape[1:], table.dtype, tokens, self._max_requests, self._lowers)).encode(),)
        yield from self._rows.state()
        yield "slot rows", () if self._slot_rows is None else self._slot_rows.state()
        yield "requests", (self._planner.state(), repr(self._directions).encode())
        yield "plan", (self._tokens.held.tobytes(),)
        yield "gates", () if self._gates is None else self._gates.state()
        yield "spans", () if self._spans is None else self._spans.state()
        yield "slots", () if self._slot_meters is None else (self._slot_meters.state(),)
        yield "monitors", self._monitors.state()
        yield "row monitors", () if self._row_monitors is None else (self._row_monitors.state(),)

    def _sites_in_use(self) -> npt.NDArray[np.bool_]:
        """[S]: the sites at which the batch last planned may change a token, or decide about later ones."""
        batch = self._planner.batch
        if self._gates is not None and self._gates.in_batch(batch):
            return ~self._no_site
        used = self._rows.sites_of(self._planner.rows(batch))
        if self._spans is not None:
            used |= self._spans.sites_of(batch)
        used[[self._site_position[site] for site in self.monitors]] = True  # they act on the factors of later sites
        return used

    def _rest(self, used: npt.NDArray[np.bool_]) -> None:
        """Let all sites but the `used` [S] rest in the coming pass: what the device now holds changes nothing there."""
        if np.array_equal(used, self._used):
            return
        self._used = used
        for state, busy in zip(self._buffers.states, used.tolist(), strict=True):
            state.resting = not busy

    def _check_room(self, request_id: str, needed: Contents) -> None:
        slot, lanes = self._planner.slots.get(request_id, NO_SLOT), self._gates
        gated, probes = ((), ()) if lanes is None else lanes.held_by(slot)
        spans = () if self._spans is None else self._spans.held_by(slot)
        held = (*self._planner.held_by(slot), *gated, *spans, *self._directions.get(request_id, ()))
        fit = self._rows.has_room(needed.rows, held)
        if not fit or (lanes is not None and not lanes.has_room(needed.probes, probes)):
            what = "its probes" if fit else f"its rows among {self._rows.capacity}"
            raise SteeringError("max_probes" if fit else "max_rows", f"request {request_id!r} finds no room for {what}")

    def _hold_directions(self, request_id: str, programs: Sequence[PhaseProgram]) -> dict[bytes, int]:
        """The rows of all that slots of `programs` read and write along, by key, each held once."""
        ways = {way.row_key: way for program in programs for slot in program.slots for way in slot.rows}
        rows = {}
        for key, way in ways.items():
            rows[key], fresh = self._hold(key, way)
            if fresh and self._slot_rows is not None:
                self._slot_rows.clear(rows[key])
        if rows:
            self._directions[request_id] = [*rows.values()]
        return rows

    def _acquire(
        self, program: PhaseProgram, probes: RowProbes = (), directions: Mapping[bytes, int] | None = None
    ) -> RowUse:
        if not program.row_key:
            return RowUse(0, 1.0)
        row, fresh = self._hold(row_key(program, probes), program, program.sites, probes)
        if self._slot_rows is not None:
            self._slot_rows.fill(row, program, directions or {}, fresh=fresh)
        return RowUse(row, program.factor * self._rows.unit(row))

    def _hold(
        self, key: bytes, content: RowContent, acts_at: Sequence[Site] = (), probes: RowProbes = ()
    ) -> tuple[int, bool]:
        row, fresh = self._rows.acquire(key, content, acts_at)
        if fresh and self._row_monitors is not None:
            self._row_monitors.fill(row, probes)
        return row, fresh
