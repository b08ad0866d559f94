"""The argument lists of trimtab's operators: the one place that knows their names and order.

Schemas, implementations, builders and kernel launches are all derived from these tuples, so fifteen tensors of one
type cannot be transposed on the way. N is the number of tokens of the call, T >= N the capacity of the per-token
buffers, R the number of table rows, H the hidden size.
"""

from typing import NamedTuple

from torch import Tensor

from trimtab.responses import FLOAT32_ROWS, MOST_NUMBERS, RESPONSES, Stage

SLOT_ROWS, FLOAT32_SLOT_ROWS = 2, 1 + FLOAT32_ROWS
"""Table rows that a slot names: one that it reads, and one that it writes along; where directions are read to all
digits of float32, the others of those that it reads stand behind them."""

NO_THRESHOLD = -1.0e30
"""Row-monitor threshold of a row without a probe: sigmoid(1 * (0 + 1e30)) is exactly 1 in float32."""

SLOT_PARAMS = 2 + MOST_NUMBERS
"""Numbers of a slot on the device: the factor of its read row, the bias of its score, and its response's own; where the
response sees a second score, the last is the place of the slot, among the K, whose score that is."""

GATE_PARAMS = 5
"""Numbers of a gate on the device: see `GateOpArgs.gate_params`."""


class SteeringOpArgs(NamedTuple):
    """Arguments of `trimtab::apply_steering`."""

    hidden_states: Tensor  # [N, H] model dtype: the tensor at the hook point
    steering_table: Tensor  # [R, H] model dtype: row r is what a token on row r receives; row 0 is zero forever
    steering_index: Tensor  # [T] int64: token -> row
    any_active: Tensor  # [1] bool: False means that this site leaves every token as it is
    steering_scales: Tensor  # [R] float32: factor of each row
    steering_dynamic_vec: Tensor  # [H] float32: the tier, one vector for every token
    steering_token_scales: Tensor  # [T] float32: factor of the tier, per token
    steering_row_gate: Tensor  # [T] float32: factor of the row, per token
    steering_monitor_probe: Tensor  # [H] float32: the site's probe
    steering_monitor_params: Tensor  # [3] float32: threshold, sharpness, gate_rows
    steering_monitor_active: Tensor  # [1] bool
    steering_decode_mask: Tensor  # [T] float32: 1 for decode tokens, 0 for prefill tokens
    steering_monitor_probe_table: Tensor  # [1, 1], or [R, H] with the row monitor; float32
    steering_monitor_row_params: Tensor  # [1, 2], or [R, 2] with the row monitor; float32: threshold, sharpness
    steering_monitor_row_active: Tensor  # [1] bool

    @property
    def has_row_monitor(self) -> bool:
        """Whether the row monitor's tensors are full-size. With the dummies its flag is never read."""
        return self.steering_monitor_probe_table.shape == self.steering_table.shape


class MonitorOpArgs(NamedTuple):
    """Arguments of `trimtab::steering_monitor`."""

    hidden_states: Tensor  # [N, H] model dtype
    probe: Tensor  # [H] float32
    params: Tensor  # [3] float32: threshold, sharpness, gate_rows
    monitor_active: Tensor  # [1] bool
    steering_token_scales: Tensor  # [T] float32, multiplied in place
    steering_decode_mask: Tensor  # [T] float32
    steering_row_gate: Tensor  # [T] float32, multiplied in place where gate_rows


class GateOpArgs(NamedTuple):
    """Arguments of `trimtab::apply_gates_`.

    G gates per token. `gate_sites` and `gate_site` count an engine's sites from 1 in forward order; 0 is no gate.
    Factors and gains are written at a probe's site and read at later ones.
    """

    steered: Tensor  # [N, H] model dtype or float32, added to in place; or [0, H] where gates are only to be decided
    hidden_states: Tensor  # [N, H] model dtype: the tensor at the hook point before any steering
    hidden_rest: Tensor  # [N, H], what must be added to it to make the full stream, or [0, H] where it is the stream
    steering_table: Tensor  # [R, H] model dtype: the site's rows, shared with ungated steering
    gate_rows: Tensor  # [T, G] int64: the row that a gate lets through
    gate_probes: Tensor  # [T, G] int32: the row of its probe
    gate_sites: Tensor  # [T, G] int32: the site of its probe
    gate_params: Tensor  # [T, G, 5] float32: coefficient, threshold, sharpness (0 = hard), invert (0 or 1), and how its
    # factor is joined to that of the gate before it: 0 not at all, 1 "all", -1 "any"
    gate_probe_table: Tensor  # [P, H] float32; row 0 is zero forever
    gate_site: Tensor  # [1] int32: the site that this is
    gate_values: Tensor  # [G, T] float32: each gate's factor
    gate_gains: Tensor  # [G, T] float32: coefficient times factor; 0 of a gate that no site has decided yet
    gate_owns: Tensor  # [G, T] float32: what the factor of a joined gate is by itself; nothing reads it on the device


