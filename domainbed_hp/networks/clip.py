"""CLIP from open_clip: find a checkpoint with its preprocessing, load it, encode prompts, export it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors.torch import save_file
from torch import Tensor

from domainbed_hp.networks.preprocess import Preprocess
from domainbed_hp.networks.text import TextTower
from domainbed_hp.networks.vit import VisionTower
from domainbed_hp.registry import UsageError, unknown_name

LOCAL_DIR = "local-dir:"
MINI = Path(str(files("domainbed_hp.networks"))) / "mini"
"""Folder of the small CLIP in the package: `clip_model=mini`, `clip_pretrained=shapes`."""

ADVICE = (
    "Pass clip_pretrained=PATH (a checkpoint file), clip_pretrained=local-dir:FOLDER (open_clip_config.json and "
    "weights), clip_pretrained=random, or the embedded clip_model=mini clip_pretrained=shapes."
)


@dataclass(frozen=True)
class ClipSource:
    """Names and configuration of a CLIP that is not built yet."""

    name: str
    """Name for open_clip: a model name, or `local-dir:` and a folder."""
    pretrained: str | None
    """Tag or checkpoint file. None: the weights in the folder, or random weights."""
    random: bool
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        return Path(self.name.removeprefix(LOCAL_DIR)) if self.name.startswith(LOCAL_DIR) else None

    @property
    def preprocess(self) -> Preprocess:
        size = self.model_cfg["vision_cfg"].get("image_size", 224)
        resize: Literal["crop", "squash"] = "crop" if self.preprocess_cfg["resize_mode"] == "shortest" else "squash"
        return Preprocess(size, resize, self.preprocess_cfg["interpolation"])


def find_clip(model: str, pretrained: str) -> ClipSource:
    """Return the CLIP of hparams `clip_model` and `clip_pretrained`; `UsageError` if it is unknown or unsupported.

    `pretrained` is a tag, a checkpoint file, `local-dir:FOLDER` (with a model of its own) or `random`.
    """
    random = pretrained == "random"
    checkpoint: str | None = None
    preprocess: dict[str, Any] = {}
    if pretrained.startswith(LOCAL_DIR):
        name = pretrained
    elif model == "mini":
        name = LOCAL_DIR + str(MINI)
        if pretrained != "shapes" and not random:
            checkpoint = check_checkpoint(pretrained, ["shapes"])
    else:
        name = model
        if model not in open_clip.list_models():
            raise unknown_name("clip_model", model, ["mini", *filter(is_supported, open_clip.list_models())])
        check_tower(model, open_clip.get_model_config(model)["vision_cfg"])
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained in tags:
            checkpoint, preprocess = pretrained, open_clip.get_pretrained_cfg(model, pretrained)
            check_gelu(model, pretrained)
        elif not random:
            checkpoint = check_checkpoint(pretrained, tags)
    if name.startswith(LOCAL_DIR):
        config = read_config(Path(name.removeprefix(LOCAL_DIR)))
        model_cfg, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
        check_tower(name, model_cfg["vision_cfg"])
    else:
        model_cfg = open_clip.get_model_config(model)
    preprocess = merge_preprocess_dict(vars(PreprocessCfg()), preprocess)
    if preprocess["resize_mode"] not in ("shortest", "squash"):
        raise UsageError(f"{name}: got resize_mode {preprocess['resize_mode']!r}, known: shortest, squash")
    return ClipSource(name, checkpoint, random, model_cfg, preprocess)


@dataclass
class Clip:
    """A loaded CLIP. Its text tower is freed with it, unless `make_text_tower` was called."""

    source: ClipSource
    visual: VisionTower
    logit_scale: float
    """Factor T of the cosine; 100 for OpenAI's weights."""
    _model: open_clip.CLIP

    @property
    def embed_dim(self) -> int:
        return self.visual.embed_dim

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit-norm text features (len(prompts), E)."""
        tokenize, encode = make_tokenizer(self.source), self._model.encode_text
        batches = [encode(tokenize(list(prompts[i : i + 256]))) for i in range(0, len(prompts), 256)]
        return F.normalize(torch.cat(batches).float(), dim=-1)

    def make_text_tower(self) -> TextTower:
        """Return the text tower, frozen, for prompts with learned vectors. Call it once, after `encode_prompts`."""
        if not isinstance(self._model, open_clip.CLIP):
            raise UsageError(f"{self.source.name}: this prompt needs the text tower of a CLIP; use prompt=template")
        return TextTower(self._model, make_tokenizer(self.source), self.source.random).requires_grad_(False)


def load_clip(model: str, pretrained: str) -> Clip:
    """Load a CLIP in fp32 on the CPU, with an image tower that requires gradients.

    The weights of clip_pretrained=random depend on torch's global generator, which is not advanced.
    """
    source = find_clip(model, pretrained)
    with torch.random.fork_rng(devices=[]):
        clip = create_model(source).eval()
    visual = VisionTower(clip.visual, source.preprocess_cfg["mean"], source.preprocess_cfg["std"])
    del clip.visual
    return Clip(source, visual, float(clip.logit_scale.detach().exp()), clip)


def export_clip(source: ClipSource, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a folder for open_clip's `local-dir:`: the source checkpoint with these weights replaced.

    `ValueError` unless `weights` have the source's names and shapes, and all of its `visual.*`.
    """
    if source.random:
        raise UsageError(
            "clip_pretrained=random cannot be exported: its text tower was not saved. Train from other weights."
        )
    state = create_model(source).state_dict()
    expected = {k: tuple(v.shape) for k, v in state.items() if k.startswith("visual.") or k in weights}
    got = {k: tuple(v.shape) for k, v in weights.items()}
    if wrong := sorted(k for k in expected | got if expected.get(k) != got.get(k)):
        listed = "; ".join(f"{k}: got {got.get(k)}, expected {expected.get(k)}" for k in wrong[:5])
        raise ValueError(f"weights do not fit {source.name}: {listed}. `merge` returns the source's names and shapes")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in (state | weights).items()}, folder / "open_clip_model.safetensors")
    preprocess = {k: source.preprocess_cfg[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": source.model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    bpe = source.model_cfg["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
    if bpe and source.folder:
        shutil.copyfile(source.folder / bpe, folder / bpe)


def create_model(source: ClipSource) -> open_clip.CLIP:
    """Return open_clip's model with the source's weights."""
    in_folder = source.pretrained is None and not source.random
    try:
        clip = open_clip.create_model(
            source.name,
            pretrained=None if source.folder else source.pretrained,
            load_weights=in_folder or source.folder is None,
            require_pretrained=not source.random and (in_folder or source.folder is None),
        )
        if source.folder and source.pretrained:
            open_clip.load_checkpoint(clip, source.pretrained)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"cannot load CLIP {source.name!r} with {source.pretrained or 'its own weights'!r}: {error}\n{ADVICE}"
        ) from error
    return clip


def make_tokenizer(source: ClipSource) -> Any:
    options = {}
    bpe = source.model_cfg["text_cfg"].get("tokenizer_kwargs", {}).get("bpe_path")
    if bpe and source.folder:  # open_clip would look for it in the current folder
        options["bpe_path"] = str(source.folder / bpe)
    return open_clip.get_tokenizer(source.name, **options)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        config["model_cfg"]["vision_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"local-dir:{folder}: cannot read {path.name}: {error!r}. {ADVICE}") from error
    return config


def check_checkpoint(path: str, tags: list[str]) -> str:
    if not Path(path).is_file():
        raise UsageError(f"clip_pretrained={path!r} is no file and no known tag ({', '.join(tags)}). {ADVICE}")
    return path


def check_gelu(model: str, tag: str) -> None:
    """Raise `UsageError` if a tag was trained with the other GELU; open_clip only warns, and features are wrong."""
    trained = bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False))
    if trained != bool(open_clip.get_model_config(model).get("quick_gelu", False)):
        other = f"{model}-quickgelu" if trained else model.removesuffix("-quickgelu")
        raise UsageError(f"the weights {tag!r} have another GELU than {model!r}: pass clip_model={other}")


def find_obstacle(vision: dict[str, Any]) -> str | None:
    """Return the reason why the heads of a tower cannot be reached, None if they can."""
    if "timm_model_name" in vision:
        return f"a timm tower ({vision['timm_model_name']})"
    if not isinstance(vision.get("layers", 12), int):
        return "a ResNet tower"
    if vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok":
        return "a tower without class-token pooling"
    if any(vision.get(k) for k in ("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads")):
        return "a tower with custom attention"
    return None


def is_supported(model: str) -> bool:
    return find_obstacle(open_clip.get_model_config(model)["vision_cfg"]) is None


def check_tower(name: str, vision: dict[str, Any]) -> None:
    """Raise `UsageError` for a tower whose heads cannot be reached."""
    if obstacle := find_obstacle(vision):
        raise UsageError(
            f"{name!r} has {obstacle}, expected one of open_clip's ViTs with a class token, "
            "e.g. ViT-B-16-quickgelu, ViT-B-32, ViT-L-14"
        )
