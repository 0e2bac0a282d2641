"""Draw a thing in a look: polygons, rasterised by Pillow at three times the size and painted by numpy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from domainbed_hp.datasets.shapes.polygons import DARK, GROUND, LIGHT, MAIN, MAKERS, SECOND, Part, Polygon, oval, points

SIDE = 64  # height and width of an image, pixels
OVER = 3  # pixels of the fine grid in a pixel of the image, per axis
HUES = {"red": 0.0, "orange": 0.075, "yellow": 0.15, "lime": 0.25, "green": 0.36, "teal": 0.48,
        "blue": 0.6, "indigo": 0.7, "purple": 0.79, "pink": 0.91}  # fmt: skip

Array = NDArray[Any]  # float32 in [0, 1], or nearly
Rng = np.random.Generator
Range = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """The ranges from which the images of one environment, or of one style of the pretraining world, are drawn."""

    paint: str  # key of PAINTS
    size: Range = (0.55, 0.8)  # half the extent of the thing, in half images
    angle: float = 15  # largest rotation, degrees
    stretch: float = 0.15  # largest relative change of the aspect
    line: Range = (1.0, 1.6)  # width of an outline, pixels
    wobble: float = 0.0  # largest unsteadiness of the hand, pixels
    clutter: int = 2  # largest number of scraps behind the thing
    grain: Range = (0.0, 0.04)  # standard deviation of the noise of the sensor, the paper or the canvas
    dark_ground: float = 0.3  # probability of a dark ground


@dataclass(frozen=True)
class Scene:
    """A drawn image before it is painted: the tone of every pixel, and the colours of the tones."""

    rng: Rng
    cover: Array  # (SIDE, SIDE, 5): fraction of the pixel that every tone covers, the ground first
    ink: Array  # (SIDE, SIDE): fraction that outlines cover
    ground: Array  # (3,)
    fills: Array  # (4, 3): main, second, dark, light

    @property
    def mask(self) -> Array:
        """Return the fraction of every pixel that is not ground."""
        return np.asarray(1 - self.cover[..., GROUND])

    def fill_flat(self) -> Array:
        """Return the image with every tone in its plain colour, without outlines."""
        colours: Array = self.cover @ np.concatenate([self.ground[None], self.fills])
        return colours


def draw_thing(rng: Rng, thing: str, look: Look, hue: float, ground_hue: float) -> NDArray[np.uint8]:
    """Return an image (SIDE, SIDE, 3) of `thing`; the hues of thing and ground are in [0, 1)."""
    cover, ink = rasterise_parts(
        rng, [*make_scraps(rng, look.clutter), *pose_parts(rng, MAKERS[thing](rng.uniform), look)], look
    )
    on_dark = rng.random() < look.dark_ground
    ground = hsv_to_rgb(ground_hue, rng.uniform(0.3, 0.7), rng.uniform(0.18, 0.4) if on_dark else rng.uniform(0.75, 1))
    main = hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.7, 1) if on_dark else rng.uniform(0.4, 0.8))
    second = hsv_to_rgb(hue + rng.uniform(0.25, 0.75), rng.uniform(0.5, 1), rng.uniform(0.5, 0.9))
    fills = np.stack([main, second, main * 0.3, 0.3 * main + 0.7])
    image = PAINTS[look.paint](Scene(rng, cover, ink, ground, fills))
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(*look.grain)
    return np.asarray(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def hsv_to_rgb(hue: float, saturation: float, value: float) -> Array:
    k = (np.array([5, 3, 1]) + hue % 1 * 6) % 6
    return np.asarray(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1), np.float32)


def pose_parts(rng: Rng, parts: list[Part], look: Look) -> list[Part]:
    """Turn, stretch, flip, scale and move the parts, and return them in pixels of the fine grid."""
    size, angle = rng.uniform(*look.size), np.radians(rng.uniform(-look.angle, look.angle))
    stretch = 1 + rng.uniform(-look.stretch, look.stretch)
    room = max(0.0, 0.95 - size)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = np.diag([stretch * rng.choice([-1, 1]), 1 / stretch]) @ turn * size
    move = rng.uniform(-room, room, 2)
    return [(tone, to_pixels(polygon @ matrix + move)) for tone, polygon in parts]


def make_scraps(rng: Rng, most: int) -> list[Part]:
    """Return bars, discs and triangles without a meaning, at most `most` of them."""
    parts: list[Part] = []
    for _ in range(rng.integers(0, most + 1)):
        (w, h), centre = rng.uniform(0.05, 0.2, 2), rng.uniform(-1, 1, 2)
        form = [oval(0, 0, w, h), points(-w, -h, w, -h, w, h, -w, h), points(-w, h, w, h, 0, -h)][rng.integers(3)]
        parts.append((int(rng.integers(MAIN, LIGHT + 1)), to_pixels(form + centre)))
    return parts


def to_pixels(polygon: Polygon) -> Polygon:
    return (polygon + 1) * (SIDE * OVER / 2)


def rasterise_parts(rng: Rng, parts: list[Part], look: Look) -> tuple[Array, Array]:
    """Return `Scene.cover` and `Scene.ink`; a part hides the fill and the outline of earlier parts."""
    tones, ink = (Image.new("L", (SIDE * OVER, SIDE * OVER)) for _ in range(2))
    on_tones, on_ink = ImageDraw.Draw(tones), ImageDraw.Draw(ink)
    width, wobble = max(1, round(rng.uniform(*look.line) * OVER)), rng.uniform(0, look.wobble) * OVER
    for tone, polygon in parts:
        path = shake_outline(rng, polygon, wobble) if wobble else polygon
        xy = [tuple(p) for p in path.tolist()]
        on_tones.polygon(xy, fill=tone)
        on_ink.polygon(xy, fill=0)
        on_ink.line([*xy, xy[0]], fill=255, width=width, joint="curve")
    layers = [tones.point([255 * (value == tone) for value in range(256)]) for tone in range(5)]
    small = [np.asarray(layer.reduce(OVER), np.float32) / 255 for layer in [*layers, ink]]
    return np.stack(small[:5], axis=-1), small[5]


def shake_outline(rng: Rng, polygon: Polygon, wobble: float) -> Polygon:
    """Add points to long edges, then move every point a little."""
    after = np.roll(polygon, -1, axis=0)
    count = np.maximum(1, np.hypot(*(after - polygon).T) // (SIDE * OVER / 10)).astype(int)
    path = np.concatenate(
        [a + (b - a) * (np.arange(n) / n)[:, None] for a, b, n in zip(polygon, after, count, strict=True)]
    )
    return path + rng.normal(0, wobble, path.shape)


def make_noise(rng: Rng, rows: int, columns: int | None = None, angle: float = 0) -> Array:
    """Return smooth noise in [0, 1] of `rows` times `columns` cells, turned by `angle` degrees."""
    coarse = Image.fromarray(rng.random((rows, columns or rows), dtype=np.float32))
    if not angle:
        return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    wide = coarse.resize((SIDE * 3 // 2, SIDE * 3 // 2), Image.Resampling.BICUBIC).rotate(
        angle, Image.Resampling.BILINEAR
    )
    return np.asarray(wide.crop((SIDE // 4, SIDE // 4, SIDE // 4 + SIDE, SIDE // 4 + SIDE)))


def blur(mask: Array, radius: int) -> Array:
    """Average over squares of `radius` pixels, and interpolate between them."""
    small = Image.fromarray(mask).resize((SIDE // radius, SIDE // radius), Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def paint_photo(scene: Scene) -> Array:
    """Paint light from one side on a rounded thing, its shadow, and a ground in many brightnesses."""
    rng, mask = scene.rng, scene.mask
    weave = make_noise(rng, int(rng.integers(4, 9))) * 0.6 + make_noise(rng, int(rng.integers(16, 40))) * 0.4
    ground = scene.ground * (0.55 + 0.8 * weave[..., None])
    dx, dy = rng.choice([-1, 1]) * rng.uniform(0.5, 1), rng.uniform(0.2, 1)
    cast = blur(np.roll(mask, (round(5 * dy), round(5 * dx)), (0, 1)), 4)
    ground = ground * (1 - 0.55 * np.clip(cast, 0, 1)[..., None])
    slope = np.gradient(blur(mask, 8))
    light = np.clip(0.95 + 4 * (slope[1] * dx + slope[0] * dy), 0.35, 1.5) + 0.2 * (make_noise(rng, 12) - 0.5)
    thing = scene.cover[..., MAIN:] @ scene.fills * light[..., None]
    exposed: Array = np.clip(ground * scene.cover[..., :1] + thing, 0, 1) ** rng.uniform(0.75, 1.3)
    return exposed


def paint_painting(scene: Scene) -> Array:
    """Paint colours dragged along brush strokes, in a few levels, on warm canvas."""
    rng, angle = scene.rng, float(scene.rng.uniform(10, 170))
    fine = int(rng.integers(18, 30))
    strokes = np.stack([make_noise(rng, 5, fine, angle) for _ in range(3)], axis=-1) - 0.5
    rows, columns = np.indices((SIDE, SIDE))
    drag = rng.uniform(2, 5)
    at = [np.clip(i + drag * strokes[..., k], 0, SIDE - 1).astype(int) for k, i in enumerate((rows, columns))]
    image = scene.fill_flat()[at[0], at[1]] + 0.25 * strokes + 0.2 * (make_noise(rng, 4)[..., None] - 0.5)
    levels = rng.integers(6, 12)
    warm: Array = np.round(image * levels) / levels * np.array([1, 0.95, 0.82], np.float32)
    return warm


def paint_cartoon(scene: Scene) -> Array:
    """Paint flat saturated colours inside black outlines, and a flat ground with a horizon."""
    horizon = int(scene.rng.integers(SIDE // 2, SIDE + 20))
    image = scene.fill_flat()
    image[horizon:] = image[horizon:] * (1 - 0.25 * scene.cover[horizon:, :, :1])
    return add_ink(image, scene.ink, 0.05)


def paint_sketch(scene: Scene) -> Array:
    """Draw grey lines on paper, with hatching where the thing is dark."""
    rng = scene.rng
    paper = (0.72 + 0.28 * scene.ground / scene.ground.max()) * (0.92 + 0.12 * make_noise(rng, 24)[..., None])
    rows, columns = np.indices((SIDE, SIDE))
    hatch = (rows + columns * rng.choice([-1, 1])) % int(rng.integers(3, 6)) == 0
    dark = scene.cover[..., DARK] + scene.cover[..., SECOND] * (rng.random() < 0.5)
    lines = np.maximum(scene.ink * (0.6 + 0.5 * make_noise(rng, 20)), 0.5 * hatch * dark)
    return add_ink(paper, lines, rng.uniform(0.1, 0.35))


def paint_silhouette(scene: Scene) -> Array:
    """Paint one dark shape in front of a sky that fades."""
    sky = scene.ground * np.linspace(scene.rng.uniform(0.6, 1), 1, SIDE, dtype=np.float32)[:, None, None]
    solid = scene.cover[..., [MAIN, SECOND, DARK]].sum(-1) + 0.25 * scene.cover[..., LIGHT]
    return add_ink(np.maximum(sky, 0.35), solid, scene.rng.uniform(0, 0.2))


def paint_blueprint(scene: Scene) -> Array:
    """Draw white lines on a blue grid."""
    paper = np.broadcast_to(
        hsv_to_rgb(scene.rng.uniform(0.55, 0.68), 0.8, scene.rng.uniform(0.35, 0.7)), (SIDE, SIDE, 3)
    ).copy()
    step = int(scene.rng.integers(6, 12))
    paper[::step] += 0.12
    paper[:, ::step] += 0.12
    return add_ink(paper, scene.ink, 0.95)


def paint_chalk(scene: Scene) -> Array:
    """Draw crumbling light lines on a smudged board."""
    rng = scene.rng
    board = hsv_to_rgb(rng.uniform(0.3, 0.6), 0.3, rng.uniform(0.12, 0.3)) + 0.15 * make_noise(rng, 6)[..., None]
    crumbs = np.clip(scene.ink + 0.35 * scene.cover[..., LIGHT] + 0.15 * scene.mask, 0, 1) * (
        rng.random((SIDE, SIDE)) < 0.8
    )
    return add_ink(board, crumbs, 0.6 + 0.4 * scene.fills[0])


def paint_pixels(scene: Scene) -> Array:
    """Paint large square pixels in few colours."""
    count = int(scene.rng.integers(18, 26))
    image = Image.fromarray(
        (np.clip(add_ink(scene.fill_flat(), scene.ink * 0.6, 0.1), 0, 1) * 5 + 0.5).astype(np.uint8) * 51
    )
    small = image.resize((count, count), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.asarray(small, np.float32) / 255


def add_ink(image: Array, ink: Array, colour: float | Array) -> Array:
    """Mix `colour` into the image where there is ink."""
    return image + (colour - image) * np.minimum(ink, 1)[..., None]


PAINTS: dict[str, Callable[[Scene], Array]] = {
    "photo": paint_photo,
    "painting": paint_painting,
    "cartoon": paint_cartoon,
    "sketch": paint_sketch,
    "silhouette": paint_silhouette,
    "blueprint": paint_blueprint,
    "chalk": paint_chalk,
    "pixels": paint_pixels,
}
