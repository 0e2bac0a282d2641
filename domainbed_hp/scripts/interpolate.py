"""Interpolate between the initial and the trained weights of a finished run, as WiSE-FT does, and evaluate each.

The weights are (1 - alpha) * initial + alpha * trained; nothing is trained again. The command prints a table of
accuracies. With --output_dir it also writes a run for each alpha, with average=wise, that collect_results reads.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from domainbed_hp import records
from domainbed_hp.registry import UsageError
from domainbed_hp.run_args import RunArgs
from domainbed_hp.run_dir import DONE, RunLock
from domainbed_hp.scripts import run

COPIED_KEYS = ("step", "epoch", "image_size", "trainable_params", "protocol")
"""Keys of a record that are copied from the last record of the run."""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.interpolate", description=__doc__)
    p.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    alphas = [i / 10 for i in range(11)]
    p.add_argument("--alphas", type=float, nargs="+", metavar="X", default=alphas, help="default: 0, 0.1, ..., 1")
    p.add_argument("--output_dir", type=Path, metavar="DIR", help="folder to write runs to; not that of a sweep")
    p.add_argument("--data_dir", metavar="DIR", help="folder that holds the data sets' folders (default: the run's)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the run's)")
    args = p.parse_args(argv)
    last = records.last_record(args.run_dir)
    if last is None:
        raise UsageError(f"{args.run_dir}: got no records, expected the folder of a finished run")
    where = {name: value for name in ("data_dir", "device") if (value := getattr(args, name))}
    rows = evaluate_alphas(args.run_dir, RunArgs.of(last["args"] | where), args.alphas)
    if args.output_dir:
        for alpha, row in rows.items():
            write_run(row, last, args.output_dir / f"{args.run_dir.resolve().name}-alpha-{alpha!r}", alpha)
    accs = [name for name in last if name.endswith("_acc")]
    table = [[f"{alpha:g}", *(100 * row[name] for name in accs)] for alpha, row in rows.items()]
    headers = ["alpha", *(name.removesuffix("_acc") for name in accs)]
    print(tabulate(table, headers, floatfmt=("g", *[".1f"] * len(accs))))
    return 0


def evaluate_alphas(run_dir: Path, args: RunArgs, alphas: Sequence[float]) -> dict[float, dict[str, Any]]:
    """Return alpha -> accuracies and loss, as in a record. All have the trained model's buffers."""
    import torch

    from domainbed_hp.datasets.loading.loader import make_eval_loaders
    from domainbed_hp.datasets.loading.prefetch import ThreadPool
    from domainbed_hp.plugins import import_plugins
    from domainbed_hp.training.evaluation import EVAL_BATCH, evaluation_mode, make_score_columns, score_split
    from domainbed_hp.training.model_io import build_algorithm, load_model
    from domainbed_hp.training.run_log import find_versions
    from domainbed_hp.training.setup import set_up_run
    from domainbed_hp.training.weight_averaging import WiSE, swap_weights

    import_plugins(args.imports)
    trained, spec = load_model(run_dir)
    if spec.hparams["average"] != "none":
        raise UsageError(f"{run_dir}: got a model with average={spec.hparams['average']}, expected average=none")
    for alpha in alphas:
        WiSE.HPARAMS["wise_alpha"].check("wise_alpha", alpha)
    setup = set_up_run(args)
    algorithm = build_algorithm(spec, args.seed).to(setup.device)
    wise = WiSE([p for p in algorithm.parameters() if p.requires_grad], setup.hparams, setup.steps)
    if not wise.parameters:
        raise UsageError(f"{run_dir}: {spec.algorithm} trained nothing, so there is nothing to interpolate")
    algorithm.load_state_dict(trained.trained_state(), strict=False)
    cast = torch.autocast(setup.device.type, torch.bfloat16, enabled=args.precision == "bf16")
    images, where = (setup.dataset.environments, setup.scored_splits), (setup.device, setup.preprocess)
    rows = {}
    with ThreadPool(setup.num_workers) as threads:
        batch_size = EVAL_BATCH["cuda" if setup.on_gpu else "cpu"]
        loaders = make_eval_loaders(*images, batch_size, threads, max_images=args.eval_images, pin=setup.on_gpu)
        for alpha in alphas:
            with swap_weights(wise.parameters, wise.interpolate(alpha)), evaluation_mode(algorithm), cast:
                scores = {name: score_split(algorithm, loader, *where) for name, loader in loaders.items()}
            rows[alpha] = make_score_columns(scores, setup.train_envs) | {"versions": find_versions(setup.device)}
    return rows


def write_run(row: dict[str, Any], last: dict[str, Any], folder: Path, alpha: float) -> None:
    """Write the run that training with average=wise would have made, with a label, and thus a row, of its own."""
    wise: dict[str, Any] = {"average": "wise", "wise_alpha": alpha}
    args = last["args"]
    label = f"{args['label'] or args['algorithm']}, alpha {alpha:g}"
    overrides = json.dumps(json.loads(args["hparams"] or "{}") | wise)
    args = args | {"hparams": overrides, "output_dir": str(folder), "label": label}
    with RunLock(folder):
        records.truncate_records(folder, -1)
        shared = {name: last[name] for name in COPIED_KEYS if name in last}
        records.append_record(folder, shared | row | {"args": args, "hparams": last["hparams"] | wise})
        (folder / DONE).write_text("done")


if __name__ == "__main__":
    sys.exit(run(main))
