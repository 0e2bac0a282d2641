"""The images and captions that train the embedded CLIP: wider than ShapesDG, with independent colours."""

from typing import Any

import numpy as np
from tqdm import tqdm

from domainbed_hp.datasets.shapes.drawings import HUES, MAKERS, SIDE, Look, draw_thing
from domainbed_hp.seeds import rng

THINGS, HUE_NAMES = tuple(MAKERS), tuple(HUES)
PAINTS_OF = {
    "photo": "photo",
    "painting": "painting",
    "cartoon": "cartoon",
    "sketch": "sketch",
    "silhouette": "silhouette",
    "blueprint": "blueprint",
    "chalk drawing": "chalk",
    "pixel art": "pixels",
}
STYLES = tuple(PAINTS_OF)  # names in captions
COLOURFUL, BY_HAND = ("photo", "painting", "cartoon", "pixel art"), ("sketch", "chalk drawing")

PLAIN: dict[str, Any] = dict(size=(0.6, 0.9), angle=12, stretch=0.15, clutter=1, grain=(0, 0.03), line=(1.0, 2.0))
WIDE: dict[str, Any] = dict(size=(0.35, 0.9), angle=30, stretch=0.25, clutter=5, grain=(0, 0.1), line=(0.8, 2.4))
PLAIN_SHARE = 0.5  # fraction of the images in the ranges PLAIN: without an easy half, learning starts slowly

WRONG_THING, WRONG_STYLE, VAGUE = 0.04, 0.08, 0.05  # fractions of the captions
ANY = -1  # stands in a meaning (thing, style, hue) for what the caption does not name
LOOSE = ("{}", "a {}", "a picture of a {}.", "a drawing of a {}.", "an image of a {}.", "this is a {}.")


def draw_world(count: int, *key: object) -> tuple[np.ndarray, np.ndarray]:
    """Draw images (N, 3, 64, 64) uint8 and their meanings (N, 3): thing, style, hue, all independent of one another."""
    images = np.empty((count, 3, SIDE, SIDE), np.uint8)
    meanings = np.empty((count, 3), np.int64)
    for i in tqdm(range(count), desc="draw", mininterval=5):
        random = rng("world", *key, i)
        thing, style, hue = meanings[i] = random.integers((len(THINGS), len(STYLES), len(HUES)))
        ranges = PLAIN if random.random() < PLAIN_SHARE else WIDE
        look = Look(PAINTS_OF[STYLES[style]], wobble=0.8 if STYLES[style] in BY_HAND else 0.0, **ranges)
        image = draw_thing(random, THINGS[thing], look, HUES[HUE_NAMES[hue]], random.random())
        images[i] = image.transpose(2, 0, 1)
    return images, meanings


def draw_caption(random: np.random.Generator, thing: int, style: int, hue: int) -> tuple[str, tuple[int, int, int]]:
    """Return a caption and the meaning that it claims; a few claims are wrong, a few are almost empty."""
    if random.random() < WRONG_THING:
        thing = int(random.integers(len(THINGS)))
    if random.random() < WRONG_STYLE:
        style = int(random.integers(len(STYLES)))
    name, manner = THINGS[thing], STYLES[style]
    if random.random() < VAGUE:
        return f"a {manner} of something.", (ANY, style, ANY)
    if random.random() < 0.5:
        return f"a {manner} of a {name}.", (thing, style, ANY)
    if manner in COLOURFUL and random.random() < 0.4:
        return f"a {HUE_NAMES[hue]} {name}", (thing, ANY, hue)
    return LOOSE[random.integers(len(LOOSE))].format(name), (thing, ANY, ANY)
