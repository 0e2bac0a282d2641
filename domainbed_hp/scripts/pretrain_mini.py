"""Make the embedded CLIP, `networks/mini`, from scratch: draw a world of captioned images, then train contrastively.

The image tower first learns to name things and styles; then both towers learn from captions. Most steps see the images
at half the side, a quarter of the tokens; the position embedding is then interpolated.
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

from domainbed_hp.datasets.shapes.captioned_world import ANY, STYLES, THINGS, caption, draw_world
from domainbed_hp.datasets.shapes.shapes_dg import CLASS_NAMES, ENVIRONMENTS, build
from domainbed_hp.scripts import run
from domainbed_hp.seeds import rng

MINI = Path(__file__).parents[1] / "networks" / "mini"
TEMPLATE = "a photo of a {}."


class World(NamedTuple):
    images: Tensor  # (N, 3, 64, 64) uint8
    meanings: Tensor  # (N, 3) int64: thing, style, hue


def new_model(side: int) -> open_clip.CLIP:
    cfg = json.loads((MINI / "open_clip_config.json").read_text())["model_cfg"]
    return open_clip.CLIP(cfg["embed_dim"], cfg["vision_cfg"] | {"image_size": side}, cfg["text_cfg"])


def resized(model: open_clip.CLIP, side: int) -> open_clip.CLIP:
    """The same weights for images of another side."""
    other, state = new_model(side), model.state_dict()
    resize_pos_embed(state, other)
    other.load_state_dict(state)
    return other


class Captions:
    """Token ids of captions, remembered; `encode` leaves out the padding, which causal attention makes exact."""

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


def pixels(images: Tensor, side: int) -> Tensor:
    """uint8 to CLIP-normalised floats, averaged down to `side`."""
    x = F.adaptive_avg_pool2d(images.float() / 255, side)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (x - mean) / std


def augmented(x: Tensor) -> Tensor:
    """Each image moved, scaled and perhaps flipped; contrast, brightness and colour balance changed."""
    count = len(x)
    scale = torch.empty(count, 1).uniform_(0.85, 1.1).repeat(1, 2)
    scale[:, 0] *= torch.randint(0, 2, (count,)) * 2 - 1
    theta = torch.cat([torch.diag_embed(scale), torch.empty(count, 2, 1).uniform_(-0.1, 0.1)], dim=2)
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    gain = torch.empty(count, 1, 1, 1).uniform_(0.7, 1.3) * torch.empty(count, 3, 1, 1).uniform_(0.9, 1.1)
    return x * gain + torch.empty(count, 1, 1, 1).uniform_(-0.3, 0.3)


def contrastive_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """CLIP's loss with several positives: logits (B, U), fits (B, U) bool, the target spread evenly over what fits."""
    loss = logits.new_zeros(())
    for scores, target in ((logits, fits.float()), (logits.T, fits.T.float())):
        share = target / target.sum(dim=1, keepdim=True)
        loss = loss - (share * F.log_softmax(scores, dim=1)).sum(dim=1).mean() / 2
    return loss


@torch.no_grad()
def zero_shot(model: open_clip.CLIP, captions: Captions, images: Tensor, labels: Tensor, names: Sequence[str]) -> float:
    model.eval()
    text = captions.encode(model, [TEMPLATE.format(name) for name in names])
    side = model.visual.image_size[0]
    hits = [
        (model.encode_image(pixels(x, side)) @ text.T).argmax(1) == y
        for x, y in zip(images.split(200), labels.split(200), strict=True)
    ]
    model.train()
    return torch.cat(hits).float().mean().item()


def save(model: open_clip.CLIP, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("open_clip_config.json", "bytes.txt.gz"):
        if folder != MINI:
            shutil.copy(MINI / name, folder / name)
    state = {k: v.half().contiguous() for k, v in resized(model, 64).state_dict().items()}
    save_file(state, folder / "partial.safetensors")
    (folder / "partial.safetensors").chmod(0o644)
    (folder / "partial.safetensors").replace(folder / "open_clip_model.safetensors")


def optimizers(model: open_clip.CLIP, linear: nn.Linear, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which learn twice as fast by it; AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if "resblocks" in name and p.ndim == 2]
    rest = [p for name, p in named.items() if name not in matrices]
    return [
        torch.optim.Muon([named[name] for name in matrices], lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*rest, *linear.parameters()], lr=lr / 2, weight_decay=0.05, betas=(0.9, 0.98)),
    ]


