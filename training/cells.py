"""Liquid and spiking cells: pure steps in real time.

Both take `dt`, the seconds since their last step, shaped (B, 1): a stream's cell sees how irregular its samples are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_edge.errors import needs
from training.scans import BackboneCfCScan, CfCScan, LIFScan

MAX_PERIODS = 4.0  # dt / nominal period is clamped here: beyond it the state has been reset or has nothing left to say


class LIFParameters(NamedTuple):
    tau: Tensor  # (units,) seconds
    threshold: float = 1.0
    plain: bool = False


class CfCParameters(NamedTuple):
    w_in: Tensor  # (4 * units, inputs): rows f, g, time_a, time_b
    w_rec: Tensor  # (4 * units, units)
    bias: Tensor  # (4 * units,)
    period_s: float  # the nominal dt


def lif_step(current: Tensor, v: Tensor, dt: Tensor, p: LIFParameters) -> tuple[Tensor, Tensor]:
    """One step of a leaky integrate-and-fire layer.

        a = exp(-dt / tau);  v = a v + (1 - a) I;  spike = v >= threshold;  v = v - threshold * spike

    the exact solution of tau dv/dt = I - v over dt for a current held constant, with soft reset. `plain`: v = a v + I,
    as others have it (snntorch calls a beta).

    Args:
        current: (B, units), in units of the threshold. v: (B, units). dt: (B, 1) seconds.
    Returns: spikes (B, units) of 0 and 1, and v after reset.
    """
    a = torch.exp(-dt / p.tau)
    v = a * v + (current if p.plain else (1 - a) * current)
    spikes = spike(v - p.threshold)
    return spikes, v - p.threshold * spikes.detach()


def cfc_step(x_gates: Tensor, h: Tensor, dt: Tensor, p: CfCParameters) -> Tensor:
    """One step of a closed-form continuous-time cell (Hasani et al., Nature Machine Intelligence 2022, eq. 10).

        s = sigmoid(time_a * dt/period + time_b);  h = tanh(f) (1 - s) + tanh(g) s

    where f, g, time_a, time_b are linear in the input and h, made in one product.

    Args:
        x_gates: (B, 4 units), the input's share of the gates: x @ w_in.T + bias. h: (B, units). dt: (B, 1) seconds.
    """
    f, g, time_a, time_b = (x_gates + h @ p.w_rec.T).chunk(4, dim=-1)
    s = torch.sigmoid(time_a * (dt / p.period_s).clamp(0.0, MAX_PERIODS) + time_b)
    return torch.tanh(f) * (1 - s) + torch.tanh(g) * s


def spike(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0; the gradient is that of atan(pi x / 2) / pi (Fang et al. 2021)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Spike.apply(x)
    return (x >= 0).to(x.dtype)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + (math.pi / 2 * x) ** 2)


class LIF(nn.Module):
    """A layer of spiking neurons with a learned time constant each; `plain`: see `lif_step`."""

    def __init__(self, units: int, tau_s: float, plain: bool = False):
        super().__init__()
        self.units, self.plain = units, plain
        self.log_tau = nn.Parameter(torch.full((units,), math.log(tau_s)))

    def parameters_now(self) -> LIFParameters:
        return LIFParameters(self.log_tau.exp(), plain=self.plain)

    def step(self, current: Tensor, v: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        return lif_step(current, v, dt, self.parameters_now())

    def scan(self, current: Tensor, v: Tensor, dt: Tensor, keep: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """Over time. current (B, T, units), dt (B, T, 1); where `keep` (B, T, 1) is 0 nothing happens (padding), where
        `reset` (B, T, 1) is 1 the step starts from rest. Returns spikes (B, T, units) and the last v."""
        p = self.parameters_now()
        current, dt, keep, reset = (x.transpose(0, 1).contiguous() for x in (current, dt, keep, reset))
        spikes, v = LIFScan.apply(current, v, torch.exp(-dt / p.tau), keep, reset, p.threshold, p.plain)
        return spikes.transpose(0, 1), v


class Cell(nn.Module):
    """A recurrent cell of a stream whose samples come every `period_s`, nominally."""

    def __init__(self, units: int, period_s: float):
        super().__init__()
        self.units, self.period_s = units, period_s

    def driven(self, x: Tensor, dt: Tensor) -> Tensor:
        """What the input alone contributes; x (..., inputs), dt (..., 1) seconds: of one step, or of a whole sequence
        in one product."""
        raise NotImplementedError

    def advance(self, driven: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        """One step: driven (B, n), h (B, units), dt (B, 1) seconds -> h."""
        raise NotImplementedError

    def step(self, x: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        return self.advance(self.driven(x, dt), h, dt)

    def scan(self, x: Tensor, h: Tensor, dt: Tensor, keep: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """Over time, as `LIF.scan`."""
        driven, out = self.driven(x, dt), []
        for t in range(x.shape[1]):
            after = self.advance(driven[:, t], torch.where(reset[:, t], 0.0, h), dt[:, t])
            h = torch.where(keep[:, t], after, h)
            out.append(h)
        return torch.stack(out, 1), h


class CfC(Cell):
    """A closed-form continuous-time cell, see `cfc_step`."""

    def __init__(self, inputs: int, units: int, period_s: float):
        super().__init__(units, period_s)
        self.w_in = nn.Parameter(torch.empty(4 * units, inputs))
        self.w_rec = nn.Parameter(torch.empty(4 * units, units))
        self.bias = nn.Parameter(torch.zeros(4 * units))
        nn.init.xavier_uniform_(self.w_in)
        nn.init.orthogonal_(self.w_rec, 0.7)

    def driven(self, x: Tensor, dt: Tensor) -> Tensor:
        return F.linear(x, self.w_in, self.bias)

    def advance(self, driven: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        return cfc_step(driven, h, dt, CfCParameters(self.w_in, self.w_rec, self.bias, self.period_s))

    def scan(self, x: Tensor, h: Tensor, dt: Tensor, keep: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, keep, reset = (each.transpose(0, 1).contiguous() for each in (x, dt, keep, reset))
        periods = (dt / self.period_s).clamp(0.0, MAX_PERIODS)
        out = CfCScan.apply(self.driven(x, dt), h, self.w_rec, periods, keep, reset)
        return out.transpose(0, 1), out[-1]


class LTC(Cell):
    """A liquid time-constant cell (Hasani et al., AAAI 2021): tau dh/dt = -(1 + tau f) h + tau f A, where the gate
    f = softplus(w_in x + w_rec h + bias) makes the time constant depend on the input. Solved by that paper's fused
    step, which is stable for any dt:

        h = (h + dt f A) / (1 + dt (1 / tau + f)),   SOLVER_STEPS times over dt / SOLVER_STEPS.

    tau and dt in nominal periods.
    """

    SOLVER_STEPS = 4

    def __init__(self, inputs: int, units: int, period_s: float):
        super().__init__(units, period_s)
        self.w_in, self.w_rec = nn.Parameter(torch.empty(units, inputs)), nn.Parameter(torch.empty(units, units))
        self.bias, self.log_tau = nn.Parameter(torch.zeros(units)), nn.Parameter(torch.zeros(units))
        self.reversal = nn.Parameter(torch.empty(units).uniform_(-1, 1))
        nn.init.xavier_uniform_(self.w_in)
        nn.init.orthogonal_(self.w_rec, 0.7)

    def driven(self, x: Tensor, dt: Tensor) -> Tensor:
        return F.linear(x, self.w_in, self.bias)

    def advance(self, driven: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        dt, rate = (dt / self.period_s).clamp(0.0, MAX_PERIODS) / self.SOLVER_STEPS, torch.exp(-self.log_tau)
        for _ in range(self.SOLVER_STEPS):
            f = F.softplus(driven + h @ self.w_rec.T)
            h = (h + dt * f * self.reversal) / (1 + dt * (rate + f))
        return h


class GRU(Cell):
    """A gated recurrent unit (Cho et al. 2014; as torch's `GRUCell`). It knows no time."""

    def __init__(self, inputs: int, units: int, period_s: float):
        super().__init__(units, period_s)
        self.cell = nn.GRUCell(inputs, units)

    def driven(self, x: Tensor, dt: Tensor) -> Tensor:
        return F.linear(x, self.cell.weight_ih, self.cell.bias_ih)

    def advance(self, driven: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        reset, update, new = driven.chunk(3, -1)
        by_reset, by_update, by_new = F.linear(h, self.cell.weight_hh, self.cell.bias_hh).chunk(3, -1)
        update = torch.sigmoid(update + by_update)
        return torch.lerp(torch.tanh(new + torch.sigmoid(reset + by_reset) * by_new), h, update)


class TimedGRU(GRU):
    """A GRU that is told dt, in nominal periods, as one more input."""

    def __init__(self, inputs: int, units: int, period_s: float):
        super().__init__(inputs + 1, units, period_s)

    def driven(self, x: Tensor, dt: Tensor) -> Tensor:
        return super().driven(torch.cat([x, (dt / self.period_s).clamp(0.0, MAX_PERIODS)], -1), dt)


class NcpsCfC(Cell):
    """ncps's closed-form cell as it comes, with its hidden layer of 128. Raises MissingDependency."""

    def __init__(self, inputs: int, units: int, period_s: float):
        super().__init__(units, period_s)
        with needs("the backbone ncps", "ncps", "compare"):
            from ncps.torch import CfCCell
        self.cell = CfCCell(inputs, units)

    def driven(self, x: Tensor, dt: Tensor) -> Tensor:
        return x

    def advance(self, driven: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        return self.cell(driven, h, (dt / self.period_s).clamp(0.0, MAX_PERIODS))[0]


class Memoryless(Cell):
    """A layer, relu(w x + bias): of all that came before it knows nothing."""

    def __init__(self, inputs: int, units: int, period_s: float):
        super().__init__(units, period_s)
        self.layer = nn.Linear(inputs, units)

    def driven(self, x: Tensor, dt: Tensor) -> Tensor:
        return F.relu(self.layer(x))

    def advance(self, driven: Tensor, h: Tensor, dt: Tensor) -> Tensor:
        return driven


# By what a config calls them. Liquid are the first two; the others are what they are to be compared with.
CELLS: dict[str, type[Cell]] = {
    "cfc": CfC, "ltc": LTC, "gru": GRU, "gru_dt": TimedGRU, "ncps": NcpsCfC, "none": Memoryless
}  # fmt: skip


class BackboneCfC(nn.Module):
    """A closed-form continuous-time cell behind a hidden layer, as ncps's `CfC` has it by default:

        z = 1.7159 tanh(0.666 (w_in x + w_rec h + b_in)),   gates = w_gates z + b_gates,   then as `cfc_step`.

    The input's share of the hidden layer is made for all time steps at once, the gates in one product.
    """

    def __init__(self, inputs: int, units: int, backbone_units: int, period_s: float):
        super().__init__()
        self.units, self.period_s = units, period_s
        self.w_in = nn.Parameter(torch.empty(backbone_units, inputs))
        self.w_rec = nn.Parameter(torch.empty(backbone_units, units))
        self.b_in = nn.Parameter(torch.zeros(backbone_units))
        self.w_gates = nn.Parameter(torch.empty(4 * units, backbone_units))  # f, g, time_a, time_b
        self.b_gates = nn.Parameter(torch.zeros(4 * units))
        for w in (self.w_in, self.w_rec, self.w_gates):
            nn.init.xavier_uniform_(w)

    def scan(self, x: Tensor, h: Tensor, dt: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, inputs), h (B, units), dt (B, T, 1) seconds, None for the nominal -> (B, T, units) and the last. In
        the precision of the weights, whatever autocast would have."""
        n, w_gates, b_gates, precision = self.units, self.w_gates, self.b_gates, self.w_in.dtype
        with torch.autocast(x.device.type, enabled=False):
            if dt is None:  # time_a + time_b as one gate
                w_gates, b_gates = (torch.cat([w[: 2 * n], w[2 * n : 3 * n] + w[3 * n :]]) for w in (w_gates, b_gates))
            else:
                dt = (dt / self.period_s).clamp(0.0, MAX_PERIODS).transpose(0, 1).to(precision)
            driven = F.linear(x.transpose(0, 1).to(precision), self.w_in, self.b_in)
            out = BackboneCfCScan.apply(driven, h.to(precision), self.w_rec, w_gates, b_gates, dt)
        return out.transpose(0, 1), out[-1]