class SlotForm(NamedTuple):
    """What the slots of an engine may be; constants of a trace, so that what is not declared is in no graph."""

    count: int  # type: ignore[assignment]  # K: slots that act on one token at one site
    responses: tuple[str, ...]  # of `trimtab.responses.RESPONSES`, those that may occur
    writes: bool  # whether a slot may write along another direction than it reads

    @property
    def looks_back(self) -> bool:
        """Whether a response looks at the stream as it was before any steering."""
        return any(RESPONSES[name].stage is not Stage.LOCAL for name in self.responses)

    @property
    def reads_float32(self) -> bool:
        """Whether slots read to all digits of float32."""
        return any(RESPONSES[name].reads_float32 for name in self.responses)

    @property
    def rows(self) -> int:
        """C: table rows that a slot names."""
        return FLOAT32_SLOT_ROWS if self.reads_float32 else SLOT_ROWS


class SlotOpArgs(NamedTuple):
    """Arguments of `trimtab::apply_slots_`.

    K slots per row; a token's slots are those of its row. Directions are rows of the site's table. Record 0 is zero
    forever, and so is what stands where a row has fewer slots than K.
    """

    steered: Tensor  # [N, H] the tensor at the hook point after all that is added; changed in place; model dtype, or
    # float32 where responses look back
    hidden_states: Tensor  # [N, H] model dtype: the same before any steering; or [0, H] where no response looks back
    hidden_rest: Tensor  # [N, H], what must be added to it to make the full stream, or [0, H] where it is the stream
    steering_table: Tensor  # [R, H] model dtype: the site's rows, shared with rows that are added
    steering_index: Tensor  # [T] int64: token -> row
    slot_rows: Tensor  # [R, K, C] int64: what a slot reads and writes along; 0 reads nothing, or writes what it reads;
    # C is 2, or 4 where a response reads to the digits of float32: then two more rows of what is read, 2^-8 apart
    slot_codes: Tensor  # [R, K, 2] int32: code of the response; gate, counted from 1, or 0
    slot_params: Tensor  # [R, K, 10] float32: read factor, bias, the response's own numbers, place of a second score
    slot_mix: Tensor  # [R, K, K] float32: slot k writes sum(mix[k, j] * number j)
    gate_values: Tensor  # [G, T] float32: each gate's factor; or [0, T]
    slot_corrections: Tensor  # [K, T] float32, written: c of each slot, before they are mixed


class RouteOpArgs(NamedTuple):
    """What `trimtab.ops.route` reads and writes; it is no operator, since no graph holds it.

    What is per token may be longer than the pass has tokens. All from `head` on are those of `SpanBuffers`.
    """

    token_words: Tensor  # [T, 8] int64: the records of all tokens; of those with a line all but it is written
    gate_words: Tensor  # [T, W] int64: their gate records, written likewise; W is 0 without gates
    positions: Tensor  # [T] int32 or int64: those of one request ascend by one
    token_ids: Tensor  # [T] int32 or int64; with [0] no request of the batch has atoms
    head: Tensor
    choices: Tensor
    tokens: Tensor
    gates: Tensor
    schedules: Tensor
    atoms: Tensor
    runs: Tensor
    rings: Tensor  # written
    decided: Tensor  # written


def check_steering_args(args: SteeringOpArgs) -> None:
    """Raise ValueError for shapes that a kernel would read out of bounds. Looks at no size that varies per call."""
    if args.hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must be [N, H], got {tuple(args.hidden_states.shape)}")
    rows, width = args.steering_table.shape
    if args.hidden_states.shape[1] != width:
        raise ValueError(f"hidden_states is {args.hidden_states.shape[1]} wide, steering_table {width}")
    _check_params("steering_monitor_params", args.steering_monitor_params)
    probes, params = args.steering_monitor_probe_table.shape, args.steering_monitor_row_params.shape
    if args.has_row_monitor:
        if params != (rows, 2):
            raise ValueError(f"steering_monitor_row_params must be [{rows}, 2] as the table has rows, got {params}")
    elif probes != (1, 1):
        raise ValueError(
            f"steering_monitor_probe_table must be [1, 1] or, with the row monitor, [{rows}, {width}]; got {probes}"
        )


