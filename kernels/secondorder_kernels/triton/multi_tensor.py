"""Steps on many tensors, which are found by a table of addresses (see `addresses.py` of the package above)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secondorder_kernels.addresses import Table, table
from secondorder_kernels.triton.rounding import rounded

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def piece(table, chunks, FIELDS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """This program's line of the table and its number, and the piece's first element and all of them."""
    number = tl.load(chunks + 2 * tl.program_id(0))
    first = tl.load(chunks + 2 * tl.program_id(0) + 1)
    first = (first.to(tl.int64) if WIDE else first) * BLOCK
    return table + number.to(tl.int64) * FIELDS, number, first, tl.arange(0, BLOCK)


@triton.jit
def places(line, operand: tl.constexpr, first, index, FLAT: tl.constexpr):
    """Where a piece's elements lie in the memory of an operand, counted in elements."""
    place = first + index
    if not FLAT:
        columns = tl.load(line + 1).to(first.dtype)
        row, column = place // columns, place % columns
        place = row * tl.load(line + 3 + 3 * operand) + column * tl.load(line + 4 + 3 * operand)
    return place


@triton.jit
def pointers(line, operand: tl.constexpr, first, index, DTYPE: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to a piece's elements."""
    at = tl.load(line + 2 + 3 * operand).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at + places(line, operand, first, index, FLAT)


@triton.jit
def taken(at, inside, MASKED: tl.constexpr):
    """Elements in float32."""
    x = tl.load(at, mask=inside, other=0.0) if MASKED else tl.load(at)
    return x.to(tl.float32)


@triton.jit
def put(at, x, inside, MASKED: tl.constexpr):
    """Leave elements, rounded to nearest."""
    if MASKED:
        tl.store(at, x.to(at.dtype.element_ty), mask=inside)
    else:
        tl.store(at, x.to(at.dtype.element_ty))


@triton.jit
def weight(x):
    """1 - exp(x) for x <= 0, to a few units in the last place even where exp(x) is close to 1."""
    # Triton has no expm1. What its series leaves out is 1e-8 of it.
    series = 1.0 + x * (1.0 / 8.0)
    for k in tl.static_range(7, 1, -1):
        series = 1.0 + x * (1.0 / k) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _adamw_piece(
    p_at,
    g_at,
    m_at,
    v_at,
    inside,
    step_size,
    root,
    decay,
    beta1,
    fresh1,
    beta2,
    fresh2,
    eps,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    p, g = taken(p_at, inside, MASKED), taken(g_at, inside, MASKED)
    m, v = taken(m_at, inside, MASKED), taken(v_at, inside, MASKED)
    if MAXIMIZE:
        g = -g
    m = beta1 * m + fresh1 * g
    v = beta2 * v + fresh2 * (g * g)
    p -= decay * p
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    put(p_at, p, inside, MASKED)
    put(m_at, m, inside, MASKED)
    put(v_at, v, inside, MASKED)


@triton.jit
def _adamw(
    table,
    chunks,
    refused_at,
    lr_at,
    lr,
    log_beta1,
    log_beta2,
    beta1,
    fresh1,
    beta2,
    fresh2,
    eps,
    weight_decay,
    MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(refused_at) <= 0:
        line, number, first, index = piece(table, chunks, FIELDS, BLOCK, WIDE)
        size = tl.load(line)
        inside = index < size - first
        p_at = pointers(line, 0, first, index, DTYPE, FLAT, ALIGNED)
        g_at = pointers(line, 1, first, index, DTYPE, FLAT, ALIGNED)
        m_at = pointers(line, 2, first, index, DTYPE, FLAT, ALIGNED)
        v_at = pointers(line, 3, first, index, DTYPE, FLAT, ALIGNED)
        count = tl.load(tl.load(line + 2 + 3 * 5).to(tl.pointer_type(tl.float32)))
        if lr_at is not None:
            lr = tl.load(lr_at).to(tl.float32)
        t = tl.maximum(count, 1.0)  # as the reference has it
        step_size = tl.div_rn(lr, weight(t * log_beta1))
        root = tl.sqrt_rn(weight(t * log_beta2))
        decay = lr * weight_decay
        if FLAT and first + BLOCK <= size:  # without masks, whose ends no compiler knows, loads are wide
            _adamw_piece(
                p_at, g_at, m_at, v_at, inside, step_size, root, decay, beta1, fresh1, beta2, fresh2, eps,
                MAXIMIZE, False,
            )  # fmt: skip
        else:
            _adamw_piece(
                p_at, g_at, m_at, v_at, inside, step_size, root, decay, beta1, fresh1, beta2, fresh2, eps,
                MAXIMIZE, True,
            )  # fmt: skip


@triton.jit
def _update_piece(
    p_at,
    u_at,
    position,
    key,
    inside,
    lr,
    keep,
    DECAY: tl.constexpr,
    DECAY_AFTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
):
    p, u = taken(p_at, inside, MASKED), taken(u_at, inside, MASKED)
    if DECAY and not DECAY_AFTER:
        p = p * keep
    p -= lr * u
    if DECAY and DECAY_AFTER:
        p = p * keep
    put(p_at, rounded(p, key, position, STOCHASTIC, p_at.dtype.element_ty), inside, MASKED)


@triton.jit
def _apply_update(
    table,
    chunks,
    keys_at,
    lr_at,
    keep_at,
    lr,
    DECAY_AFTER: tl.constexpr,
    P_TYPE: tl.constexpr,
    U_TYPE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line, number, first, index = piece(table, chunks, FIELDS, BLOCK, WIDE)
    size = tl.load(line)
    inside = index < size - first
    p_at = pointers(line, 0, first, index, P_TYPE, FLAT, ALIGNED)
    u_at = pointers(line, 1, first, index, U_TYPE, FLAT, ALIGNED)
    DECAY: tl.constexpr = keep_at is not None
    STOCHASTIC: tl.constexpr = keys_at is not None
    position, key, keep = index, number, 1.0
    if STOCHASTIC:
        position, key = places(line, 2, first, index, FLAT), tl.load(keys_at + number).to(tl.uint32)
    if DECAY:
        keep = tl.load(keep_at).to(tl.float32)
    if lr_at is not None:
        lr = tl.load(lr_at).to(tl.float32)
    if FLAT and first + BLOCK <= size:
        _update_piece(p_at, u_at, position, key, inside, lr, keep, DECAY, DECAY_AFTER, STOCHASTIC, False)
    else:
        _update_piece(p_at, u_at, position, key, inside, lr, keep, DECAY, DECAY_AFTER, STOCHASTIC, True)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: list[Tensor],
    refused: Tensor,
    *,
    lr: float = 0.0,
    lr_tensor: Tensor | None = None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    config: Mapping[str, Any],
) -> None:
    """Launch on pieces of `config["block"]` elements."""
    found = table((params, grads, exp_avgs, exp_avg_sqs), counts)
    chunks = found.chunks(config["block"])
    if len(chunks) == 0:
        return
    _adamw[(len(chunks),)](
        found.lines,
        chunks,
        refused,
        lr_tensor,
        float(lr),  # whole numbers would be compiled in
        *(math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)),
        float(beta1),
        float(1 - beta1),
        float(beta2),
        float(1 - beta2),
        float(eps),
        float(weight_decay),
        MAXIMIZE=maximize,
        DTYPE=_TYPES[params[0].dtype],
        **_constants(found, config),
    )
    _written(params)


def apply_update_(
    params: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float = 0.0,
    lr_tensor: Tensor | None = None,
    keep: Tensor | None = None,
    decay_after: bool = False,
    keys: Tensor | None = None,
    config: Mapping[str, Any],
) -> None:
    """Launch on pieces of `config["block"]` elements."""
    found = table((params, updates))
    chunks = found.chunks(config["block"])
    if len(chunks) == 0:
        return
    _apply_update[(len(chunks),)](
        found.lines,
        chunks,
        keys,
        lr_tensor,
        keep,
        float(lr),
        DECAY_AFTER=decay_after,
        P_TYPE=_TYPES[params[0].dtype],
        U_TYPE=_TYPES[updates[0].dtype],
        **_constants(found, config),
    )
    _written(params)


def _constants(found: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "FLAT": found.flat,
        "ALIGNED": found.aligned,
        "WIDE": found.wide,
        "FIELDS": found.lines.shape[1],
        "BLOCK": config["block"],
        "num_warps": config["num_warps"],
    }


def _written(params: list[Tensor]) -> None:
    """Let autograd know, which finds graphs that saved the parameters as they were."""
    torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])
