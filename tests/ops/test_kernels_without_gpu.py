"""The kernels on a machine without a GPU: their numbers in Triton's interpreter, and their machine code."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import monitor_case, steering_case

pytest.importorskip("triton", reason="Triton is not installed")

from ops_triton import RecordedKernel, machine_code, recorded, resource_usage

from trimtab.ops import MonitorOpArgs, SteeringOpArgs
from trimtab.ops.kernels import apply_steering as apply_module
from trimtab.ops.kernels import steering_monitor as monitor_module

HERE = Path(__file__).parent
ARCHITECTURES = [80, 90, 100]
# A multiprocessor has 64K registers: at 64 a thread half of its 2048 threads are resident, which keeps enough loads in
# flight. A row of more than 4096 elements with its float32 probe, and any of 16384, is held at 32 elements per thread.
MOST_REGISTERS = {1: 64, 100: 64, 2048: 64, 2880: 64, 4096: 64, 8192: 64, 16384: 128}
MOST_REGISTERS_ROW_MONITOR = MOST_REGISTERS | {8192: 128}


def test_interpreted_kernels_equal_the_oracle() -> None:
    run = subprocess.run(
        [sys.executable, HERE / "interpreted_kernels.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "64 steering cases, 6 layouts, 12 monitor cases equal the oracle"


def launched(args: SteeringOpArgs, *, in_place: bool) -> RecordedKernel:
    with recorded(apply_module, "apply_steering_kernel") as kernel:
        out = args.hidden_states if in_place else torch.empty_like(args.hidden_states)
        apply_module.launch_apply_steering(args, out)
    return kernel


def launched_monitor(args: MonitorOpArgs) -> RecordedKernel:
    with recorded(monitor_module, "steering_monitor_kernel") as kernel:
        monitor_module.launch_steering_monitor(args)
    return kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", MOST_REGISTERS)
def test_every_variant_compiles_without_spills_and_within_its_registers(architecture: int, width: int) -> None:
    for row_monitor in (False, True):
        args = steering_case(4, width, dtype=torch.bfloat16, row_monitor=row_monitor)
        for in_place in (False, True):
            kernel = launched(args, in_place=in_place)
            usage = resource_usage(kernel.build(kernel.launches[0], architecture))
            most = (MOST_REGISTERS_ROW_MONITOR if row_monitor else MOST_REGISTERS)[width]
            assert usage["REG"] <= most, (row_monitor, in_place)
            assert usage["STACK"] == usage["LOCAL"] == 0, (row_monitor, in_place)
    monitor = launched_monitor(monitor_case(4, width, dtype=torch.bfloat16))
    usage = resource_usage(monitor.build(monitor.launches[0], architecture))
    assert usage["REG"] <= MOST_REGISTERS[width]
    assert usage["STACK"] == usage["LOCAL"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_loaded_and_stored_sixteen_bytes_at_a_time_and_once_per_token(dtype: torch.dtype) -> None:
    for row_monitor, in_place in itertools.product([False, True], repeat=2):
        kernel = launched(steering_case(4, 4096, dtype=dtype, row_monitor=row_monitor), in_place=in_place)
        code = machine_code(kernel.build(kernel.launches[0], 90))
        vectors = [line for line in code if ".128" in line]
        threads = kernel.launches[0]["num_warps"] * 32
        rows, wide = 4096 * dtype.itemsize // (threads * 16), 4096 * 4 // (threads * 16)  # per thread, to cover a row
        stores = [line for line in vectors if "STG" in line]
        assert len(stores) in (
            [rows] if in_place else [rows, 2 * rows]
        )  # out of place, a token may also just be copied
        # hidden and table; the probe and the tier, which are float32. With the row monitor its probe as well, and the
        # hidden row once more where the site has a probe too.
        assert len(vectors) - len(stores) == 2 * rows + 2 * wide + (wide + rows if row_monitor else 0)


@pytest.mark.parametrize("row_monitor", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_all_loads_of_a_token_start_before_one_is_waited_for(row_monitor: bool, in_place: bool) -> None:
    kernel = launched(steering_case(4, 4096, dtype=torch.bfloat16, row_monitor=row_monitor), in_place=in_place)
    code = machine_code(kernel.build(kernel.launches[0], 90))
    vectors = [number for number, line in enumerate(code) if "LDG.E.128" in line]
    per_thread = 4096 // (kernel.launches[0]["num_warps"] * 32) // 8
    first = vectors[2 * per_thread + (2 * per_thread if row_monitor else 0) - 1]  # hidden, row, its probe
    assert not [line for line in code[vectors[0] : first] if "PRMT" in line]  # which takes a pair of bfloat16 apart


def test_kernels_name_every_tensor_of_their_tuple() -> None:
    def pointers(kernel: Any) -> list[str]:
        return [name.removeprefix("p_") for name in kernel.arg_names if name.startswith("p_")]

    assert sorted(pointers(apply_module.apply_steering_kernel)) == sorted((*SteeringOpArgs._fields, "out"))
    assert sorted(pointers(monitor_module.steering_monitor_kernel)) == sorted(MonitorOpArgs._fields)


def test_launch_passes_tensors_and_strides_under_their_own_names() -> None:
    args = steering_case(4, 16, row_monitor=True)
    args = args._replace(
        hidden_states=torch.zeros(4, 48)[:, ::3],
        steering_row_gate=torch.zeros(4, 5)[:, 2],
        steering_monitor_row_params=torch.zeros(5, 7)[:, :4:2],
    )
    given = launched(args, in_place=True).launches[0]
    for field in SteeringOpArgs._fields:
        assert given[f"p_{field}"] is getattr(args, field)
    strides = {name: value for name, value in given.items() if "_stride_" in name}
    assert strides["hidden_states_stride_0"] == 48
    assert strides["hidden_states_stride_1"] == 3
    assert strides["steering_row_gate_stride_0"] == 5
    assert strides["steering_monitor_row_params_stride_0"] == 7
    assert strides["steering_monitor_row_params_stride_1"] == 2
    assert strides["steering_index_stride_0"] == 1


def test_one_token_of_any_layout_runs_the_variant_of_many() -> None:
    many, one, odd = (steering_case(n, 32) for n in (4, 1, 1))
    odd = odd._replace(hidden_states=torch.zeros(32, 1).t())
    assert odd.hidden_states.stride() == (1, 1)
    keys = [launched(args, in_place=True).keys for args in (many, one, odd)]
    assert keys[0] == keys[1] == keys[2]