class Probe:
    """Zero-shot on images that training never sees."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.world = World(*map(torch.from_numpy, draw_world(min(480, args.images), args.seed, "held out")))
        self.shapes = []
        for env in build():
            some = range(0, len(env), 5)
            images = torch.stack([torch.from_numpy(np.array(env[i])) for i in some]).permute(0, 3, 1, 2)
            self.shapes.append((images, torch.from_numpy(env.labels[::5])))

    def __call__(self, model: open_clip.CLIP, captions: Captions) -> str:
        world = zero_shot(model, captions, self.world.images, self.world.meanings[:, 0], THINGS)
        shapes = [zero_shot(model, captions, *both, CLASS_NAMES) for both in self.shapes]
        parts = " ".join(f"{env} {value:.3f}" for env, value in zip(ENVIRONMENTS, shapes, strict=True))
        scale = model.logit_scale.exp().item()
        return f"zero-shot: world {world:.3f}; ShapesDG {np.mean(shapes):.3f} ({parts}); scale {scale:.1f}"


class Phase(NamedTuple):
    side: int
    steps: int
    batch_size: int
    lr: float
    contrast: float  # weights of the two losses
    named: float


def train(
    model: open_clip.CLIP, linear: nn.Linear, world: World, phase: Phase, probe: Probe, args: argparse.Namespace
) -> None:
    """One phase: warm-up, then the rate falls linearly."""
    captions, side = Captions(), phase.side
    both = optimizers(model, linear, phase.lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / min(100, phase.steps), 1.02 - t / phase.steps))
        for o in both
    ]
    hits: list[float] = []
    for step in (bar := tqdm(range(phase.steps), desc=f"{side} px", mininterval=10)):
        random = rng(args.seed, "batch", *phase, step)
        index = torch.from_numpy(random.integers(len(world.images), size=phase.batch_size))
        meanings = world.meanings[index]
        features = model.encode_image(augmented(pixels(world.images[index], side)))
        things, styles = linear(features).split([len(THINGS), len(STYLES)], dim=1)
        loss = phase.named * (F.cross_entropy(things, meanings[:, 0]) + F.cross_entropy(styles, meanings[:, 1]))
        if phase.contrast:
            pairs = [caption(random, *m) for m in meanings.tolist()]
            claims = dict(pairs)
            texts, claimed = list(claims), torch.tensor(list(claims.values()))
            fits = ((claimed == ANY) | (claimed == meanings[:, None])).all(dim=2)
            fits[torch.arange(len(index)), torch.tensor([texts.index(text) for text, _ in pairs])] = True
            logits = model.logit_scale.exp() * F.normalize(features, dim=-1) @ captions.encode(model, texts).T
            loss = loss + phase.contrast * contrastive_loss(logits, fits)
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))

        hits.append((things.argmax(1) == meanings[:, 0]).float().mean().item())
        if step % 50 == 0:
            now, share = time.strftime("%H:%M:%S"), np.mean(hits[-50:])
            bar.write(f"{now} {side} px step {step}: loss {loss.item():.3f} things {share:.3f}")
        if phase.contrast and ((step + 1) % args.eval_freq == 0 or step + 1 == phase.steps):
            bar.write("  " + probe(model, captions))
            save(model, args.output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=MINI)
    parser.add_argument("--images", type=int, default=36000, help="size of the world")
    parser.add_argument(
        "--steps", type=int, nargs=3, default=(4500, 500, 800), help="names, captions, captions at 64 pixels"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--eval_freq", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums in one order
    world, probe = World(*map(torch.from_numpy, draw_world(args.images, args.seed))), Probe(args)
    model = new_model(32)
    linear = nn.Linear(model.text_projection.shape[1], len(THINGS) + len(STYLES))
    phases = (
        Phase(32, args.steps[0], args.batch_size, 3e-3, contrast=0, named=1),
        Phase(32, args.steps[1], args.batch_size * 2, 2e-3, contrast=1, named=1),
        Phase(64, args.steps[2], args.batch_size, 1.5e-3, contrast=1, named=1),
    )
    for phase in phases:
        if model.visual.image_size[0] != phase.side:
            model = resized(model, phase.side)
        train(model, linear, world, phase, probe, args)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
