"""The fused spike encoder and the liquid cell with a backbone, beside the plain way to write them."""

import shutil
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from torch import Tensor

from training import spikes
from training.cells import BackboneCfC
from training.scans import CHUNK
from training.spikes import SpikeEncoder


class Spike(torch.autograd.Function):
    """snntorch's fast_sigmoid."""

    @staticmethod
    def forward(ctx, over: Tensor):
        ctx.save_for_backward(over)
        return (over > 0).to(over.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (over,) = ctx.saved_tensors
        return grad / (25.0 * over.abs() + 1.0) ** 2


def step_by_step(encoder: SpikeEncoder, x: Tensor) -> Tensor:
    v1 = v2 = s1 = s2 = total = torch.zeros(())
    for _ in range(encoder.steps):
        v1 = encoder.beta * v1 + encoder.fc1(x) - s1.detach()
        s1 = Spike.apply(v1 - 1.0)
        v2 = encoder.beta * v2 + encoder.fc2(s1) - s2.detach()
        s2 = Spike.apply(v2 - 1.0)
        total = total + s2
    return total / encoder.steps


@pytest.fixture
def encoder() -> SpikeEncoder:
    torch.manual_seed(0)
    return SpikeEncoder(64, 16, steps=8, compiled=False)


# What is kept for the gradient of floats is a byte each.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.double, 1e-14), (torch.float, 3e-3)])
def test_rates_are_those_of_the_loop_to_the_bit_and_gradients_to_rounding(encoder, monkeypatch, dtype, rounding):
    monkeypatch.setitem(spikes.CHUNK, "cpu", 7)  # with a last chunk that is shorter
    encoder.to(dtype)
    x = (2 * torch.randn(40, 64, dtype=dtype)).requires_grad_()
    rate, want = encoder(x), step_by_step(encoder, x)
    assert torch.equal(rate, want) and 0.01 < rate.mean() < 0.5
    weight, inputs = torch.randn_like(rate), [x, *encoder.parameters()]
    grads = torch.autograd.grad((rate * weight).sum(), inputs)
    for grad, wanted in zip(grads, torch.autograd.grad((want * weight).sum(), inputs), strict=True):
        assert (grad - wanted).norm() < rounding * wanted.norm()


def test_neurons_far_below_their_threshold_get_a_gradient_to_a_hundredth():
    torch.manual_seed(0)
    encoder = SpikeEncoder(64, 16, steps=32, compiled=False)
    with torch.no_grad():
        encoder.fc2.bias.fill_(-15.0)  # a surrogate gradient of 2e-8 at the end
    x, inputs = 2 * torch.randn(40, 64), list(encoder.parameters())
    wanted = torch.autograd.grad(step_by_step(encoder, x).sum(), inputs)
    for grad, want in zip(torch.autograd.grad(encoder(x).sum(), inputs), wanted, strict=True):
        assert (grad - want).norm() < 1e-2 * want.norm()


def test_nothing_is_kept_for_a_gradient_that_nobody_wants(encoder, monkeypatch):
    kept, scan = [], spikes.mean_spikes_and_gains
    monkeypatch.setattr(spikes, "mean_spikes_and_gains", lambda *args: kept.append(scan(*args)) or kept[-1])
    x = 2 * torch.randn(40, 64)
    with torch.no_grad():
        rate = encoder(x)
    assert not kept and torch.equal(encoder(x), rate)
    assert [(gains.dtype, gains.shape) for _, gains, _ in kept] == [(torch.uint8, (8, n, 16)) for n in (32, 8)]


@pytest.mark.parametrize("below", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float, torch.half, torch.bfloat16])
def test_what_is_kept_is_the_gradient_of_the_mean_by_each_current(encoder, dtype, below):
    currents = (2 * torch.randn(8, 40, 16) - below).to(dtype)
    rate, roots, exponent = spikes.mean_spikes_and_gains(currents, 0.95, 1.0, 8, 25.0)
    assert roots.dtype == torch.uint8 and exponent.dtype == torch.int8
    assert torch.equal(rate, spikes.mean_spikes(currents, 0.95, 1.0, 8))
    v = spiked = torch.zeros_like(currents[0])
    surrogates = []
    for current in currents:
        v = 0.95 * v + current - spiked
        spiked = (v > 1).to(dtype)
        surrogates.append(1 / (25 * (v.double() - 1).abs() + 1) ** 2 / 8)
    wanted = torch.stack([sum(s * 0.95**i for i, s in enumerate(surrogates[k:])) for k in range(8)])
    scale = exponent.double().exp2()
    assert ((wanted.amax(0) <= scale) & (scale < 2 * wanted.amax(0))).all()
    assert (roots / 255 - (wanted / scale).sqrt()).abs().max() < 0.501 / 255
    grad = (1000 * torch.randn(40, 16)).to(dtype)  # as scaled for half precision
    d_currents = spikes.mean_spikes_grad(grad, roots, exponent)
    assert d_currents.dtype == dtype and (d_currents.double() - grad * wanted).norm() < 5e-3 * (grad * wanted).norm()


def test_of_no_samples_there_are_no_rates_and_no_gradient(encoder):
    rate = encoder(torch.zeros(0, 64))
    assert rate.shape == (0, 16)
    assert not any(grad.any() for grad in torch.autograd.grad(rate.sum(), list(encoder.parameters())))