def check_monitor_args(args: MonitorOpArgs) -> None:
    """Raise ValueError for shapes that a kernel would read out of bounds. Looks at no size that varies per call."""
    if args.hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must be [N, H], got {tuple(args.hidden_states.shape)}")
    if args.probe.shape != (args.hidden_states.shape[1],):
        raise ValueError(f"probe must be [{args.hidden_states.shape[1]}], got {tuple(args.probe.shape)}")
    _check_params("params", args.params)


def check_gate_args(args: GateOpArgs) -> None:
    """Raise ValueError for shapes that a kernel would read out of bounds. Looks at no size that varies per call."""
    if args.hidden_states.dim() != 2 or args.steered.dim() != 2:
        raise ValueError(
            f"hidden_states and steered must be [N, H], got {tuple(args.hidden_states.shape)} and "
            f"{tuple(args.steered.shape)}"
        )
    width = args.hidden_states.shape[1]
    for name in ("steered", "hidden_rest", "steering_table", "gate_probe_table"):
        tensor = getattr(args, name)
        if tensor.shape[-1] != width:
            raise ValueError(f"hidden_states is {width} wide, {name} {tensor.shape[-1]}")
    gates = args.gate_rows.shape[1]
    for name, shape in (("gate_probes", (gates,)), ("gate_sites", (gates,)), ("gate_params", (gates, GATE_PARAMS))):
        if getattr(args, name).shape[1:] != shape:
            raise ValueError(
                f"{name} must be [T, {', '.join(map(str, shape))}], got {tuple(getattr(args, name).shape)}"
            )
    for name in ("gate_values", "gate_gains", "gate_owns"):
        if getattr(args, name).shape[0] != gates:
            raise ValueError(f"{name} must be [{gates}, T], got {tuple(getattr(args, name).shape)}")


def check_slot_args(args: SlotOpArgs) -> None:
    """Raise ValueError for shapes that a kernel would read out of bounds. Looks at no size that varies per call."""
    if args.steered.dim() != 2:
        raise ValueError(f"steered must be [N, H], got {tuple(args.steered.shape)}")
    width = args.steered.shape[1]
    for name in ("hidden_states", "hidden_rest", "steering_table"):
        tensor = getattr(args, name)
        if tensor.shape[-1] != width:
            raise ValueError(f"steered is {width} wide, {name} {tensor.shape[-1]}")
    rows, slots = args.steering_table.shape[0], args.slot_rows.shape[1]
    named = FLOAT32_SLOT_ROWS if args.slot_rows.shape[2] > SLOT_ROWS else SLOT_ROWS
    parts = {"slot_rows": named, "slot_codes": 2, "slot_params": SLOT_PARAMS, "slot_mix": slots}
    for name, numbers in parts.items():
        shape, found = (rows, slots, numbers), tuple(getattr(args, name).shape)
        if found != shape:
            raise ValueError(f"{name} must be {list(shape)} as the table has rows and slot_rows slots, got {found}")
    if args.gate_values.dim() != 2:
        raise ValueError(f"gate_values must be [G, T], got {tuple(args.gate_values.shape)}")
    if args.slot_corrections.dim() != 2 or args.slot_corrections.shape[0] != slots:
        raise ValueError(f"slot_corrections must be [{slots}, T], got {tuple(args.slot_corrections.shape)}")


def check_capacity(hidden_states: Tensor, *per_token: Tensor) -> None:
    """Raise ValueError where a per-token buffer is shorter than the call has tokens."""
    tokens = hidden_states.shape[0]
    for buffer in per_token:
        if buffer.shape[0] < tokens:
            raise ValueError(f"{tokens} tokens, but a per-token buffer holds {buffer.shape[0]}")


def _check_params(name: str, params: Tensor) -> None:
    if params.numel() < 3:
        raise ValueError(f"{name} must hold threshold, sharpness and gate_rows, got {params.numel()} value(s)")
