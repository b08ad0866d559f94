"""PyTorch stand-ins for the compiled operators `torch.ops._C.*` that only vLLM's CPU build has.

Names, argument order and meaning are vLLM's, so its CPU attention backend, worker and model runners run unmodified.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab_vllm_cpu.interpreter import hasten

_library: torch.library.Library | None = None


@cache
def replace_kernels() -> None:
    """Put PyTorch in the place of compiled and Triton kernels that do not run here; of each process with a worker."""
    import vllm.model_executor.layers.utils as layer_utils
    from vllm import triton_utils

    layer_utils.check_cpu_sgl_kernel = lambda *_: False  # a compiled bfloat16 GEMM that this wheel lacks
    if triton_utils.HAS_TRITON:  # interpreted; this one kernel does not run under the interpreter
        from vllm.v1.sample.ops import topk_topp_sampler

        hasten()
        topk_topp_sampler.HAS_TRITON = False
    elif hasattr(triton_utils, "dispatcher"):  # 0.26 has none, and a fallback that fits
        triton_utils.dispatcher.register_kernels(
            {"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": slot_mapping_kernel}
        )


def register_kernels() -> None:
    """Define each missing operator once per process; a real CPU build keeps its own."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("_C", "FRAGMENT")
    for schema, kernel in _KERNELS.items():
        name = schema.split("(", 1)[0]
        if hasattr(torch.ops._C, name):
            continue
        _library.define(schema)
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        if schema.endswith("-> ()"):
            torch.library.register_fake(f"_C::{name}", lambda *_, **__: None, lib=_library)
    for name in _NAMED_ONLY:
        if not hasattr(torch.ops._C, name):
            _library.define(f"{name}(Tensor(a!) out) -> ()")


# A pass of vLLM over compiled graphs compares every operator that writes to its arguments with these, one by one.
_NAMED_ONLY = (
    "fused_add_rms_norm",
    "fused_add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "rms_norm",
    "rms_norm_static_fp8_quant",
    "silu_and_mul",
    "silu_and_mul_quant",
    "fused_qk_norm_rope",
)


def slot_mapping_kernel(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: Tensor,
    positions_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    slot_mapping_ptr: Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    *_: Any,
    **__: Any,
) -> None:
    """Stand in for the Triton kernel of `v1/worker/block_table.py`; the fallback in 0.32.0 has another signature."""
    _compute_slot_mapping(query_start_loc_ptr, positions_ptr, block_table_ptr, slot_mapping_ptr, KV_CACHE_BLOCK_SIZE)