def test_under_autocast_it_computes_in_the_precision_of_its_weights(encoder):
    x, inputs = 2 * torch.randn(40, 64), list(encoder.parameters())
    wanted = torch.autograd.grad(encoder(x).sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rate = encoder(x)
    assert rate.dtype == torch.float
    assert all(map(torch.equal, torch.autograd.grad(rate.sum(), inputs), wanted))


def test_a_gradient_of_its_gradient_is_refused(encoder):
    grad = torch.autograd.grad(encoder(2 * torch.randn(40, 64)).sum(), encoder.fc2.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_compiled_scans_differ_in_at_most_one_rate_of_ten_thousand(encoder):
    if not shutil.which("g++"):
        pytest.skip("torch.compile on a CPU needs g++")
    x, inputs = 2 * torch.randn(64, 64), list(encoder.parameters())
    plain = encoder(x)
    wanted = torch.autograd.grad(plain.square().sum(), inputs)
    encoder.compiled = True
    rate = encoder(x)
    assert (rate != plain).float().mean() <= 1e-4
    for grad, want in zip(torch.autograd.grad(rate.square().sum(), inputs), wanted, strict=True):
        assert (grad - want).norm() < 1e-3 * want.norm()


def test_chunks_of_any_size_are_compiled_as_one_and_give_the_same_to_the_bit(encoder, monkeypatch):
    sizes = set()

    def compile_as_is(scan, dynamic):
        return lambda *args: sizes.add(args[0].shape[-2]) or scan(*args)

    monkeypatch.setattr(torch, "compile", compile_as_is)
    monkeypatch.setattr(spikes, "_can_compile", lambda: True)
    monkeypatch.setattr(spikes, "_fused", cache(spikes._fused.__wrapped__))
    for n in (1, 7, 32, 45):
        x = (2 * torch.randn(n, 64)).requires_grad_()
        results = []
        for encoder.compiled in (False, True):
            rate = encoder(x)
            results.append([rate, *torch.autograd.grad(rate.square().sum(), [x, *encoder.parameters()])])
        assert all(map(torch.equal, *results))
    assert sizes == {32}


def test_rates_and_gradients_are_those_of_snntorch(encoder):
    snntorch = pytest.importorskip("snntorch", reason="a peer: pip install snntorch")
    leaky = snntorch.Leaky(beta=0.95, spike_grad=snntorch.surrogate.fast_sigmoid(slope=25))
    x, inputs = 2 * torch.randn(40, 64), list(encoder.parameters())
    v1, v2, total = leaky.reset_mem(), leaky.reset_mem(), 0
    for _ in range(encoder.steps):
        s1, v1 = leaky(encoder.fc1(x), v1)
        s2, v2 = leaky(encoder.fc2(s1), v2)
        total = total + s2
    rate, want = encoder(x), total / encoder.steps
    assert torch.equal(rate, want)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    for grad, want in zip(torch.autograd.grad(rate.square().sum(), inputs), wanted, strict=True):
        assert (grad - want).norm() < 3e-3 * want.norm()


def test_a_current_below_the_threshold_never_fires_and_one_far_above_fires_at_each_step(encoder):
    with torch.no_grad():
        for layer in (encoder.fc1, encoder.fc2):
            layer.weight.zero_()
        encoder.fc2.bias.copy_(torch.linspace(0, 2, 16))  # v reaches I (1 - 0.95^8) / 0.05 = 6.7 I without firing
    rate = encoder(torch.zeros(1, 64))[0]
    assert rate[0] == 0 and rate[-1] == 1
    assert torch.equal(rate, rate.sort().values)


@pytest.mark.parametrize("dt_s", [None, 0.02, 0.3])
def test_a_liquid_cell_with_a_backbone_is_its_equation(dt_s):
    torch.manual_seed(0)
    cell, x, h = BackboneCfC(5, 4, 6, period_s=0.1), torch.randn(2, 3, 5), torch.randn(2, 4)
    dt = None if dt_s is None else torch.full((2, 3, 1), dt_s)
    out, last = cell.scan(x, h, dt)
    for t in range(3):
        z = 1.7159 * torch.tanh(0.666 * (x[:, t] @ cell.w_in.T + h @ cell.w_rec.T + cell.b_in))
        f, g, a, b = (z @ cell.w_gates.T + cell.b_gates).chunk(4, -1)
        s = torch.sigmoid(a * (1.0 if dt_s is None else dt_s / 0.1) + b)
        h = torch.tanh(f) * (1 - s) + torch.tanh(g) * s
        torch.testing.assert_close(out[:, t], h)
    assert torch.equal(last, out[:, -1])


@pytest.mark.parametrize("dt", [None, torch.full((2, 5, 1), 0.03)])
def test_autocast_does_not_touch_a_liquid_cell_with_a_backbone(dt):
    torch.manual_seed(0)
    cell, x, h = BackboneCfC(5, 4, 6, period_s=0.1), torch.randn(2, 5, 5), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = cell.scan(x, h, dt)[0]
    want = cell.scan(x, h, dt)[0]
    assert torch.equal(got, want)
    weights = tuple(cell.parameters())
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), weights) for out in (got, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dt_s", [None, 0.03])
def test_the_gradient_of_a_liquid_cell_with_a_backbone_is_that_of_numbers_near_by(dt_s):
    torch.manual_seed(0)
    cell = BackboneCfC(5, 4, 6, period_s=0.1).double()
    steps = 2 * CHUNK + 1  # the last chunk is not full
    x, h = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((2, steps, 5), (2, 4)))
    dt = None if dt_s is None else torch.full((2, steps, 1), dt_s).double()
    assert torch.autograd.gradcheck(lambda x, h, *weights: cell.scan(x, h, dt)[0], (x, h, *cell.parameters()))
