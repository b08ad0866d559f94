"""Registration, sharing and ownership of the buffers that a steered module reads, and the call made at a hook point."""

import pytest
import torch
from torch import nn

from trimtab.ops import (
    Emission,
    SteeringBuffers,
    SteeringOpArgs,
    emit,
    register_steering_buffers,
    resize_row_monitor_buffers,
    set_emission,
    share_token_buffers,
    steering_op_args,
)
from trimtab.ops.buffers import buffer_name, has_steering, monitor_op_args
from trimtab.sites import HookPoint, Site

POST, PRE = HookPoint.POST_BLOCK, HookPoint.PRE_ATTN


def registered(hooks: tuple[HookPoint, ...] = (POST,), *, hidden_size: int = 8) -> nn.Module:
    module = nn.Module()
    register_steering_buffers(module, hidden_size, max_tokens=16, max_rows=4, dtype=torch.bfloat16, hook_points=hooks)
    return module


def owner(layers: int = 2, **changes: object) -> SteeringBuffers:
    settings = {"hidden_size": 8, "max_rows": 4, "max_tokens": 16, "dtype": torch.bfloat16} | changes
    return SteeringBuffers([Site(layer, hook) for layer in range(layers) for hook in (POST, PRE)], **settings)


def test_registered_buffers_have_the_published_names_shapes_and_defaults() -> None:
    module = registered()
    expected = {
        "steering_table_post_block": ((4, 8), torch.bfloat16, 0),
        "steering_index": ((16,), torch.int64, 0),
        "steering_table_post_block_any_active": ((1,), torch.bool, False),
        "steering_scales": ((4,), torch.float32, 1),
        "steering_table_post_block_dynamic_vec": ((8,), torch.float32, 0),
        "steering_token_scales": ((16,), torch.float32, 0),
        "steering_row_gate": ((16,), torch.float32, 1),
        "steering_table_post_block_monitor_probe": ((8,), torch.float32, 0),
        "steering_table_post_block_monitor_params": ((3,), torch.float32, [0.0, 1.0, 0.0]),
        "steering_table_post_block_monitor_active": ((1,), torch.bool, False),
        "steering_decode_mask": ((16,), torch.float32, 0),
        "steering_table_post_block_monitor_probe_table": ((1, 1), torch.float32, 0),
        "steering_table_post_block_monitor_row_params": ((1, 2), torch.float32, [[-1e30, 1.0]]),
        "steering_table_post_block_monitor_row_active": ((1,), torch.bool, False),
        "steering_monitor_off": ((1,), torch.bool, False),
    }
    buffers = dict(module.named_buffers())
    assert set(buffers) == set(expected)
    for name, (shape, dtype, value) in expected.items():
        assert (tuple(buffers[name].shape), buffers[name].dtype) == (shape, dtype), name
        assert torch.equal(buffers[name], torch.tensor(value, dtype=dtype).expand(shape)), name
    assert not module.state_dict(), "buffers are not part of a checkpoint"


def test_builder_follows_the_tuple_and_its_names() -> None:
    module = registered((POST, PRE))
    hidden = torch.zeros(2, 8)
    args = steering_op_args(module, PRE, hidden)
    assert args.hidden_states is hidden
    for field in SteeringOpArgs._fields[1:]:
        assert getattr(args, field) is getattr(module, buffer_name(field, PRE)), field


def test_hooks_of_one_module_share_scales_and_token_buffers_only() -> None:
    module = registered((POST, PRE))
    post, pre = (steering_op_args(module, hook, torch.zeros(2, 8)) for hook in (POST, PRE))
    shared = {field for field in SteeringOpArgs._fields[1:] if getattr(post, field) is getattr(pre, field)}
    assert shared == {
        "steering_index",
        "steering_scales",
        "steering_token_scales",
        "steering_row_gate",
        "steering_decode_mask",
    }


def test_no_rows_means_no_buffers_and_no_effect() -> None:
    module = nn.Module()
    register_steering_buffers(module, 8, max_tokens=4, max_rows=0, dtype=torch.float32)
    assert not list(module.buffers())
    hidden = torch.randn(2, 8)
    assert emit(module, POST, hidden) is hidden


def test_nonsense_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_rows=-1"):
        register_steering_buffers(nn.Module(), 8, max_tokens=4, max_rows=-1, dtype=torch.float32)


def test_resize_takes_the_rows_of_the_table_and_keeps_what_is_already_full_size() -> None:
    module, untouched = registered((POST, PRE)), nn.Module()
    resize_row_monitor_buffers([module, untouched])
    args = steering_op_args(module, POST, torch.zeros(2, 8))
    assert args.has_row_monitor
    assert args.steering_monitor_probe_table.shape == (4, 8)
    assert args.steering_monitor_row_params.tolist() == [[torch.tensor(-1e30).item(), 1.0]] * 4
    args.steering_monitor_probe_table.fill_(3.0)
    resize_row_monitor_buffers([module])
    assert steering_op_args(module, POST, torch.zeros(2, 8)).steering_monitor_probe_table.eq(3.0).all()
    assert not list(untouched.buffers())


