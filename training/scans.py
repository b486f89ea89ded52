"""Liquid and spiking cells over time, their gradients by hand: the maths of `training.cells`, step by step, in less
than two thirds of what autograd takes for it.

What does not depend on the step before is made for all steps at once, in the gradient each weight's, too (behind a
hidden layer, CHUNK steps at once). T steps of B lanes; where `keep` (T, B, 1) is False nothing happens (padding), where
`reset` (T, B, 1) is True a step starts from rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

INNER, OUTER = 0.666, 1.7159  # of ncps's hidden layer (LeCun et al. 1998, Efficient BackProp, give 2/3)
CHUNK = 4  # steps behind a hidden layer: with 8 it is no faster, and their gates take twice the memory

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
    """`cfc_step` over time, `apply(driven, h, w_rec, dt, keep, reset)`: driven (T, B, 4 n), h (B, n), w_rec (4 n, n),
    dt (T, B, 1) in nominal periods, which gets no gradient -> (T, B, n)."""

    @staticmethod
    def forward(ctx: Any, driven: Tensor, h: Tensor, w_rec: Tensor, dt: Tensor, keep: Tensor, reset: Tensor) -> Tensor:
        n = h.shape[1]
        out, share, f_g = (driven.new_empty(*driven.shape[:2], size) for size in (n, n, 2 * n))
        before, recurrent = h, w_rec.T
        for t, (after, both, s) in enumerate(zip(out.unbind(), f_g.unbind(), share.unbind())):
            gates = torch.addmm(driven[t], torch.where(reset[t], 0.0, before), recurrent)
            _open(gates, dt[t], both, s)
            torch.lerp(both[:, :n], both[:, n:], s, out=after)
            before = after.copy_(torch.where(keep[t], after, before))
        ctx.save_for_backward(h, w_rec, dt, keep, reset, f_g, share, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        h, w_rec, dt, keep, reset, f_g, share, out = ctx.saved_tensors
        kept, live = keep.to(out.dtype), 1 - reset.to(out.dtype)
        # Of h by each of the gates; becomes the gradient by them step by step, in its place.
        d_gates = share.new_empty(*share.shape[:2], 4 * share.shape[2])
        _slopes(f_g, share, dt, out=d_gates)
        d_gates *= kept
        d_h = grad[-1]
        for t, d_gate in reversed(list(enumerate(d_gates.unbind()))):
            d_gate.unflatten(1, (4, -1)).mul_(d_h[:, None])
            d_start = (d_gate @ w_rec).mul_(live[t])
            d_h = torch.addcmul(d_start, d_h, 1 - kept[t])
            if t:
                d_h += grad[t - 1]
        starts = torch.cat([h[None], out[:-1]]).mul_(live)
        return d_gates, d_h, d_gates.flatten(0, 1).T @ starts.flatten(0, 1), None, None, None


class BackboneCfCScan(torch.autograd.Function):
    """`cfc_step` behind a hidden layer, over time, `apply(driven, h, w_rec, w_gates, b_gates, dt)`: driven (T, B, k),
    h (B, n), w_rec (k, n), w_gates (4 n, k), b_gates (4 n,), dt as of `CfCScan`, all of one precision -> (T, B, n).

        z = tanh(INNER (driven + w_rec h)),   gates = OUTER w_gates z + b_gates

    dt None: of one period each; w_gates (3 n, k), b_gates (3 n,), the last gate being time_a + time_b. The gates, which
    are many times the hidden layer, are not kept: for the gradient they are made anew of it, CHUNK steps at once.
    """

    @staticmethod
    def forward(
        ctx: Any, driven: Tensor, h: Tensor, w_rec: Tensor, w_gates: Tensor, b_gates: Tensor, dt: Tensor | None
    ) -> Tensor:
        n, layer, out = h.shape[1], torch.empty_like(driven), driven.new_empty(*driven.shape[:2], h.shape[1])
        before, recurrent = h, w_rec.T
        for t, (z, after) in enumerate(zip(layer.unbind(), out.unbind())):
            torch.tanh(torch.addmm(driven[t], before, recurrent, beta=INNER, alpha=INNER), out=z)
            gates = torch.addmm(b_gates, z, w_gates.T, alpha=OUTER)
            both, s = _open(gates, None if dt is None else dt[t], gates[:, : 2 * n])
            before = torch.lerp(both[:, :n], both[:, n:], s, out=after)
        ctx.save_for_backward(h, w_rec, w_gates, b_gates, dt, layer, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        h, w_rec, w_gates, b_gates, dt, layer, out = ctx.saved_tensors
        d_driven, slope = torch.empty_like(layer), layer.new_full((), INNER * OUTER)
        d_w_rec, d_w_gates, d_b_gates = (torch.zeros_like(w) for w in (w_rec, w_gates, b_gates))
        d_h = grad[-1]
        for part in reversed([slice(t, t + CHUNK) for t in range(0, len(layer), CHUNK)]):
            z, time = layer[part], None if dt is None else dt[part]
            # The gates; in their place, as in CfCScan, what h changes by each, and then the gradient.
            d_gates = torch.addmm(b_gates, z.flatten(0, 1), w_gates.T, alpha=OUTER).unflatten(0, z.shape[:2])
            _slopes(*_open(d_gates, time, d_gates[..., : 2 * h.shape[1]]), time, out=d_gates)
            d_in = torch.addcmul(slope, z, z, value=-INNER * OUTER, out=d_driven[part])
            for t in reversed(range(len(z))):
                d_gates[t].unflatten(1, (-1, h.shape[1])).mul_(d_h[:, None])
                d_h = d_in[t].mul_(d_gates[t] @ w_gates) @ w_rec
                if part.start + t:
                    d_h += grad[part.start + t - 1]
            starts = torch.cat([out[part.start - 1][None] if part.start else h[None], out[part][:-1]])
            d_w_rec.addmm_(d_in.flatten(0, 1).T, starts.flatten(0, 1))
            d_w_gates.addmm_(d_gates.flatten(0, 1).T, z.flatten(0, 1), alpha=OUTER)
            d_b_gates += d_gates.sum((0, 1))
            del d_gates  # before the next ones lie beside them
        return d_driven, d_h, d_w_rec, d_w_gates, d_b_gates, None


def _open(
    gates: Tensor, dt: Tensor | None, f_g: Tensor | None = None, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gates (..., 3 or 4 n) -> tanh of f and g (..., 2 n), and the share of g (..., n): in the places given."""
    n = gates.shape[-1] // (3 if dt is None else 4)
    time = gates[..., 2 * n :] if dt is None else torch.addcmul(gates[..., 3 * n :], gates[..., 2 * n : 3 * n], dt)
    return torch.tanh(gates[..., : 2 * n], out=f_g), torch.sigmoid(time, out=share)


def _slopes(f_g: Tensor, share: Tensor, dt: Tensor | None, out: Tensor) -> None:
    """What h changes by each of the gates that opened like this, into `out` (T, B, 3 or 4 n). There, in place of the
    first two gates, f_g may lie: they are written last."""
    (f, g), other, one = f_g.chunk(2, -1), 1 - share, share.new_ones(())
    by_f, by_g, *by_a, by_time = out.unflatten(2, (-1, share.shape[2])).unbind(2)
    torch.sub(g, f, out=by_time).mul_(share).mul_(other)
    if by_a:
        torch.mul(by_time, dt, out=by_a[0])
    torch.addcmul(one, f, f, value=-1, out=by_f).mul_(other)
    torch.addcmul(one, g, g, value=-1, out=by_g).mul_(share)
