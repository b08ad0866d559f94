"""The public face of the tensors that steered modules read."""

from trimtab.ops.engine_buffers import SteeringBuffers
from trimtab.ops.seed.registration import register_steering_buffers, resize_row_monitor_buffers, share_token_buffers
from trimtab.ops.site_buffers import TOKEN_BYTES, buffer_name, has_steering, monitor_op_args, steering_op_args

__all__ = [
    "TOKEN_BYTES",
    "SteeringBuffers",
    "buffer_name",
    "has_steering",
    "monitor_op_args",
    "register_steering_buffers",
    "resize_row_monitor_buffers",
    "share_token_buffers",
    "steering_op_args",
]
