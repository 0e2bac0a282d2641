"""Turn a run into a plain CLIP: a folder for open_clip's `local-dir:`, adapters and gates folded into `visual.*`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp.registry import UsageError
from domainbed_hp.scripts import run


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.export", description=__doc__)
    p.add_argument("run_dir", type=Path, help="folder of a finished run")
    p.add_argument("output_dir", type=Path, help="folder to write")
    p.add_argument("--import", dest="imports", nargs="+", default=[], metavar="MODULE", help="your own algorithms")
    args = p.parse_args(argv)
    from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm
    from domainbed_hp.networks.clip import export_clip, find_clip
    from domainbed_hp.plugins import import_plugin
    from domainbed_hp.training.model_io import load_model

    for module in args.imports:
        import_plugin(module)
    algorithm, spec = load_model(args.run_dir)
    if not isinstance(algorithm, ClipAlgorithm):
        raise UsageError(f"{args.run_dir}: {spec.algorithm} is no CLIP under its text classifier")
    source = find_clip(spec.hparams["clip_model"], spec.hparams["clip_pretrained"])
    export_clip(source, algorithm.merge(), args.output_dir)
    print(f"open_clip.create_model_and_transforms('local-dir:{args.output_dir}')")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
