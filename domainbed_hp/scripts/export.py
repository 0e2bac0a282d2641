"""Write the model of a run as a plain CLIP, a folder that open_clip loads by `local-dir:FOLDER`.

Low-rank changes and gates are merged into the weights of the image encoder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_hp.registry import UsageError
from domainbed_hp.scripts import run


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m domainbed_hp.scripts.export", description=__doc__)
    p.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    p.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder to write")
    help = "names of your own Python modules, which define algorithms"
    p.add_argument("--import", dest="imports", nargs="+", default=[], metavar="MODULE", help=help)
    args = p.parse_args(argv)
    from domainbed_hp.algorithms.clip_algorithm import ClipAlgorithm
    from domainbed_hp.networks.clip import export_clip, find_clip
    from domainbed_hp.plugins import import_plugins
    from domainbed_hp.training.model_io import load_model

    import_plugins(args.imports)
    algorithm, spec = load_model(args.run_dir)
    if not isinstance(algorithm, ClipAlgorithm):
        raise UsageError(f"{args.run_dir}: {spec.algorithm} has no CLIP to export; expected a CLIP algorithm")
    source = find_clip(spec.hparams["clip_model"], spec.hparams["clip_pretrained"])
    export_clip(source, algorithm.merge(), args.output_dir)
    print(f"open_clip.create_model_and_transforms('local-dir:{args.output_dir}')")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
