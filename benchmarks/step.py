"""Time, work and memory of a training step: head purification against LoRA and full fine-tuning.

    python benchmarks/step.py                                    # ViT-B/16, random weights, fp32, one pinned core
    python benchmarks/step.py --model mini --variants LoRA VPT MIRO
    python benchmarks/step.py --device cuda --precision bf16 --batch 36 96 --compile off auto on

How: a step is all of `update` on images that are in memory. Three environments share the `--batch` images of a step.
The variants take turns round by round, and each round gives ratios; the table has their medians. `--compile auto` is
that of a short run: a GPU captures the step, nothing is compiled. `first` is the first step, which captures and
compiles. TFLOP are those of the step's matrix products and attention, as torch counts them; `of peak` is their rate
over `--peak` TFLOP/s. MiB is the peak of tensors in a step, weights and optimizer included; torch does not count what a
captured step uses.

Runtime: 15 minutes on one core, 3 minutes on a GPU.
"""

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import format_spread, interleave, use_one_thread
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from domainbed_hp.algorithms import Algorithm, get_algorithm_class
from domainbed_hp.algorithms.base import Minibatch
from domainbed_hp.hparams_registry import resolve_hparams
from domainbed_hp.networks.clip import find_clip
from domainbed_hp.training.cuda_graph import speed_up_training
from domainbed_hp.training.model_io import seed_everything

BASE, FULL = "LoRA", "FineTuneCLIP"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "HeadPurification": {},
    "HeadPurification, global": {"algorithm": "HeadPurification", "mmd_reach": "global"},
    FULL: {},
}
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


class Variant:
    """An algorithm with the images of its step."""

    def __init__(self, name: str, args: argparse.Namespace, batch: int, choice: str) -> None:
        options = {"clip_model": args.model, "clip_pretrained": "random"} | VARIANTS.get(name, {})
        algorithm = options.pop("algorithm", name)
        if algorithm == "ERM":
            options = {"backbone": "clip"} | options
        self.name, self.choice, self.device = name, choice, torch.device(args.device)
        self.cast = torch.autocast(self.device.type, torch.bfloat16, args.precision == "bf16", cache_enabled=False)
        hparams = resolve_hparams(algorithm, "PACS", 0, 0, options) | {"class_names": list(CLASSES), "steps": 10**6}
        seed_everything(0)
        size = find_clip(args.model, "random").preprocess.size
        built = get_algorithm_class(algorithm)((3, size, size), len(CLASSES), 3, hparams)
        self.algorithm: Algorithm = built.to(self.device)
        speed_up_training(self.algorithm, self.device, choice, steps=0)
        g = torch.Generator().manual_seed(0)
        x = torch.rand(batch, 3, size, size, generator=g).to(self.device)
        y = torch.randint(len(CLASSES), (batch,), generator=g).to(self.device)
        self.minibatches: list[Minibatch] = list(zip(x.chunk(3), y.chunk(3), strict=True))

    def step(self) -> None:
        with self.cast:
            self.algorithm.update(self.minibatches)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_step(self, steps: int) -> float:
        """Return the mean seconds of a step."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.synchronize()
        return (time.perf_counter() - start) / steps


def count_flop(variant: Variant) -> float:
    """Return the floating-point operations of a step, which must be neither captured nor compiled."""
    with FlopCounterMode(display=False) as counter:
        variant.step()
    return float(counter.get_total_flops())


def measure_memory(make: Callable[[], Variant]) -> tuple[Variant, float, float]:
    """Return a variant, the seconds of its first step, and the peak bytes of its third, weights included."""
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    variant = make()
    first = variant.time_step(1)
    variant.step()
    if variant.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        variant.step()
        return variant, first, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant.step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return variant, first, count_bytes(variant.algorithm) + float(max(0, *changes))


def count_bytes(algorithm: Algorithm) -> int:
    """Return the bytes of an algorithm's parameters, buffers, gradients and optimizers."""
    tensors: list[Any] = [*algorithm.parameters(), *algorithm.buffers()]
    tensors += [p.grad for p in algorithm.parameters()]
    for value in vars(algorithm).values():
        if isinstance(value, torch.optim.Optimizer):
            tensors += [tensor for state in value.state.values() for tensor in state.values()]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def compare(args: argparse.Namespace, batch: int) -> str:
    """Return the table for one size of batch."""
    variants, firsts, peaks, work = [], [], [], []
    for name in args.variants:
        flops = count_flop(Variant(name, args, batch, "off"))
        for choice in args.compile:
            variant, first, peak = measure_memory(lambda n=name, c=choice: Variant(n, args, batch, c))
            variants.append(variant)
            firsts.append(first)
            peaks.append(peak)
            work.append(flops)
    ways = {str(i): lambda _, v=variant: v.time_step(args.steps) for i, variant in enumerate(variants)}
    times = np.array(list(interleave(ways, args.rounds + 1).values()))[:, 1:]  # the first round warms up

    def times_of(name: str, choice: str) -> np.ndarray | None:
        rows = [i for i, v in enumerate(variants) if (v.name, v.choice) == (name, choice)]
        return times[rows[0]] if rows else None

    rows = []
    for variant, first, seconds, peak, flops in zip(variants, firsts, times, peaks, work, strict=True):
        median = float(np.median(seconds))
        bases = [times_of(name, variant.choice) for name in (BASE, FULL)]
        ratios = ["" if base is None else format_spread(seconds / base) for base in bases]
        rate = flops / median / 1e12
        share = f"{rate / args.peak:.0%}" if args.peak else ""
        row = [variant.name, variant.choice, f"{first:.1f}", f"{1e3 * median:.4g}", f"{batch / median:.4g}"]
        memory = "" if "compute_gradients" in vars(variant.algorithm) else f"{peak / 2**20:.0f}"
        rows.append([*row, *ratios, f"{flops / 1e12:.3g}", f"{rate:.3g}", share, memory])
    headers = ["", "--compile", "first, s", "ms/step", "images/s", "times LoRA", "times full"]
    headers += ["TFLOP", "TFLOP/s", "of peak", "MiB"]
    return tabulate(rows, headers, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="open_clip model name, or mini")
    parser.add_argument("--batch", type=int, nargs="+", default=[12], help="images of a step, all environments")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="any algorithms, or the default's names")
    parser.add_argument("--rounds", type=int, default=9, help="rounds to measure")
    parser.add_argument("--steps", type=int, default=1, help="steps of each variant in a round")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", nargs="+", default=["off"], choices=("off", "auto", "on"))
    parser.add_argument("--peak", type=float, help="the device's dense TFLOP/s; H100 and H200 in bf16: 989")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # weights are random, says open_clip each time
    print(f"{use_one_thread(torch.device(args.device))}, torch {torch.__version__}")
    for batch in args.batch:
        print(f"{args.model}, {args.precision}, {batch} images a step, {args.rounds} rounds")
        print(compare(args, batch), flush=True)


if __name__ == "__main__":
    main()
