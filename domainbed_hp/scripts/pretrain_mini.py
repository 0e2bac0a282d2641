"""Make the embedded CLIP, `networks/mini`, from scratch: draw captioned images, then train contrastively.

The image tower first learns to name things and styles; then both towers learn from captions. Most steps see images of
half the height and width, with a quarter of the tokens; the position embedding is interpolated afterwards.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from domainbed_hp.datasets.shapes.captioned_world import ANY, STYLES, THINGS, draw_caption, draw_world
from domainbed_hp.datasets.shapes.shapes_dg import CLASS_NAMES, ENVIRONMENTS, build
from domainbed_hp.scripts import run
from domainbed_hp.seeds import rng

MINI = Path(__file__).parents[1] / "networks" / "mini"
TEMPLATE = "a photo of a {}."


class World(NamedTuple):
    """Drawn images and their meanings."""

    images: Tensor  # (N, 3, 64, 64) uint8
    meanings: Tensor  # (N, 3) int64: thing, style, hue


def make_model(side: int) -> open_clip.CLIP:
    cfg = json.loads((MINI / "open_clip_config.json").read_text())["model_cfg"]
    return open_clip.CLIP(cfg["embed_dim"], cfg["vision_cfg"] | {"image_size": side}, cfg["text_cfg"])


def resize_model(model: open_clip.CLIP, side: int) -> open_clip.CLIP:
    """Return a model with the same weights for images of `side` times `side` pixels."""
    other, state = make_model(side), model.state_dict()
    resize_pos_embed(state, other)
    other.load_state_dict(state)
    return other


class Captions:
    """An encoder of captions that remembers token ids and leaves out the padding, which causal attention ignores."""

    def __init__(self) -> None:
        self.tokenize = open_clip.SimpleTokenizer(bpe_path=str(MINI / "bytes.txt.gz"), context_length=64)
        self.known: dict[str, Tensor] = {}

    def encode(self, model: open_clip.CLIP, texts: Sequence[str]) -> Tensor:
        for text in texts:
            if text not in self.known:
                self.known[text] = self.tokenize([text])[0]
        tokens = torch.stack([self.known[text] for text in texts])
        end = tokens.argmax(dim=1)  # the end mark has the highest id
        length = int(end.max()) + 1
        x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        return F.normalize(x[torch.arange(len(x)), end] @ model.text_projection, dim=-1)


def normalise_images(images: Tensor, side: int) -> Tensor:
    """Return uint8 images as CLIP-normalised floats, averaged down to `side` pixels."""
    x = F.adaptive_avg_pool2d(images.float() / 255, side)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (x - mean) / std


def augment_images(x: Tensor) -> Tensor:
    """Move, scale and flip the images, and change contrast, brightness and colour balance, all at random."""
    count = len(x)
    scale = torch.empty(count, 1).uniform_(0.85, 1.1).repeat(1, 2)
    scale[:, 0] *= torch.randint(0, 2, (count,)) * 2 - 1
    theta = torch.cat([torch.diag_embed(scale), torch.empty(count, 2, 1).uniform_(-0.1, 0.1)], dim=2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    gain = torch.empty(count, 1, 1, 1).uniform_(0.7, 1.3) * torch.empty(count, 3, 1, 1).uniform_(0.9, 1.1)
    return x * gain + torch.empty(count, 1, 1, 1).uniform_(-0.3, 0.3)


def compute_contrastive_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """Return CLIP's loss of logits (B, U) with several positives of equal weight, `fits` (B, U) bool."""
    loss = logits.new_zeros(())
    for scores, target in ((logits, fits.float()), (logits.T, fits.T.float())):
        target = target / target.sum(dim=1, keepdim=True)
        loss = loss - (target * F.log_softmax(scores, dim=1)).sum(dim=1).mean() / 2
    return loss


@torch.no_grad()
def score_zero_shot(
    model: open_clip.CLIP, captions: Captions, images: Tensor, labels: Tensor, names: Sequence[str]
) -> float:
    model.eval()
    text = captions.encode(model, [TEMPLATE.format(name) for name in names])
    side = model.visual.image_size[0]
    hits = [
        (model.encode_image(normalise_images(x, side)) @ text.T).argmax(1) == y
        for x, y in zip(images.split(200), labels.split(200), strict=True)
    ]
    model.train()
    return torch.cat(hits).float().mean().item()


