"""Train one algorithm on one data set, leaving out `--test_envs`. DomainBed's flags and defaults, and a few more.

A run that was stopped, however it was, goes on when the same command is given again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_hp.registry import ALGORITHMS, DATASETS
from domainbed_hp.run_dir import RunLock
from domainbed_hp.scripts import run
from domainbed_hp.sweep.spec import CHOICES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.train", description=__doc__)
    p.add_argument("--data_dir", help="folder that holds PACS/, VLCS/, ...")
    p.add_argument("--dataset", default="ShapesDG", help=f"{', '.join(DATASETS)}, or folder:PATH with your own")
    p.add_argument("--algorithm", default="HeadPurification", help=", ".join(ALGORITHMS))
    p.add_argument("--task", default="domain_generalization", choices=CHOICES["task"])
    p.add_argument("--hparams", help="JSON object of overrides")
    p.add_argument("--hparams_seed", type=int, default=0, help="0: defaults; n > 0: a random draw")
    p.add_argument("--trial_seed", type=int, default=0, help="of the splits, and of the draw")
    p.add_argument("--seed", type=int, default=0, help="of initialisation and batches")
    p.add_argument("--steps", type=int, help="default: the data set's")
    p.add_argument("--checkpoint_freq", type=int, help="steps between records; default: the data set's")
    p.add_argument("--test_envs", type=int, nargs="+", default=[0], help="indices of the environments left out")
    p.add_argument("--output_dir", default="train_output")
    p.add_argument("--holdout_fraction", type=float, default=0.2, help="of each environment, split `out`")
    p.add_argument("--uda_holdout_fraction", type=float, default=0.0, help="of test environments, split `uda`")
    p.add_argument("--skip_model_save", action="store_true")
    p.add_argument("--save_model_every_checkpoint", action="store_true")
    p.add_argument("--save", default="trained", choices=CHOICES["save"], help="of the model: what trained, or all")
    p.add_argument("--keep", default="last", choices=CHOICES["keep"], help="best: also by training-domain validation")
    p.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    p.add_argument("--precision", default="fp32", choices=CHOICES["precision"])
    on_gpu = "auto: on a GPU capture steps, and compile them in long runs; off: neither"
    p.add_argument("--compile", default="auto", choices=CHOICES["compile"], help=on_gpu)
    p.add_argument("--loader", default="batched", choices=CHOICES["loader"], help="reference: DomainBed's, in Pillow")
    p.add_argument("--features", default="cached", choices=CHOICES["features"], help="of a frozen tower: kept, or not")
    p.add_argument("--num_workers", type=int, help="loader threads of the whole run; default: 8 with a GPU, else 0")
    p.add_argument(
        "--import", dest="imports", nargs="+", default=[], metavar="MODULE", help="your own algorithms and data sets"
    )
    p.add_argument("--label", help="row of the table; default: the algorithm")
    p.add_argument("--eval", default="full", choices=CHOICES["eval"], help="fast: only what selection rules read")
    p.add_argument("--eval_images", type=int, help="score at most so many images of each split")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args: dict[str, Any] = vars(parser().parse_args(argv))
    with RunLock(Path(args["output_dir"])) as lock:
        # Imported here: whoever comes second is refused before torch is loaded.
        from domainbed_hp.plugins import import_plugin
        from domainbed_hp.training.loop import train
        from domainbed_hp.training.setup import RunArgs

        for module in args["imports"]:
            import_plugin(module)
        args |= {name: tuple(args[name]) for name in ("test_envs", "imports")}
        train(RunArgs(**args), lock)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
