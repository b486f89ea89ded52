"""Two layers of spiking neurons over micro-steps of a constant input, fused: what a sample is worth in spikes.

    rate = spike_rate(x, w1, b1, w2, b2, steps=32)      # fc1 -> LIF -> fc2 -> LIF, the mean of the last one's spikes

The same maths as a loop of snntorch's `Leaky` (v = beta v + I - threshold * spike before it, reset by subtraction and
detached, surrogate gradient 1 / (slope |v - threshold| + 1)^2), but

- the first current is constant, so its product is made once and not `steps` times;
- all steps of the second layer's currents are one product;
- a layer's steps are one scan, which torch.compile makes one loop on a CPU and one kernel on a GPU;
- for the gradient the first current is kept and, a byte each, the gradient of the mean rate by each of the second
  layer's currents: it depends on nothing that comes later. At the sizes of `tests.benchmarks.cells` that moves a
  gradient by 1.6e-3 of its norm, where all neurons are far below their threshold by up to 4.4e-3. No product is made
  twice. The first layer's spikes and membranes are computed anew, chunk by chunk, so that what is at work fits the
  cache. The resets being detached, the gradient is a linear scan backwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = {"cpu": 32, "cuda": 4096}  # samples


class SpikeEncoder(nn.Module):
    """(N, inputs) -> the rates (N, units), multiples of 1 / steps, of the second of two layers; the first has twice as
    many neurons."""

    def __init__(
        self,
        inputs: int,
        units: int,
        steps: int = 32,
        beta: float = 0.95,
        threshold: float = 1.0,
        slope: float = 25.0,
        compiled: bool = True,
    ):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, 2 * units), nn.Linear(2 * units, units)
        self.steps, self.beta, self.threshold, self.slope, self.compiled = steps, beta, threshold, slope, compiled

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return spike_rate(x, *weights, self.steps, self.beta, self.threshold, self.slope, self.compiled)


def spike_rate(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, steps: int, beta: float = 0.95, threshold: float = 1.0,
    slope: float = 25.0, compiled: bool = True,
) -> Tensor:  # fmt: skip
    """x (N, inputs), w1 (hidden, inputs), w2 (units, hidden) -> (N, units). In the precision of the weights: what
    autocast would have instead flips spikes."""
    learns = torch.is_grad_enabled()  # inside a Function it never is
    with torch.autocast(x.device.type, enabled=False):
        return _SpikeRate.apply(x.to(w1.dtype), w1, b1, w2, b2, (beta, threshold, steps), slope, compiled, learns)


class _SpikeRate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, lif: Any, slope: float, compiled: bool,
        learns: bool,
    ):  # fmt: skip
        current = F.linear(x, w1, b1)
        rate, kept = x.new_empty(len(x), len(w2)), []
        for part in _chunks(x):
            second = F.linear(_fused(held_spikes, compiled)(current[part], *lif), w2, b2)
            if learns and any(ctx.needs_input_grad):
                rate[part], *gains = _fused(mean_spikes_and_gains, compiled)(second, *lif, slope)
                kept += gains
            else:
                rate[part] = _fused(mean_spikes, compiled)(second, *lif)
        ctx.save_for_backward(x, w1, w2, current, *kept)
        ctx.lif, ctx.slope, ctx.compiled = lif, slope, compiled
        return rate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, w1, w2, current, *kept = ctx.saved_tensors
        d_w2, d_b2, d_currents = torch.zeros_like(w2), w2.new_zeros(len(w2)), [current[:0]]
        for part, roots, exponent in zip(_chunks(x), kept[::2], kept[1::2], strict=True):
            d_second = _fused(mean_spikes_grad, ctx.compiled)(grad[part].contiguous(), roots, exponent)
            flat, spikes = d_second.flatten(0, 1), _fused(held_spikes, ctx.compiled)(current[part], *ctx.lif)
            d_w2.addmm_(flat.T, spikes.flatten(0, 1))
            d_b2 += flat.sum(0)
            del spikes  # before as much is needed again
            d_spikes = d_second @ w2
            del flat, d_second
            d_currents.append(_fused(held_spikes_grad, ctx.compiled)(d_spikes, current[part], *ctx.lif, ctx.slope))
            del d_spikes  # before the next chunk's lie beside it
        d_current = torch.cat(d_currents)
        del d_currents
        d_x = d_current @ w1 if ctx.needs_input_grad[0] else None
        return d_x, d_current.T @ x, d_current.sum(0), d_w2, d_b2, None, None, None, None


def held_spikes(current: Tensor, beta: float, threshold: float, steps: int) -> Tensor:
    """A current (N, units) held for all steps -> spikes (steps, N, units)."""
    v = spikes = torch.zeros_like(current)
    out = []
    for _ in range(steps):
        v = beta * v + current - spikes * threshold
        spikes = (v > threshold).to(current.dtype)
        out.append(spikes)
    return torch.stack(out)


def mean_spikes(currents: Tensor, beta: float, threshold: float, steps: int) -> Tensor:
    """Currents (steps, N, units) -> the mean of their spikes (N, units)."""
    v = spikes = total = torch.zeros_like(currents[0])
    for k in range(steps):
        v = beta * v + currents[k] - spikes * threshold
        spikes = (v > threshold).to(currents.dtype)
        total = total + spikes
    return total / steps


def mean_spikes_and_gains(
    currents: Tensor, beta: float, threshold: float, steps: int, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the gradient of that mean by each current, as `mean_spikes_grad` wants it: the root of its share of
    the power of two above each neuron's greatest, in 255ths (steps, N, units), and that power's exponent (N, units).
    Doubles' roots stay as they are."""
    wide = torch.promote_types(currents.dtype, torch.float32)
    v = spikes = total = torch.zeros_like(currents[0])
    surrogates = []
    for k in range(steps):
        v = beta * v + currents[k] - spikes * threshold
        spikes = (v > threshold).to(currents.dtype)
        total = total + spikes
        surrogates.append(_surrogate(v.to(wide), threshold, slope))
    gain = greatest = torch.zeros_like(total, dtype=wide)
    gains = []
    for surrogate in surrogates[::-1]:  # a current acts on its own step and, leaking, on those after it
        gain = gain * beta + surrogate / steps
        greatest = torch.maximum(greatest, gain)
        gains.append(gain)
    exponent = greatest.log2().ceil().clamp(min=-126)  # a neuron so far from its threshold learns nothing
    roots = (torch.stack(gains[::-1]) * (-exponent).exp2()).sqrt()
    if wide != torch.double:
        roots = (roots * 255 + 0.5).to(torch.uint8)
    return total / steps, roots, exponent.to(torch.int8)


