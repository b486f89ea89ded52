"""Liquid and spiking cells against their equations."""

import math

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from training.cells import CELLS, GRU, LIF, LTC, CfCParameters, LIFParameters, cfc_step, lif_step, spike


def column(*values: float) -> "torch.Tensor":
    return torch.tensor(values)[:, None]


def test_lif_by_hand():
    p = LIFParameters(tau=torch.tensor([0.1]))
    spikes, v = lif_step(column(2.0), column(0.0), column(0.05), p)
    charged = 2.0 * (1 - math.exp(-0.5))
    assert (spikes.item(), v.item()) == (0.0, pytest.approx(charged))
    spikes, v = lif_step(column(2.0), v, column(0.05), p)
    charged = charged * math.exp(-0.5) + 2.0 * (1 - math.exp(-0.5))
    assert (spikes.item(), v.item()) == (1.0, pytest.approx(charged - 1.0))  # soft reset


def test_lif_of_a_constant_current_does_not_depend_on_how_time_is_cut():
    p = LIFParameters(tau=torch.tensor([0.1]))
    _, once = lif_step(column(0.9), column(0.2), column(0.08), p)
    _, half = lif_step(column(0.9), column(0.2), column(0.03), p)
    _, twice = lif_step(column(0.9), half, column(0.05), p)
    torch.testing.assert_close(once, twice)


def test_a_spikes_gradient_is_a_bump_around_the_threshold():
    x = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    spike(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([1 / (1 + (1.5 * math.pi) ** 2), 1.0, 1 / (1 + (1.5 * math.pi) ** 2)])
    assert spike(torch.tensor([-0.1, 0.0])).tolist() == [0.0, 1.0]


def test_cfc_by_hand():
    p = CfCParameters(w_in=torch.zeros(4, 1), w_rec=torch.zeros(4, 1), bias=torch.zeros(4), period_s=0.1)
    gates = torch.tensor([[0.5, -1.0, 2.0, 0.3]])
    h = cfc_step(gates, column(0.0), column(0.05), p)
    s = 1 / (1 + math.exp(-(2.0 * 0.5 + 0.3)))
    assert h.item() == pytest.approx(math.tanh(0.5) * (1 - s) + math.tanh(-1.0) * s)


def test_ltc_by_hand():
    """tau dh/dt = -(1 + tau f) h + tau f A, by the paper's implicit step, a quarter of the time at once."""
    cell = LTC(inputs=1, units=1, period_s=0.1)
    with torch.no_grad():
        for weight, value in (
            (cell.w_in, 0.5), (cell.w_rec, -1.0), (cell.bias, 0.2), (cell.log_tau, math.log(2.0)), (cell.reversal, 0.8),
        ):  # fmt: skip
            weight.fill_(value)
        h = cell.step(column(3.0), column(0.4), column(0.05)).item()
    want, dt = 0.4, 0.05 / 0.1 / 4
    for _ in range(4):
        f = math.log(1 + math.exp(0.5 * 3.0 - 1.0 * want + 0.2))
        want = (want + dt * f * 0.8) / (1 + dt * (1 / 2.0 + f))
    assert h == pytest.approx(want)


def test_gru_is_torchs():
    torch.manual_seed(0)
    cell, x, h = GRU(3, 5, 0.1), torch.randn(2, 3), torch.randn(2, 5)
    torch.testing.assert_close(cell.step(x, h, torch.rand(2, 1)), cell.cell(x, h))


@pytest.mark.parametrize("batch", [1, 3, 4])  # 4 = units: where a dt of the wrong shape would go unnoticed
@pytest.mark.parametrize("kind", ["cfc", "ltc", "gru_dt"])
def test_every_member_of_a_batch_has_its_own_dt(kind, batch):
    torch.manual_seed(0)
    cell = CELLS[kind](inputs=2, units=4, period_s=0.1)
    x, h, dt = torch.randn(batch, 2), torch.randn(batch, 4), torch.rand(batch, 1)
    together = cell.step(x, h, dt)
    alone = torch.cat([cell.step(x[i : i + 1], h[i : i + 1], dt[i : i + 1]) for i in range(batch)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("kind", "matters"), [(k, k in ("lif", "cfc", "ltc", "gru_dt")) for k in ("lif", *CELLS)])
def test_time_matters_to_liquid_cells_and_to_those_that_are_told(kind, matters):
    if kind == "ncps":
        pytest.importorskip("ncps", reason="a peer to compare with: pip install ncps")
        matters = True
    torch.manual_seed(0)
    x = torch.randn(1, 4)
    cell = LIF(4, tau_s=0.05) if kind == "lif" else CELLS[kind](4, 4, 0.1)
    short, long = (cell.step(x, torch.full((1, 4), 0.3), column(dt))[-1] for dt in (0.02, 0.2))
    assert torch.allclose(short, long) != matters


@pytest.mark.parametrize("kind", ["lif", *(kind for kind in CELLS if kind != "ncps")])
def test_a_scan_is_the_steps_one_after_another_with_padding_and_resets(kind):
    torch.manual_seed(0)
    x, dt = torch.randn(2, 5, 4), torch.rand(2, 5, 1)
    keep, reset = torch.ones(2, 5, 1, dtype=torch.bool), torch.zeros(2, 5, 1, dtype=torch.bool)
    keep[1, 3:], reset[0, 2] = False, True
    cell = LIF(4, tau_s=0.05) if kind == "lif" else CELLS[kind](4, 4, 0.1)
    with torch.no_grad():
        out, last = cell.scan(x, torch.zeros(2, 4), dt, keep, reset)
        for b, steps in ((0, 5), (1, 3)):
            state = torch.zeros(1, 4)
            for t in range(steps):
                state = torch.zeros(1, 4) if reset[b, t] else state
                result = cell.step(x[b : b + 1, t], state, dt[b : b + 1, t])
                y, state = result if isinstance(result, tuple) else (result, result)
                torch.testing.assert_close(out[b : b + 1, t], y)
            torch.testing.assert_close(last[b : b + 1], state)


@pytest.mark.parametrize("kind", ["lif", "plain lif", "cfc"])
def test_the_gradient_of_a_scan_is_that_of_its_steps(kind):
    torch.manual_seed(0)
    cell = (CELLS["cfc"](4, 4, 0.1) if kind == "cfc" else LIF(4, tau_s=0.05, plain=kind == "plain lif")).double()
    x, state = (2 * torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((3, 7, 4), (3, 4)))
    dt, keep, reset = torch.rand(3, 7, 1).double() / 5, torch.rand(3, 7, 1) < 0.7, torch.rand(3, 7, 1) < 0.3
    steps, v = [], state
    for t in range(7):
        result = cell.step(x[:, t], torch.where(reset[:, t], 0.0, v), dt[:, t])
        y, after = result if isinstance(result, tuple) else (None, result)
        v = torch.where(keep[:, t], after, v)
        steps.append(v if y is None else y)
    stepped, scanned = (torch.stack(steps, 1), v), cell.scan(x, state, dt, keep, reset)
    weights = torch.randn(3, 7, 4).double(), torch.randn(3, 4).double()
    inputs = x, state, *cell.parameters()
    wanted, got = (torch.autograd.grad(each, inputs, weights) for each in (stepped, scanned))
    for grad, want in zip((*scanned, *got), (*stepped, *wanted), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)
