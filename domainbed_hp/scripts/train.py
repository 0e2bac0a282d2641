"""Train one algorithm on one data set, without the environments in --test_envs, and evaluate it on all environments.

Flags of DomainBed's train.py mean the same here, and have the same defaults but for --dataset and --algorithm. A run
that was interrupted continues when the same command is given again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp.run_args import RunArgs, add_flags
from domainbed_hp.run_dir import RunLock
from domainbed_hp.scripts import pause_gc, run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.train", description=__doc__)
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = RunArgs.of(vars(make_parser().parse_args(argv)))
    with RunLock(Path(args.output_dir)) as lock:
        with pause_gc():  # torch takes seconds to load: a process that finds the folder taken ends before
            from domainbed_hp.plugins import import_plugins
            from domainbed_hp.training.loop import train

        import_plugins(args.imports)
        train(args, lock)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