def test_sharing_joins_token_buffers_and_nothing_else() -> None:
    first, second = registered(), registered()
    share_token_buffers([nn.Module(), first, second])
    first.steering_index[0] = 3
    first.steering_row_gate[1] = 0.5
    first.steering_token_scales[2] = 0.25
    first.steering_decode_mask[3] = 1.0
    first.steering_scales[1] = 9.0
    assert second.steering_index[0] == 3
    assert second.steering_row_gate[1] == 0.5
    assert second.steering_token_scales[2] == 0.25
    assert second.steering_decode_mask[3] == 1.0
    assert second.steering_scales[1] == 1.0


def test_builder_puts_the_flag_that_is_never_set_in_the_place_of_the_monitor_in_cross_layer_mode() -> None:
    module = registered()
    hidden = torch.zeros(2, 8)
    assert steering_op_args(module, POST, hidden).steering_monitor_active is not module.steering_monitor_off
    set_emission(module, Emission(cross_layer=True))
    assert steering_op_args(module, POST, hidden).steering_monitor_active is module.steering_monitor_off
    monitor = monitor_op_args(module, POST, hidden)
    assert monitor.monitor_active is module.steering_table_post_block_monitor_active
    assert monitor.steering_token_scales is module.steering_token_scales


def test_owner_orders_its_sites_as_the_forward_pass_reaches_them() -> None:
    assert owner().sites == (Site(0, PRE), Site(0, POST), Site(1, PRE), Site(1, POST))


def test_attached_tensors_are_views_of_the_owner() -> None:
    buffers, module = owner(), nn.Module()
    buffers.attach(module, Site(1, POST))
    at = buffers.sites.index(Site(1, POST))
    buffers.table[at, 2] = 5.0
    buffers.any_active[at] = True
    buffers.monitor_params[at, 2] = 1.0
    args = steering_op_args(module, POST, torch.zeros(2, 8))
    assert args.steering_table[2].eq(5.0).all()
    assert args.any_active.item()
    assert args.steering_monitor_params.tolist() == [0.0, 1.0, 1.0]
    assert not has_steering(module, PRE)
    with pytest.raises(KeyError):
        buffers.attach(module, Site(7, POST))


def test_one_copy_into_the_slab_sets_all_values_of_a_step() -> None:
    import numpy as np

    names, formats = ["index", "row_gate", "token_scale", "decode"], ["<i8", "<f4", "<f4", "<f4"]
    record = np.dtype({"names": names, "formats": formats, "offsets": [0, 16, 32, 48], "itemsize": 64})
    step = np.zeros(3, record)
    step["index"], step["row_gate"], step["token_scale"], step["decode"] = [1, 2, 3], [0.5, 1, 2], [0, 4, 0], [1, 0, 1]
    buffers = owner()
    buffers.token_slab[:3].copy_(torch.from_numpy(step.view(np.uint8).reshape(3, -1)))
    assert buffers.index[:4].tolist() == [1, 2, 3, 0]
    assert buffers.row_gate[:4].tolist() == [0.5, 1.0, 2.0, 1.0]
    assert buffers.token_scales[:4].tolist() == [0.0, 4.0, 0.0, 0.0]
    assert buffers.decode_mask[:4].tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("hidden_size", [5, 8, 100])
@pytest.mark.parametrize("row_monitor", [False, True])
def test_every_site_has_the_same_alignment_and_strides(hidden_size: int, row_monitor: bool) -> None:
    buffers = owner(3, hidden_size=hidden_size, max_rows=3, row_monitor=row_monitor)
    layouts = set()
    for site in buffers.sites:
        module = nn.Module()
        buffers.attach(module, site)
        args = steering_op_args(module, site.hook, torch.zeros(2, hidden_size))
        assert args.has_row_monitor is row_monitor
        layouts.add(tuple((t.stride(), t.data_ptr() % 16) for t in args[1:]))
    assert len(layouts) == 1


@pytest.mark.parametrize("hidden_size", [5, 8, 100])
def test_every_tensor_starts_on_16_bytes(hidden_size: int) -> None:
    """Compiled graphs copy an input that does not, at every call."""
    buffers = owner(3, hidden_size=hidden_size, max_rows=3, gates=3, max_probes=5)
    for site in buffers.sites:
        module = nn.Module()
        buffers.attach(module, site)
        odd = [name for name, tensor in module.named_buffers() if tensor.data_ptr() % 16]
        assert not odd, f"{site}: {odd}"


def test_owner_reports_the_bytes_that_its_tables_take() -> None:
    small, large = owner(max_rows=8), owner(max_rows=12)
    assert large.nbytes - small.nbytes == 4 * 4 * 8 * 2 + 4 * 4  # 4 sites x 4 rows x 8 bfloat16, and 4 scales
    assert owner(max_tokens=32).nbytes - owner(max_tokens=16).nbytes == 16 * 64


def test_emit_steers_any_leading_shape() -> None:
    buffers, module = owner(), nn.Module()
    buffers.attach(module, Site(0, POST))
    buffers.any_active.fill_(True)
    buffers.table[:, 1] = 1.0
    buffers.index[:6] = torch.tensor([0, 1, 0, 1, 1, 0])
    hidden = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    out = emit(module, POST, hidden)
    assert out.shape == (2, 3, 8)
    assert out[..., 0].tolist() == [[0, 1, 0], [1, 1, 0]]
    assert not hidden.any()
    assert emit(module, POST, hidden, in_place=True)[..., 0].tolist() == [[0, 1, 0], [1, 1, 0]]
    assert hidden[..., 0].tolist() == [[0, 1, 0], [1, 1, 0]]