def _compute_slot_mapping(
    query_start_loc: Tensor, positions: Tensor, block_table: Tensor, slot_mapping: Tensor, block_size: int
) -> None:
    total = int(query_start_loc[-1])
    counts = (query_start_loc[1:] - query_start_loc[:-1]).long()
    request = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    position = positions[:total].long()
    block = block_table[request, position // block_size].long()
    slot_mapping[:total] = block * block_size + position % block_size
    slot_mapping[total:] = -1


def _reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,  # [blocks, kv heads, block size, head size]
    value_cache: Tensor,
    slot_mapping: Tensor,
    isa: str,
    k_scale: float,
    v_scale: float,
    kv_cache_dtype: str,
) -> None:
    count = min(slot_mapping.numel(), key.shape[0])
    written = (slot_mapping[:count] >= 0).nonzero().squeeze(-1)
    slots, block_size = slot_mapping[written], key_cache.shape[2]
    key_cache[slots // block_size, :, slots % block_size] = key[written].to(key_cache.dtype)
    value_cache[slots // block_size, :, slots % block_size] = value[written].to(value_cache.dtype)


def _attention_with_kv_cache(
    query: Tensor,  # [tokens, heads, head size]
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    sliding_window: int,
    block_table: Tensor,
    softcap: float,
    scheduler_metadata: Tensor,
    s_aux: Tensor | None,
    dynamic_causal: Tensor | None,
    k_scale: float,
    v_scale: float,
    kv_cache_dtype: str,
) -> None:
    heads, block_size = query.shape[1], key_cache.shape[2]
    groups = heads // key_cache.shape[1]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for i in range(len(starts) - 1):
        begin, end, kv_length = starts[i], starts[i + 1], lengths[i]
        q_length = end - begin
        if q_length <= 0:
            continue
        blocks = block_table[i, : (kv_length + block_size - 1) // block_size].long()
        # [blocks, heads, block size, d] -> [heads, kv length, d]
        k = key_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :kv_length].to(query.dtype)
        v = value_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :kv_length].to(query.dtype)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        q = query[begin:end].transpose(0, 1)
        distance = torch.arange(kv_length - q_length, kv_length).unsqueeze(1) - torch.arange(kv_length).unsqueeze(0)
        mask = torch.ones(q_length, kv_length, dtype=torch.bool)
        if causal if dynamic_causal is None else bool(dynamic_causal[i]):
            mask &= distance >= 0
        if sliding_window >= 0:  # the window's size counts the token itself
            mask &= distance.abs() < sliding_window
        if not softcap and s_aux is None and alibi_slopes is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            score = (q.float() @ k.float().transpose(1, 2)) * scale
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            if alibi_slopes is not None:
                score = score - alibi_slopes.view(-1, 1, 1) * distance
            score = score.masked_fill(~mask, float("-inf"))
            if s_aux is not None:  # attention sinks: one more logit per head, dropped after the softmax
                score = torch.cat([score, s_aux.float().view(-1, 1, 1).expand(-1, q_length, 1)], -1)
            out = score.softmax(-1)[..., :kv_length] @ v.float()
        output[begin:end] = out.transpose(0, 1).reshape(output[begin:end].shape).to(output.dtype)


def _rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> None:
    cos, sin = cos_sin_cache[positions.flatten()].chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary = cos_sin_cache.shape[-1]
    for tensor in (query, key):
        if tensor is None:
            continue
        x = tensor.view(positions.numel(), -1, head_size)[..., :rotary]
        a, b = x.chunk(2, -1) if is_neox else (x[..., ::2], x[..., 1::2])
        a, b = a * cos - b * sin, b * cos + a * sin
        x.copy_(torch.cat((a, b), -1) if is_neox else torch.stack((a, b), -1).flatten(-2))


def _fused_gumbel_argmax(logits: Tensor, seeds: Tensor) -> Tensor:
    noise = torch.empty_like(logits)
    for i, seed in enumerate(seeds.tolist()):
        noise[i].exponential_(generator=torch.Generator().manual_seed(seed))
    return (logits - noise.log()).argmax(-1)


def _prepack_moe_weight(weight: Tensor, output: Tensor, isa: str) -> None:
    output.copy_(weight)


def _cpu_fused_moe(
    output: Tensor,  # [tokens, H]
    input: Tensor,
    w13: Tensor,  # [experts, 2 I, H]: gates, then ups
    w2: Tensor,  # [experts, H, I]
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    skip_weighted: bool,
    act: str,
    isa: str,
) -> None:
    activation = {"silu": F.silu, "gelu": F.gelu}[act]
    total = torch.zeros_like(output)
    for expert in range(w13.shape[0]):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = F.linear(input[token], w13[expert], None if w13_bias is None else w13_bias[expert]).chunk(2, -1)
        out = F.linear(activation(gate) * up, w2[expert], None if w2_bias is None else w2_bias[expert])
        if not skip_weighted:
            out = out * topk_weights[token, slot].unsqueeze(-1).to(out.dtype)
        total.index_add_(0, token, out)
    output.copy_(total)


_KERNELS: dict[str, Any] = {
    "init_cpu_memory_env(int[] nodes) -> ()": lambda nodes: None,
    "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
    "Tensor(a!) slot_mapping, SymInt block_size) -> ()": _compute_slot_mapping,
    "get_scheduler_metadata(int num_reqs, int num_heads, int num_kv_heads, int head_dim, Tensor seq_lens, "
    "ScalarType dtype, Tensor query_start_loc, bool causal, int window, str isa, bool enable_kv_split, "
    "Tensor? dynamic_causal, str kv_cache_dtype='auto') -> Tensor": lambda *_: torch.empty(0, dtype=torch.int8),
    "cpu_attn_reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, str isa, float k_scale, float v_scale, str kv_cache_dtype) -> ()": _reshape_and_cache,
    "cpu_attention_with_kv_cache(Tensor query, Tensor key_cache, Tensor value_cache, Tensor(a!) output, "
    "Tensor query_start_loc, Tensor seq_lens, float scale, bool causal, Tensor? alibi_slopes, "
    "SymInt sliding_window, Tensor block_table, float softcap, Tensor scheduler_metadata, Tensor? s_aux, "
    "Tensor? dynamic_causal, float k_scale, float v_scale, str kv_cache_dtype) -> ()": _attention_with_kv_cache,
    "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox) -> ()": _rotary_embedding,
    "fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor": _fused_gumbel_argmax,
    "prepack_moe_weight(Tensor weight, Tensor(a!) output, str isa) -> ()": _prepack_moe_weight,
    "cpu_fused_moe(Tensor(a!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor topk_weights, Tensor topk_ids, bool skip_weighted, str act, str isa) -> ()": _cpu_fused_moe,
    "greedy_argmax(Tensor logits) -> Tensor": lambda logits: logits.argmax(-1),
}