def held_spikes_grad(grad: Tensor, current: Tensor, beta: float, threshold: float, steps: int, slope: float) -> Tensor:
    """Gradient by each spike (steps, N, units) -> by the held current (N, units)."""
    v = spikes = torch.zeros_like(current)
    membranes = []
    for _ in range(steps):
        v = beta * v + current - spikes * threshold
        spikes = (v > threshold).to(current.dtype)
        membranes.append(v)
    d_v = total = torch.zeros_like(current)
    for k in range(steps - 1, -1, -1):
        d_v = d_v * beta + grad[k] * _surrogate(membranes[k], threshold, slope)
        total = total + d_v
    return total


def mean_spikes_grad(grad: Tensor, roots: Tensor, exponent: Tensor) -> Tensor:
    """Gradient by the mean (N, units) -> by each current (steps, N, units)."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    shares = roots if roots.dtype == torch.double else roots / 255.0
    return (shares**2 * (grad * exponent.to(wide).exp2())).to(grad.dtype)


def _surrogate(v: Tensor, threshold: float, slope: float) -> Tensor:
    return (slope * (v - threshold).abs() + 1.0) ** -2


@cache
def _fused(scan: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    if not (compiled and _can_compile()):
        return scan
    whole = torch.compile(scan, dynamic=False)

    def padded(*args: Any) -> Any:
        """To a power of two, at least 32: each size is compiled anew, and torch gives up at the ninth."""
        n = args[0].shape[-2]

        def cut(each: Tensor) -> Tensor:
            return each[..., :n, :].contiguous()

        missing = (1 << max(5, (n - 1).bit_length())) - n
        if missing == 0 or torch.compiler.is_compiling():
            return whole(*args)
        out = whole(*(F.pad(arg, (0, 0, 0, missing)) if isinstance(arg, Tensor) else arg for arg in args))
        return tuple(map(cut, out)) if isinstance(out, tuple) else cut(out)

    return padded


@cache
def _can_compile() -> bool:
    """Whether there is what torch.compile needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def _chunks(x: Tensor) -> list[slice]:
    n = CHUNK.get(x.device.type, CHUNK["cpu"])
    return [slice(i, i + n) for i in range(0, len(x), n)]
