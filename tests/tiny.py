"""A CLIP of random weights, one tenth of the embedded one's work, for tests in which no weight is worth anything.

Images as large as the embedded CLIP's, 5 tokens, 4 layers of 4 heads; bytes as tokens, as there.
"""

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from domainbed_hp.networks.clip import MINI


def write_tiny(folder: Path) -> None:
    """Write the CLIP for open_clip's `local-dir:`."""
    config: dict[str, Any] = json.loads((MINI / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 32
    config["model_cfg"]["vision_cfg"] = {
        "image_size": 64,
        "layers": 4,
        "width": 40,
        "head_width": 10,
        "patch_size": 32,
    }
    config["model_cfg"]["text_cfg"] |= {"width": 24, "heads": 4}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(MINI / "bytes.txt.gz", folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file(state, folder / "open_clip_model.safetensors")


FOLDER = Path(tempfile.mkdtemp(prefix="tiny_clip_"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
write_tiny(FOLDER)
TINY = {"clip_model": "mini", "clip_pretrained": f"local-dir:{FOLDER}"}