def save_model(model: open_clip.CLIP, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("open_clip_config.json", "bytes.txt.gz"):
        if folder != MINI:
            shutil.copy(MINI / name, folder / name)
    state = {k: v.half().contiguous() for k, v in resize_model(model, 64).state_dict().items()}
    save_file(state, folder / "partial.safetensors")
    (folder / "partial.safetensors").chmod(0o644)
    (folder / "partial.safetensors").replace(folder / "open_clip_model.safetensors")


def make_optimizers(model: open_clip.CLIP, linear: nn.Linear, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, which learn twice as fast with it, and AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if "resblocks" in name and p.ndim == 2]
    rest = [p for name, p in named.items() if name not in matrices]
    return [
        torch.optim.Muon([named[name] for name in matrices], lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*rest, *linear.parameters()], lr=lr / 2, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


class Probe:
    """Zero-shot accuracies on images that training never sees."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.world = World(*map(torch.from_numpy, draw_world(min(480, args.images), args.seed, "held out")))
        self.shapes = []
        for env in build():
            chosen = range(0, len(env), 5)
            images = torch.stack([torch.from_numpy(np.array(env[i])) for i in chosen]).permute(0, 3, 1, 2)
            self.shapes.append((images, torch.from_numpy(env.labels[::5])))

    def __call__(self, model: open_clip.CLIP, captions: Captions) -> str:
        world = score_zero_shot(model, captions, self.world.images, self.world.meanings[:, 0], THINGS)
        shapes = [score_zero_shot(model, captions, images, labels, CLASS_NAMES) for images, labels in self.shapes]
        parts = " ".join(f"{env} {value:.3f}" for env, value in zip(ENVIRONMENTS, shapes, strict=True))
        scale = model.logit_scale.exp().item()
        return f"zero-shot: world {world:.3f}; ShapesDG {np.mean(shapes):.3f} ({parts}); scale {scale:.1f}"


class Phase(NamedTuple):
    """A part of the training."""

    side: int  # height and width of the images
    steps: int
    batch_size: int
    lr: float
    contrast: float  # weight of the contrastive loss
    named: float  # weight of the loss of things and styles


def train_phase(
    model: open_clip.CLIP, linear: nn.Linear, world: World, phase: Phase, probe: Probe, args: argparse.Namespace
) -> None:
    """Train for one phase; after a warm-up the learning rate falls linearly."""
    captions, side = Captions(), phase.side
    optimizers = make_optimizers(model, linear, phase.lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / min(100, phase.steps), 1.02 - t / phase.steps))
        for o in optimizers
    ]
    hits: list[float] = []
    for step in (bar := tqdm(range(phase.steps), desc=f"{side} px", mininterval=10)):
        random = rng(args.seed, "batch", *phase, step)
        index = torch.from_numpy(random.integers(len(world.images), size=phase.batch_size))
        meanings = world.meanings[index]
        features = model.encode_image(augment_images(normalise_images(world.images[index], side)))
        things, styles = linear(features).split([len(THINGS), len(STYLES)], dim=1)
        loss = phase.named * (F.cross_entropy(things, meanings[:, 0]) + F.cross_entropy(styles, meanings[:, 1]))
        if phase.contrast:
            pairs = [draw_caption(random, *m) for m in meanings.tolist()]
            claims = dict(pairs)
            texts, claimed = list(claims), torch.tensor(list(claims.values()))
            fits = ((claimed == ANY) | (claimed == meanings[:, None])).all(dim=2)
            fits[torch.arange(len(index)), torch.tensor([texts.index(text) for text, _ in pairs])] = True
            logits = model.logit_scale.exp() * F.normalize(features, dim=-1) @ captions.encode(model, texts).T
            loss = loss + phase.contrast * compute_contrastive_loss(logits, fits)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))

        hits.append((things.argmax(1) == meanings[:, 0]).float().mean().item())
        if step % 50 == 0:
            now, accuracy = time.strftime("%H:%M:%S"), np.mean(hits[-50:])
            bar.write(f"{now} {side} px step {step}: loss {loss.item():.3f} things {accuracy:.3f}")
        if phase.contrast and ((step + 1) % args.eval_freq == 0 or step + 1 == phase.steps):
            bar.write("  " + probe(model, captions))
            save_model(model, args.output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=MINI, help="folder for the model")
    add("--images", type=int, default=36000, help="number of drawn images")
    help = "numbers of steps that train on names, on captions, and on captions at 64 pixels"
    add("--steps", type=int, nargs=3, default=(4500, 500, 800), help=help)
    add("--batch_size", type=int, default=64, help="images of a step; twice as many in the second phase")
    add("--eval_freq", type=int, default=150, help="steps between two evaluations")
    add("--seed", type=int, default=0, help="seed of drawings, initialisation and batches")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums in one order
    world, probe = World(*map(torch.from_numpy, draw_world(args.images, args.seed))), Probe(args)
    model = make_model(32)
    linear = nn.Linear(model.text_projection.shape[1], len(THINGS) + len(STYLES))
    phases = (
        Phase(32, args.steps[0], args.batch_size, 3e-3, contrast=0, named=1),
        Phase(32, args.steps[1], args.batch_size * 2, 2e-3, contrast=1, named=1),
        Phase(64, args.steps[2], args.batch_size, 1.5e-3, contrast=1, named=1),
    )
    for phase in phases:
        if model.visual.image_size[0] != phase.side:
            model = resize_model(model, phase.side)
        train_phase(model, linear, world, phase, probe, args)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
