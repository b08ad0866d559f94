"""Runs the kernels in Triton's interpreter on rows of any magnitude. A program: `python interpreted_magnitudes.py`."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from magnitude_cases import HALF_STEP, Engine, assorted, check

from trimtab.ops.buffers import steering_op_args
from trimtab.ops.gate_buffers import gate_op_args
from trimtab.ops.kernels.apply_gates import launch_apply_gates
from trimtab.ops.kernels.apply_steering import launch_apply_steering
from trimtab.ops.kernels.launch import Launch
from trimtab.sites import HookPoint

if __name__ == "__main__":
    launch = Launch(16, 1, None, 5)
    for seed, dtype in enumerate(HALF_STEP):
        requests = assorted(seed)
        engine, received = Engine(requests, dtype), []
        for layer in engine.layers:
            stream, out = engine.stream, engine.stream
            launch_apply_steering(steering_op_args(layer, HookPoint.POST_BLOCK, stream), out, launch)
            launch_apply_gates(gate_op_args(layer, HookPoint.POST_BLOCK, out, stream, None), launch)
            received.append(out)
        check(received, requests, dtype)
    print("3 dtypes equal the oracle")
