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

from ops_triton import RecordedKernel, loads_before_a_wait, machine_code, recorded, resource_usage

from trimtab.ops import MonitorOpArgs, SteeringOpArgs
from trimtab.ops.kernels import apply_steering as apply_module
from trimtab.ops.kernels.launch import REGISTERS, Launch, steering_launch_sizes
from trimtab.ops.seed import steering_monitor as monitor_module

HERE = Path(__file__).parent
ARCHITECTURES = [80, 90, 100]
WIDTHS = [1, 100, 2048, 2880, 4096, 8192, 16384]
WIDEST = 16384  # too much of it is held by each of 512 threads for float32: there some registers may spill


def test_interpreted_kernels_equal_the_oracle() -> None:
    run = subprocess.run(
        [sys.executable, HERE / "interpreted_kernels.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("width", "row_monitor", "num_warps", "registers"),
    [
        (100, False, 1, (64, 96)),
        (2048, False, 4, (64, 96)),
        (2880, False, 8, (64, 96)),
        (4096, False, 8, (64, 96)),
        (8192, False, 16, (64, 96)),
        (16384, False, 16, (128, 128)),
        (100, True, 1, (128, 192)),
        (2048, True, 2, (128, 192)),
        (4096, True, 4, (128, 192)),
        (8192, True, 8, (128, 192)),
        (16384, True, 16, (128, 128)),
    ],
)
def test_launches_fill_the_registers_of_a_multiprocessor_with_resident_programs(
    width: int, row_monitor: bool, num_warps: int, registers: tuple[int, int], dtype: torch.dtype
) -> None:
    bound = registers[dtype == torch.float32]
    most = REGISTERS // (32 * num_warps * bound)
    assert most >= 1
    block = 1 << (width - 1).bit_length()
    for tokens, programs in ((1, 1), (most + 1, most)):
        sizes = steering_launch_sizes(steering_case(tokens, width, dtype=dtype, row_monitor=row_monitor))
        assert sizes == Launch(block, num_warps, bound, programs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_variant_compiles_without_spills_and_within_its_registers(
    dtype: torch.dtype, width: int, architecture: int
) -> None:
    for row_monitor, in_place in itertools.product([False, True], repeat=2):
        kernel = launched(steering_case(4, width, dtype=dtype, row_monitor=row_monitor), in_place=in_place)
        given = kernel.launches[0]
        usage = resource_usage(kernel.build(given, architecture))
        assert usage["REG"] <= given["maxnreg"], (row_monitor, in_place)
        assert given["maxnreg"] * given["num_warps"] * 32 <= REGISTERS, (row_monitor, in_place)  # or it cannot start
        if (width, dtype) != (WIDEST, torch.float32):
            assert usage["STACK"] == usage["LOCAL"] == 0, (row_monitor, in_place)
    monitor = launched_monitor(monitor_case(4, width, dtype=dtype))
    usage = resource_usage(monitor.build(monitor.launches[0], architecture))
    assert usage["REG"] <= (128 if width == WIDEST else 64)
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


@pytest.mark.parametrize("width", [2048, 4096, 8192])
@pytest.mark.parametrize("row_monitor", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_all_loads_of_a_steered_token_start_before_one_is_waited_for(
    width: int, row_monitor: bool, in_place: bool
) -> None:
    kernel = launched(steering_case(4, width, dtype=torch.bfloat16, row_monitor=row_monitor), in_place=in_place)
    given = kernel.launches[0]
    rows = width // (given["num_warps"] * 32) // 8  # loads of 16 bytes per thread, to cover one of bfloat16
    # The hidden row in place (otherwise its load has started before), the table's, and the scale; with the row monitor
    # the probe, its threshold and sharpness, and the decode mask.
    expected = rows * (2 if in_place else 1) + 1 + (2 * rows + 3 if row_monitor else 0)
    assert loads_before_a_wait(machine_code(kernel.build(given, 90))) == expected


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
