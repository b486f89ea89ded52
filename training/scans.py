"""Liquid and spiking cells over time, their gradients by hand: the maths of `training.cells`, step by step, in less
than two thirds of what autograd takes for it.

What does not depend on the step before is made for all steps at once, in the gradient each weight's, too. T steps of B
lanes; where `keep` (T, B, 1) is False nothing happens (padding), where `reset` (T, B, 1) is True a step starts from
rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]  # by each argument


class LIFScan(torch.autograd.Function):
    """`lif_step` over time, `apply(current, v, a, keep, reset, threshold, plain)`: current and a = exp(-dt / tau) of
    (T, B, n), v (B, n) -> spikes (T, B, n) and the last v."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, v: Tensor, a: Tensor, keep: Tensor, reset: Tensor, threshold: float, plain: bool
    ) -> tuple[Tensor, Tensor]:
        charge = current if plain else (1 - a) * current
        rest, (starts, charged, spikes) = v.new_zeros(()), (torch.empty_like(current) for _ in range(3))
        for t in range(len(current)):
            torch.where(reset[t], rest, v, out=starts[t])
            torch.mul(a[t], starts[t], out=charged[t]).add_(charge[t])
            torch.ge(charged[t], threshold, out=spikes[t])
            v = torch.where(keep[t], charged[t] - threshold * spikes[t], v)
        ctx.save_for_backward(current, a, keep, reset, starts, charged)
        ctx.threshold, ctx.plain = threshold, plain
        return spikes, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_spikes: Tensor, d_v: Tensor) -> Gradients:
        current, a, keep, reset, starts, charged = ctx.saved_tensors
        kept, by_start = keep.to(a.dtype), a * ~reset
        # By the spikes' share, as `cells.spike` has it; becomes the whole step by step, in its place.
        d_charged = d_spikes / (1 + (math.pi / 2 * (charged - ctx.threshold)) ** 2)
        for t in range(len(charged) - 1, -1, -1):
            d_charged[t].addcmul_(d_v, kept[t])
            d_v = torch.addcmul(by_start[t] * d_charged[t], d_v, 1 - kept[t])
        if ctx.plain:
            return d_charged, d_v, d_charged * starts, None, None, None, None
        return d_charged * (1 - a), d_v, d_charged * (starts - current), None, None, None, None


class CfCScan(torch.autograd.Function):
    """`cfc_step` over time, `apply(driven, h, w_rec, dt, keep, reset, w_gates, b_gates)`: driven (T, B, k), h (B, n),
    w_rec (k, n) -> (T, B, n).

    dt (T, B, 1) in nominal periods, which gets no gradient; None: of one period each, and one gate, time_a + time_b,
    instead of the two.
    keep and reset may be None: all steps count, and none starts from rest.
    w_gates (gates, k), b_gates: of the gates behind a hidden layer, tanh; None: what is driven are the gates.
    """

    @staticmethod
    def forward(
        ctx: Any, driven: Tensor, h: Tensor, w_rec: Tensor, dt: Tensor | None, keep: Tensor | None,
        reset: Tensor | None, w_gates: Tensor | None, b_gates: Tensor | None,
    ) -> Tensor:  # fmt: skip
        n, hidden = h.shape[1], None if w_gates is None else torch.empty_like(driven)
        out, share, f_g = (driven.new_empty(*driven.shape[:2], size) for size in (n, n, 2 * n))
        f, g = (half.unbind() for half in f_g.chunk(2, -1))
        steps = zip(driven.unbind(), out.unbind(), share.unbind(), f_g.unbind(), f, g)
        before, recurrent = h, w_rec.T
        for t, (gates, after, s, both, f_t, g_t) in enumerate(steps):
            start = before if reset is None else torch.where(reset[t], 0.0, before)
            gates = torch.addmm(gates, start, recurrent)
            if hidden is not None:
                gates = torch.addmm(b_gates, torch.tanh(gates, out=hidden[t]), w_gates.T)
            torch.tanh(gates[:, : 2 * n], out=both)
            time = gates[:, 2 * n :] if dt is None else torch.addcmul(gates[:, 3 * n :], gates[:, 2 * n : 3 * n], dt[t])
            torch.lerp(f_t, g_t, torch.sigmoid(time, out=s), out=after)
            before = after if keep is None else after.copy_(torch.where(keep[t], after, before))
        ctx.save_for_backward(h, w_rec, dt, keep, reset, w_gates, hidden, f_g, share, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        h, w_rec, dt, keep, reset, w_gates, hidden, f_g, share, out = ctx.saved_tensors
        kept = None if keep is None else keep.to(out.dtype)
        live = None if reset is None else 1 - reset.to(out.dtype)
        (f, g), other, one = f_g.chunk(2, -1), 1 - share, share.new_ones(())
        # Of h by each of the gates (T, B, 3 or 4, n); becomes the gradient by the gates step by step, in its place.
        d_gates = share.new_empty(*share.shape[:2], 3 if dt is None else 4, share.shape[2])
        by_f, by_g, *by_a, by_time = d_gates.unbind(2)
        torch.addcmul(one, f, f, value=-1, out=by_f).mul_(other)
        torch.addcmul(one, g, g, value=-1, out=by_g).mul_(share)
        torch.sub(g, f, out=by_time).mul_(share).mul_(other)
        if by_a:
            torch.mul(by_time, dt, out=by_a[0])
        if kept is not None:
            d_gates *= kept[..., None]
        # Without a hidden layer what is driven are the gates: the same memory.
        d_driven = d_gates.flatten(2) if hidden is None else torch.addcmul(one, hidden, hidden, value=-1)
        d_h = grad[-1]
        for t, (d_gate, d_in) in reversed(list(enumerate(zip(d_gates.unbind(), d_driven.unbind())))):
            d_gate *= d_h[:, None]
            if hidden is not None:
                d_in *= d_gate.flatten(1) @ w_gates
            d_start = d_in @ w_rec
            if live is not None:
                d_start *= live[t]
            d_h = d_start if kept is None else torch.addcmul(d_start, d_h, 1 - kept[t])
            if t:
                d_h += grad[t - 1]
        flat, starts = d_gates.flatten(2).flatten(0, 1), torch.cat([h[None], out[:-1]])
        if live is not None:
            starts *= live
        d_w_rec = d_driven.flatten(0, 1).T @ starts.flatten(0, 1)
        d_w_gates, d_b_gates = (None, None) if hidden is None else (flat.T @ hidden.flatten(0, 1), flat.sum(0))
        return d_driven, d_h, d_w_rec, None, None, None, d_w_gates, d_b_gates
