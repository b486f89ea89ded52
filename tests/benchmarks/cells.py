"""Training speed of the spike encoder and the liquid cell, beside ncps and snntorch as their users write them.

    python -m tests.benchmarks.cells [--device cpu|cuda] [--json]       # needs: pip install ncps snntorch

One modality of the reference size: 512 features -> two LIF layers over 32 micro-steps, the rate of 128 neurons -> a CfC
of 256 units with a backbone of 128 -> a layer. 32 time steps; forward and backward. Peers: `loop`, sample by sample as
the usual guide does; `batched`, with all time steps through the spike encoder at once. All take turns, round by round;
ratios are medians over the rounds (and their quartiles), of CPU time on one thread, or of time on the GPU. That they
are the same model is checked first: at most 1e-4 of the rates may differ (by one spike, where the order of a sum
decides). Compiling is not in the ratios: `compile_s` is what the first step takes, with nothing cached on disk (batch
64 finds what batch 16 compiled). `memory_vs_batched`: what PyTorch's allocator holds at most during a step beyond what
it held before, ours over the batched peer's; `cells_memory_vs_batched` of the spike encoder and the cell, without the
layer behind them, which is PyTorch's in both and holds much the same; `encoder_memory_vs_batched` of the spike encoder
alone. `...resident_vs_batched`: the same of a process's resident memory, which is what a step really takes: holes are
in it that no tensor fits in. Each is measured in a process of its own (Linux and glibc); how a heap gets its holes is
chance, so these vary. On a GPU ours is a CUDA graph, the peers are not; `ms` tells ours without one, too.

`as_shipped` is not the same maths: one LIF step a sample and a CfC without backbone, in real time, as the drive model
has them, beside snntorch and ncps stepped over time in the same sizes.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.cells import LIF, BackboneCfC, CfC
from training.spikes import SpikeEncoder

FEATURES, UNITS, LIQUID, BACKBONE, STEPS, TIME, OUT = 512, 128, 256, 128, 32, 32, 512


class Peer(nn.Module):
    """ncps and snntorch."""

    def __init__(self, batched: bool):
        super().__init__()
        import snntorch
        from ncps.torch import CfC
        from snntorch import surrogate

        self.fc1, self.fc2 = nn.Linear(FEATURES, 2 * UNITS), nn.Linear(2 * UNITS, UNITS)
        gradient = surrogate.fast_sigmoid(slope=25)
        self.lif1, self.lif2 = (snntorch.Leaky(beta=0.95, spike_grad=gradient) for _ in range(2))
        self.cfc = CfC(UNITS, LIQUID)
        self.out = nn.Sequential(nn.Linear(LIQUID + UNITS, OUT), nn.LayerNorm(OUT), nn.GELU())
        self.batched = batched

    def rate(self, x: Tensor) -> Tensor:
        v1, v2, spikes = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for _ in range(STEPS):
            s1, v1 = self.lif1(self.fc1(x), v1)
            s2, v2 = self.lif2(self.fc2(s1), v2)
            spikes.append(s2)
        return torch.stack(spikes, 1).mean(1)

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.rate(x.flatten(0, 1)).view(*x.shape[:2], -1)
        return self.cfc(rate)[0], rate

    def forward(self, x: Tensor) -> Tensor:
        if self.batched:
            return self.out(torch.cat(self.cells(x), -1))
        h, outs = None, []
        for t in range(x.shape[1]):
            rate = self.rate(x[:, t])
            y, h = self.cfc(rate[:, None], h)
            outs.append(self.out(torch.cat([y[:, 0], rate], -1)))
        return torch.stack(outs, 1)


class Ours(nn.Module):
    def __init__(self, peer: Peer):
        super().__init__()
        self.spikes = SpikeEncoder(FEATURES, UNITS, STEPS)
        self.spikes.fc1, self.spikes.fc2 = copy.deepcopy(peer.fc1), copy.deepcopy(peer.fc2)
        self.cfc, self.out = cfc_of(peer.cfc), copy.deepcopy(peer.out)

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.spikes(x.flatten(0, 1)).view(*x.shape[:2], -1)
        return self.cfc.scan(rate, rate.new_zeros(len(x), LIQUID), None)[0], rate

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat(self.cells(x), -1))


def cfc_of(peer: Any) -> BackboneCfC:
    """Ours with the weights of an ncps CfC."""
    cell, trunk = peer.rnn_cell, peer.rnn_cell.backbone[0]
    ours = BackboneCfC(peer.input_size, cell.hidden_size, trunk.out_features, 1.0)
    gates = (cell.ff1, cell.ff2, cell.time_a, cell.time_b)
    with torch.no_grad():
        ours.w_in.copy_(trunk.weight[:, : peer.input_size])
        ours.w_rec.copy_(trunk.weight[:, peer.input_size :])
        ours.b_in.copy_(trunk.bias)
        ours.w_gates.copy_(torch.cat([g.weight for g in gates]))
        ours.b_gates.copy_(torch.cat([g.bias for g in gates]))
    return ours


class ShippedPeer(nn.Module):
    """One step of snntorch's LIF and one of ncps's CfC for each sample; what can be done for all at once, is."""

    def __init__(self):
        super().__init__()
        import snntorch
        from ncps.torch import CfC
        from snntorch import surrogate

        self.fc, self.cfc = nn.Linear(FEATURES, UNITS), CfC(UNITS, LIQUID)
        self.lif = snntorch.Leaky(beta=0.95, spike_grad=surrogate.fast_sigmoid(slope=25))

    def forward(self, x: Tensor) -> Tensor:
        v, spikes, current = self.lif.reset_mem(), [], self.fc(x)
        for t in range(x.shape[1]):
            s, v = self.lif(current[:, t], v)
            spikes.append(s)
        return self.cfc(torch.stack(spikes, 1))[0]


class Shipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif, self.cfc = nn.Linear(FEATURES, UNITS), LIF(UNITS, 0.1), CfC(UNITS, LIQUID, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        dt = x.new_full((*x.shape[:2], 1), 0.02)
        keep, reset = torch.ones_like(dt, dtype=torch.bool), torch.zeros_like(dt, dtype=torch.bool)
        spikes, _ = self.lif.scan(self.fc(x), x.new_zeros(len(x), UNITS), dt, keep, reset)
        return self.cfc.scan(spikes, x.new_zeros(len(x), LIQUID), dt, keep, reset)[0]


def step(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(model(x).square().sum(), parameters)


def interleaved_ms(forms: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(3):
        for form in forms.values():
            form()
    for _ in tqdm(range(rounds), unit=" rounds", leave=False):
        for name, form in forms.items():
            times[name].append(_ms(form, device))
    return times


def _ms(form: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start_s = time.process_time()
        form()
        return (time.process_time() - start_s) * 1e3
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    form()
    torch.cuda.synchronize()
    return (time.perf_counter() - start_s) * 1e3


def ratios(times: dict[str, list[float]], name: str, ours: str = "ours") -> list[float]:
    """First quartile, median, third quartile."""
    return [round(q, 2) for q in statistics.quantiles((p / o for p, o in zip(times[name], times[ours])), n=4)]


def peak_mib(form: Callable[[], Any], device: str) -> float:
    """The most that PyTorch's allocator holds during a call beyond what it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    for _ in range(2):  # what a peer keeps of its last step, and frees in this one, is known from the second on
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            form()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return (max(e["args"]["Total Allocated"] for e in memory) - before) / 2**20


