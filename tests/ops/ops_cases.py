"""Random but well-formed operator arguments for the tests, with every term switched by name."""

import torch
from torch import Tensor

from trimtab.ops.args import NO_THRESHOLD, MonitorOpArgs, SteeringOpArgs


def steering_case(
    tokens: int,
    width: int,
    *,
    rows: int = 5,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype | None = None,
    active: bool = True,
    monitor: bool = False,
    gate_rows: bool = False,
    row_monitor: bool = False,
    row_active: bool | None = None,
    tier: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> SteeringOpArgs:
    """Arguments whose scores lie around the thresholds, so that gates are neither 0 nor 1. Row 0 is zero."""
    random = torch.Generator().manual_seed(seed)
    capacity = tokens if capacity is None else capacity

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random) * scale

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    table = normal(rows, width)
    table[0] = 0
    probes = normal(rows, width, scale=width**-0.5) if row_monitor else torch.zeros(1, 1)
    row_params = torch.stack([uniform(rows) - 0.5, 1 + uniform(rows)], 1) if row_monitor else torch.empty(1, 2)
    if row_monitor:
        probes[0] = 0
    row_params[0] = torch.tensor([NO_THRESHOLD, 1.0])
    args = SteeringOpArgs(
        hidden_states=normal(tokens, width).to(dtype),
        steering_table=table.to(table_dtype or dtype),
        steering_index=torch.randint(0, rows, (capacity,), generator=random),
        any_active=torch.tensor([active]),
        steering_scales=0.5 + uniform(rows),
        steering_dynamic_vec=normal(width),
        steering_token_scales=uniform(capacity) * (uniform(capacity) < 0.5) if tier else torch.zeros(capacity),
        steering_row_gate=uniform(capacity),
        steering_monitor_probe=normal(width, scale=width**-0.5),
        steering_monitor_params=torch.tensor([0.1, 1.5, float(gate_rows)]),
        steering_monitor_active=torch.tensor([monitor]),
        steering_decode_mask=torch.randint(0, 2, (capacity,), generator=random).float(),
        steering_monitor_probe_table=probes,
        steering_monitor_row_params=row_params,
        steering_monitor_row_active=torch.tensor([row_monitor if row_active is None else row_active]),
    )
    return SteeringOpArgs(*[tensor.to(device) for tensor in args])


def monitor_case(
    tokens: int,
    width: int,
    *,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
    active: bool = True,
    gate_rows: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> MonitorOpArgs:
    """The monitor's part of a steering case."""
    args = steering_case(
        tokens, width, capacity=capacity, dtype=dtype, monitor=active, gate_rows=gate_rows, seed=seed, device=device
    )
    return MonitorOpArgs(
        hidden_states=args.hidden_states,
        probe=args.steering_monitor_probe,
        params=args.steering_monitor_params,
        monitor_active=args.steering_monitor_active,
        steering_token_scales=args.steering_token_scales,
        steering_decode_mask=args.steering_decode_mask,
        steering_row_gate=args.steering_row_gate,
    )
