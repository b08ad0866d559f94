"""The data plane: what steering means for a token, in three backends with one meaning. Knows no engine.

Importing this package registers `torch.ops.trimtab.{apply_steering, apply_steering_, steering_monitor, apply_gates_,
apply_slots_}`.
"""

from trimtab.ops import library as _library  # registers the operators
from trimtab.ops.args import GateOpArgs, MonitorOpArgs, SlotForm, SlotOpArgs, SteeringOpArgs
from trimtab.ops.buffers import (
    SteeringBuffers,
    monitor_op_args,
    register_steering_buffers,
    resize_row_monitor_buffers,
    share_token_buffers,
    steering_op_args,
)
from trimtab.ops.emission import Emission, set_emission
from trimtab.ops.emit import emit
from trimtab.ops.gate_buffers import GateBuffers
from trimtab.ops.reference import ALL_TERMS, ROWS_ONLY, Terms
from trimtab.ops.slot_buffers import SlotBuffers, slot_form, slot_op_args, slot_record

__all__ = [
    "ALL_TERMS",
    "ROWS_ONLY",
    "Emission",
    "GateBuffers",
    "GateOpArgs",
    "MonitorOpArgs",
    "SlotBuffers",
    "SlotForm",
    "SlotOpArgs",
    "SteeringBuffers",
    "SteeringOpArgs",
    "Terms",
    "emit",
    "monitor_op_args",
    "register_steering_buffers",
    "resize_row_monitor_buffers",
    "set_emission",
    "share_token_buffers",
    "slot_form",
    "slot_op_args",
    "slot_record",
    "steering_op_args",
]

del _library
