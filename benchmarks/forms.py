"""Three ways to compute HA-LoRA on W_q and W_v of one layer, forward and backward, against the frozen product alone.

    python benchmarks/forms.py [--device cuda --precision bf16]

one product   as `HeadLoRA.forward`: all heads' A side by side, B block diagonal, added by the product itself
per head      the same with a small product a head
weights       x (W + dW): dW is built once, its gradient is a full one

ViT-B/16's shapes. The ways take turns round by round, and each round gives a ratio.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from common import one_thread, spread, synchronise, turns
from tabulate import tabulate
from torch import Tensor

from domainbed_hp.networks.heads import HeadLoRA

WIDTH, HEADS, TOKENS = 768, 12, 197
Way = Callable[[Tensor, Tensor, list[HeadLoRA]], list[Tensor]]


def frozen(x: Tensor, w: Tensor, adapters: list[HeadLoRA]) -> list[Tensor]:
    return list(F.linear(x, w).chunk(3, -1))


def one_product(x: Tensor, w: Tensor, adapters: list[HeadLoRA]) -> list[Tensor]:
    q, k, v = F.linear(x, w).chunk(3, -1)
    return [adapters[0](x, q), k, adapters[1](x, v)]


def per_head(x: Tensor, w: Tensor, adapters: list[HeadLoRA]) -> list[Tensor]:
    q, k, v = F.linear(x, w).chunk(3, -1)
    added = []
    for y, adapter in ((q, adapters[0]), (v, adapters[1])):
        z = torch.einsum("bnd,hdr->bnhr", x, adapter.lora_A)
        added.append(y + torch.einsum("bnhr,hrd->bnhd", z, adapter.lora_B).flatten(-2))
    return [added[0], k, added[1]]


def weights(x: Tensor, w: Tensor, adapters: list[HeadLoRA]) -> list[Tensor]:
    q, k, v = w.chunk(3)
    return list(F.linear(x, torch.cat([q + adapters[0].delta().T, k, v + adapters[1].delta().T])).chunk(3, -1))


WAYS: dict[str, Way] = {"frozen": frozen, "one product": one_product, "per head": per_head, "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=12, help="images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1, help="of each way a round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args()
    device = torch.device(args.device)
    machine = one_thread(device)
    torch.manual_seed(0)
    x = torch.randn(args.batch, TOKENS, WIDTH, device=device, requires_grad=True)
    w = 0.02 * torch.randn(3 * WIDTH, WIDTH, device=device)
    towards = [torch.randn_like(x) for _ in range(3)]
    rows = []
    for rank in (2, 8):
        adapters = [HeadLoRA(WIDTH, HEADS, rank).to(device) for _ in "qv"]

        def seconds(way: Way, adapters: list[HeadLoRA] = adapters) -> float:
            synchronise(device)
            start = time.perf_counter()
            for _ in range(args.steps):
                with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16", cache_enabled=False):
                    outputs = way(x, w, adapters)
                torch.autograd.backward(outputs, [t.to(y.dtype) for t, y in zip(towards, outputs, strict=True)])
            synchronise(device)
            return (time.perf_counter() - start) / args.steps

        times = turns({name: lambda _, way=way: seconds(way) for name, way in WAYS.items()}, args.rounds + 2)
        base = torch.tensor(times["frozen"][2:])
        row = [spread((torch.tensor(times[name][2:]) / base).numpy()) for name in list(WAYS)[1:]]
        rows.append([f"r = {rank}", f"{1e3 * base.median():.3g}", *row])
    print(f"{machine}, {args.precision}, {args.batch} images, {args.rounds} rounds")
    print(tabulate(rows, ["", "frozen, ms", *list(WAYS)[1:]], disable_numparse=True))


if __name__ == "__main__":
    main()
