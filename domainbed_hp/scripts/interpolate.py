"""WiSE-FT of a finished run: scores (1 - alpha) untrained + alpha trained weights, without training again.

Prints a table and writes a folder a run for every alpha, with average=wise, that collect_results reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from domainbed_hp import records
from domainbed_hp.records import Record
from domainbed_hp.registry import UsageError
from domainbed_hp.runs import DONE, claim
from domainbed_hp.scripts import run

if TYPE_CHECKING:
    from domainbed_hp.planning import Plan
    from domainbed_hp.scoring import Score

KEPT = ("step", "epoch", "image_size", "trainable_params", "protocol")
"""What a record shares with the last one of the run."""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.interpolate", description=__doc__)
    p.add_argument("run_dir", type=Path, help="folder of a finished run")
    p.add_argument("--alphas", type=float, nargs="+", default=[i / 10 for i in range(11)], help="0 is untrained")
    p.add_argument("--output_dir", type=Path, help="gets wise_alpha_0.3 and so on; default: the run's folder")
    p.add_argument("--data_dir", help="default: the run's")
    p.add_argument("--device", help="default: the run's")
    args = p.parse_args(argv)
    found = records.load_run(args.run_dir)
    if not found:
        raise UsageError(f"{args.run_dir}: no records there, expected the folder of a finished run")
    given = found[-1]["args"] | {name: value for name in ("data_dir", "device") if (value := getattr(args, name))}
    folders = {a: (args.output_dir or args.run_dir) / f"wise_alpha_{a:g}" for a in args.alphas}
    rows = score_alphas(args.run_dir, given, found[-1], folders)
    table = [
        [f"{a:g}", *(100 * value for name, value in row.items() if name.endswith("_acc"))] for a, row in rows.items()
    ]
    headers = [name.removesuffix("_acc") for name in next(iter(rows.values())) if name.endswith("_acc")]
    print(tabulate(table, ["alpha", *headers], floatfmt=("g", *[".1f"] * len(headers))))
    return 0


def score_alphas(run_dir: Path, given: Record, last: Record, folders: dict[float, Path]) -> dict[float, Record]:
    """A record for every alpha; those that are there already are read."""
    import torch

    from domainbed_hp.averages import WiSE, holding
    from domainbed_hp.datasets.loader import eval_loaders
    from domainbed_hp.datasets.prefetch import Workers
    from domainbed_hp.models import load_model
    from domainbed_hp.planning import RunArgs, plan
    from domainbed_hp.plugins import import_plugin
    from domainbed_hp.scoring import EVAL_BATCH, evaluation, score
    from domainbed_hp.training import untrained

    for module in given["imports"]:
        import_plugin(module)
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    of = plan(RunArgs(**fields))
    if of.hparams["average"] != "none":
        raise UsageError(f"{run_dir}: the model is average={of.hparams['average']} already; train with average=none")
    for alpha in folders:
        WiSE.HPARAMS["wise_alpha"].check("wise_alpha", alpha)
    trained, recipe = load_model(run_dir)
    algorithm = untrained(recipe, of.args.seed).to(of.device)
    wise = WiSE([p for p in algorithm.parameters() if p.requires_grad], of.hparams, of.steps)
    algorithm.load_state_dict(trained.trained_state(), strict=False)
    cast = torch.autocast(of.device.type, torch.bfloat16, enabled=of.args.precision == "bf16")
    environments, limit = of.dataset.environments, of.args.eval_images
    rows = {}
    with Workers(of.num_workers) as workers:
        batch_size = EVAL_BATCH["cuda" if of.on_gpu else "cpu"]
        loaders = eval_loaders(environments, of.split, batch_size, workers, max_images=limit, pin=of.on_gpu)
        for alpha, folder in folders.items():
            if not (folder / DONE).exists():
                with claim(folder), holding(wise.parameters, wise.between(alpha)), evaluation(algorithm), cast:
                    scores = {name: score(algorithm, each, of.device, of.pixels) for name, each in loaders.items()}
                    records.append(folder, record(of, last, scores, alpha, folder))
                    (folder / DONE).write_text("done")
            rows[alpha] = records.load_run(folder)[-1]
    return rows


def record(of: Plan, last: Record, scores: dict[str, Score], alpha: float, folder: Path) -> Record:
    """As a run would write it that trained with average=wise."""
    from domainbed_hp.logs import versions
    from domainbed_hp.scoring import scored

    wise: dict[str, Any] = {"average": "wise", "wise_alpha": alpha}
    overrides = json.dumps(json.loads(of.args.hparams or "{}") | wise)
    args = last["args"] | {"hparams": overrides, "output_dir": str(folder)}
    terms = {"args": args, "hparams": of.hparams | wise, "versions": versions(of.device)}
    return {name: last[name] for name in KEPT if name in last} | scored(scores, of.train_envs) | terms


if __name__ == "__main__":
    sys.exit(run(main))
