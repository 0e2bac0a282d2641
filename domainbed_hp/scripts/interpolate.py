"""WiSE-FT of a finished run: scores (1 - alpha) untrained + alpha trained weights, without training again.

Prints a table; with --output_dir it writes a run for every alpha, with average=wise, that collect_results reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from domainbed_hp import records
from domainbed_hp.records import Record
from domainbed_hp.registry import UsageError
from domainbed_hp.run_dir import DONE, claim
from domainbed_hp.scripts import run

KEPT = ("step", "epoch", "image_size", "trainable_params", "protocol")
"""What a record shares with the last one of the run."""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.interpolate", description=__doc__)
    p.add_argument("run_dir", type=Path, help="folder of a finished run")
    p.add_argument("--alphas", type=float, nargs="+", default=[i / 10 for i in range(11)], help="0 is untrained")
    p.add_argument("--output_dir", type=Path, help="gets a run folder for every alpha; not the folder of a sweep")
    p.add_argument("--data_dir", help="default: the run's")
    p.add_argument("--device", help="default: the run's")
    args = p.parse_args(argv)
    found = records.load_run(args.run_dir)
    if not found:
        raise UsageError(f"{args.run_dir}: no records there, expected the folder of a finished run")
    last = found[-1]
    given = last["args"] | {name: value for name in ("data_dir", "device") if (value := getattr(args, name))}
    rows = score_alphas(args.run_dir, given, last, args.alphas)
    if args.output_dir:
        for alpha, row in rows.items():
            write(row, last, args.output_dir / f"{args.run_dir.resolve().name}-alpha-{alpha!r}", alpha)
    accs = [name for name in last if name.endswith("_acc")]
    table = [[f"{alpha:g}", *(100 * row[name] for name in accs)] for alpha, row in rows.items()]
    headers = ["alpha", *(name.removesuffix("_acc") for name in accs)]
    print(tabulate(table, headers, floatfmt=("g", *[".1f"] * len(accs))))
    return 0


def score_alphas(run_dir: Path, given: Record, last: Record, alphas: Sequence[float]) -> dict[float, Record]:
    """What is measured at every alpha; buffers are those of the trained model at each."""
    import torch

    from domainbed_hp.datasets.loading.loader import make_eval_loaders
    from domainbed_hp.datasets.loading.prefetch import ThreadPool
    from domainbed_hp.plugins import import_plugin
    from domainbed_hp.training.evaluation import EVAL_BATCH, evaluation, score, scored
    from domainbed_hp.training.loop import untrained
    from domainbed_hp.training.model_io import load_model
    from domainbed_hp.training.run_log import versions
    from domainbed_hp.training.setup import RunArgs, plan
    from domainbed_hp.training.weight_averaging import WiSE, holding

    if unknown := sorted(given.keys() ^ {field.name for field in fields(RunArgs)}):
        raise UsageError(f"{run_dir}: not a run of this version of domainbed_hp; its args differ in {unknown[:3]}")
    for module in given["imports"]:
        import_plugin(module)
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    of = plan(RunArgs(**settings))
    if last["hparams"]["average"] != "none":
        raise UsageError(f"{run_dir}: the model is average={last['hparams']['average']} already; train with none")
    for alpha in alphas:
        WiSE.HPARAMS["wise_alpha"].check("wise_alpha", alpha)
    trained, recipe = load_model(run_dir)
    algorithm = untrained(recipe, of.args.seed).to(of.device)
    wise = WiSE([p for p in algorithm.parameters() if p.requires_grad], of.hparams, of.steps)
    if not wise.parameters:
        raise UsageError(f"{run_dir}: {recipe.algorithm} trained nothing, so there is nothing to interpolate")
    algorithm.load_state_dict(trained.trained_state(), strict=False)
    cast = torch.autocast(of.device.type, torch.bfloat16, enabled=of.args.precision == "bf16")
    environments, limit = of.dataset.environments, of.args.eval_images
    rows = {}
    with ThreadPool(of.num_workers) as workers:
        batch_size = EVAL_BATCH["cuda" if of.on_gpu else "cpu"]
        loaders = make_eval_loaders(environments, of.scored, batch_size, workers, max_images=limit, pin=of.on_gpu)
        for alpha in alphas:
            with holding(wise.parameters, wise.between(alpha)), evaluation(algorithm), cast:
                scores = {name: score(algorithm, each, of.device, of.preprocess) for name, each in loaders.items()}
            rows[alpha] = scored(scores, of.train_envs) | {"versions": versions(of.device)}
    return rows


def write(row: Record, last: Record, folder: Path, alpha: float) -> None:
    """The record that a run with average=wise would end with; in a row of its own, whatever the run's was called."""
    wise: dict[str, Any] = {"average": "wise", "wise_alpha": alpha}
    args = last["args"]
    label = f"{args['label'] or args['algorithm']}, alpha {alpha:g}"
    overrides = json.dumps(json.loads(args["hparams"] or "{}") | wise)
    args = args | {"hparams": overrides, "output_dir": str(folder), "label": label}
    with claim(folder):
        records.truncate(folder, -1)
        kept = {name: last[name] for name in KEPT if name in last}
        records.append(folder, kept | row | {"args": args, "hparams": last["hparams"] | wise})
        (folder / DONE).write_text("done")


if __name__ == "__main__":
    sys.exit(run(main))
