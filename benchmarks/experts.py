"""Generating experts of the paper's size: rate against a matrix product, peak memory against weights and results.

d 4096, r 512, h as wide as d (the paper's form on Llama-2-7B): 1.08 billion parameters, 8.4 million numbers per expert,
64 passages per batch in bfloat16, on a GPU if there is one. Needs about 5 GB. This module also runs as a subprocess, so
that nothing else counts in the peak. On a CPU the peak is the growth of resident memory from before the weights; on a
GPU it is torch's peak. Experts are written to memory of the expert store: the first 64 to new memory, which counts in
the peak, later ones to the same place.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.child import run_child
from benchmarks.options import Options
from benchmarks.rates import product, product_flops, reading, seconds
from benchmarks.row import Row
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.unit_pool import UnitPool

TOKENS = 128  # per passage of a hundred words
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    width: int
    rank: int
    passages: int
    product: int  # side of the square product
    rounds: int


FULL = Sizes(4096, 512, 64, 4096, 9)
QUICK = Sizes(1024, 128, 64, 2048, 3)


def random_hypernetwork(config: HypernetworkConfig, device: str) -> Hypernetwork:
    """A hypernetwork with random weights, allocated directly in `DTYPE`."""
    with torch.device("meta"):
        network = Hypernetwork(config)
    network = network.to(DTYPE).to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for tensor in network.state_dict().values():
        # One row, repeated: the values do not matter, and a billion random numbers take long.
        tensor.copy_(torch.empty(tensor.shape[-1], device=device).uniform_(-0.05, 0.05))
    return network


def numbers_of(network: Hypernetwork) -> int:
    """Number of parameters and buffers, including the base."""
    return sum(tensor.numel() for tensor in network.state_dict().values())


def generation_flops(network: Hypernetwork, passages: int) -> int:
    """FLOPs of the paper's form: two per weight of its linear layers and passage."""
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    return 2 * passages * sum(layer.weight.numel() for layer in layers)


def resident_bytes(field: str) -> int:
    """Resident memory of this process: ``VmRSS`` is the current value, ``VmHWM`` the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure_here(sizes: Sizes) -> dict[str, float]:
    """Measure in this process, whose first large allocation must be the weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = HypernetworkConfig.preset("paper", hidden_size=sizes.width, layer=0, rank=sizes.rank)
    mask = torch.ones(sizes.passages, TOKENS, dtype=torch.bool, device=device)
    small = HypernetworkConfig.preset("paper", hidden_size=64, layer=0, rank=8)
    with torch.inference_mode():
        # Warm-up: what libraries allocate at first use must not count.
        random_hypernetwork(small, device)(torch.zeros(sizes.passages, TOKENS, 64, dtype=DTYPE, device=device), mask)
        gc.collect()
        before = 0 if device == "cuda" else resident_bytes("VmRSS")
        network = random_hypernetwork(config, device)
        states = torch.rand(sizes.passages, TOKENS, sizes.width, device=device).to(DTYPE)

        pool = UnitPool(sizes.passages, network.none().weights, torch.device(device))

        def generate(count: int = sizes.passages) -> None:
            network.write(states[:count], mask[:count], pool.weights, torch.arange(count, device=device))

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        pool.reserve(sizes.passages)
        generate()
        results = sum(weight.nbytes for weight in pool.weights)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM") - before
        read, read_bytes = reading(device)
        variants = {
            "generation": generate,
            "single": lambda: generate(1),
            "product": product(sizes.product, DTYPE, device),
            "read": read,
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in tqdm(range(1 + sizes.rounds), desc="Timing generation"):
            for name, run in variants.items():
                taken = seconds(run)
                if number:
                    times[name].append(taken)
    flops = generation_flops(network, sizes.passages)
    fractions = [
        (flops / taken) / (product_flops(sizes.product) / other)
        for taken, other in zip(times["generation"], times["product"], strict=True)
    ]
    return {
        **{name: statistics.median(taken) for name, taken in times.items()},
        "fraction": statistics.median(fractions),
        "flops": flops,
        "read_rate": read_bytes / min(times["read"]),
        "weights": numbers_of(network) * DTYPE.itemsize,
        "results": results,
        "peak": peak,
    }


def rows_of(found: dict[str, float], sizes: Sizes) -> list[Row]:
    """Rows from the result of `measure_here`."""
    product_rate = product_flops(sizes.product) / found["product"]
    moved = found["weights"] + found["results"]
    floor = max(found["flops"] / product_rate, moved / found["read_rate"])
    return [
        Row("experts.matmul_fraction", found["fraction"], "x", ">= 0.7"),
        Row("experts.peak_memory_ratio", found["peak"] / moved, "x", "<= 1.2"),
        Row("experts.weights_and_results", moved / 1e9, "GB"),
        Row("experts.generation", 1000 * found["generation"] / sizes.passages, "ms/passage"),
        Row("experts.generation_floor", 1000 * floor / sizes.passages, "ms/passage"),
        Row("experts.one_at_a_time", 1000 * found["single"], "ms/passage"),
        Row("experts.generation_rate", found["flops"] / found["generation"] / 1e9, "GFLOP/s"),
        Row("experts.matmul_rate", product_rate / 1e9, "GFLOP/s"),
        Row("experts.read_rate", found["read_rate"] / 1e9, "GB/s"),
    ]


def measure(options: Options) -> list[Row]:
    """Measure in a subprocess."""
    found, _ = run_child(["-m", "benchmarks.experts", "quick" if options.quick else "full"], os.environ)
    return rows_of(found, QUICK if options.quick else FULL)


if __name__ == "__main__":
    print(json.dumps(measure_here({"full": FULL, "quick": QUICK}[sys.argv[1]])))