def models(batch: int, device: str) -> tuple[Peer, Any, Tensor]:
    """The batched peer and ours, and what they are to learn by."""
    torch.manual_seed(0)
    batched = Peer(batched=True).to(device)
    return batched, Ours(batched).to(device), torch.randn(batch, TIME, FEATURES, device=device) * 2


def learning(batched: Peer, ours: Any, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Of each of which memory is measured, a step."""
    flat, layers = x.flatten(0, 1), [*batched.fc1.parameters(), *batched.fc2.parameters()]
    spikes = list(ours.spikes.parameters())
    return {
        "batched": step(batched, list(batched.parameters()), x),
        "ours": step(ours, list(ours.parameters()), x),
        "cells_batched": step(lambda x: batched.cells(x)[0], [*layers, *batched.cfc.parameters()], x),
        "cells": step(lambda x: ours.cells(x)[0], [*spikes, *ours.cfc.parameters()], x),
        "encoder_batched": step(batched.rate, layers, flat),
        "encoder": step(ours.spikes, spikes, flat),
    }


def resident_mib(name: str, batch: int) -> float:
    """The most of a process's memory that is resident during a step beyond what was before; in one that did little
    else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_mib, name, batch).result()


def _resident_mib(name: str, batch: int) -> float:
    torch.set_num_threads(1)
    batched, ours, x = models(batch, "cpu")
    learning(batched, ours, x[:1])[name]()  # loads and compiles
    form = learning(batched, ours, x)[name]

    def status_mib(key: str) -> float:
        return int(re.findall(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what is free and still resident would be used first, and not be seen
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    form()
    return status_mib("VmHWM") - before


def measure(batch: int, rounds: int, device: str) -> dict[str, Any]:
    batched, ours, x = models(batch, device)
    loop = copy.deepcopy(batched)
    loop.batched = False
    parameters = list(ours.parameters())
    start_s = time.perf_counter()
    step(ours, parameters, x)()
    compile_s = time.perf_counter() - start_s
    with torch.no_grad():
        flat = x.flatten(0, 1)
        differ = (ours.spikes(flat) != batched.rate(flat)).float().mean().item()
        assert differ <= 1e-4, f"not the same model: {differ} of the rates differ"
        error = (ours(x) - batched(x)).abs().median().item()
        assert error < 1e-5, f"not the same model: outputs differ by {error}"
    forms = {
        "loop": step(loop, list(loop.parameters()), x),
        "batched": step(batched, list(batched.parameters()), x),
        "ours": step(ours, parameters, x),
    }
    if device == "cuda":
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(ours), (x,))  # it changes the module it is given
        forms["graph"] = step(graphed, list(graphed.parameters()), x)
    times = interleaved_ms(forms, rounds, device)
    best = "graph" if "graph" in times else "ours"
    vs_loop, vs_batched = ratios(times, "loop", best), ratios(times, "batched", best)
    learn = learning(batched, ours, x)
    for form in learn.values():
        form()
    memory_mib = {name: round(peak_mib(form, device), 2) for name, form in learn.items()}
    result = {
        "vs_loop": vs_loop[1],
        "vs_batched": vs_batched[1],
        "quartiles": {"vs_loop": vs_loop[::2], "vs_batched": vs_batched[::2]},
        **beside(memory_mib, "memory_vs_batched"),
        "memory_mib": memory_mib,
        "compile_s": round(compile_s, 1),
        "ms": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "rates_that_differ": differ,
    }
    if device == "cpu":
        resident = {name: round(resident_mib(name, batch), 1) for name in learn}
        result |= beside(resident, "resident_vs_batched") | {"resident_mib": resident}
    return result


def beside(mib: dict[str, float], name: str) -> dict[str, float]:
    """What ours take over what the batched peer's do."""
    pairs = {"": "ours", "cells_": "cells", "encoder_": "encoder"}
    return {of + name: round(mib[ours] / mib[f"{of}batched"], 3) for of, ours in pairs.items()}


def cfc_alone(rounds: int, device: str) -> float:
    from ncps.torch import CfC

    torch.manual_seed(0)
    peer = CfC(UNITS, LIQUID).to(device)
    ours, x = cfc_of(peer).to(device), torch.randn(16, TIME, UNITS, device=device)
    h = x.new_zeros(16, LIQUID)
    forms = {
        "ncps": step(lambda x: peer(x)[0], list(peer.parameters()), x),
        "ours": step(lambda x: ours.scan(x, h, None)[0], list(ours.parameters()), x),
    }
    return ratios(interleaved_ms(forms, rounds, device), "ncps")[1]


def as_shipped(rounds: int, device: str) -> float:
    torch.manual_seed(0)
    peer, ours = ShippedPeer().to(device), Shipped().to(device)
    x = torch.randn(16, TIME, FEATURES, device=device) * 2
    forms = {name: step(model, list(model.parameters()), x) for name, model in (("peer", peer), ("ours", ours))}
    return ratios(interleaved_ms(forms, rounds, device), "peer")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        result: dict[str, Any] = {f"b{batch}": measure(batch, args.rounds, args.device) for batch in (16, 64)}
    result["cfc_vs_ncps"] = cfc_alone(3 * args.rounds, args.device)
    result["as_shipped"] = as_shipped(3 * args.rounds, args.device)
    result["device"] = args.device
    if args.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    print(json.dumps(result) if args.json else "\n".join(f"{name:<14}{value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
