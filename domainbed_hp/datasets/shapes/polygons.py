"""Twenty-four things as polygons, the nouns of ShapesDG and of the world that the embedded CLIP was trained in.

A thing is a list of parts (tone, polygon), painted in this order. A polygon is (n, 2) in [-1, 1], x to the right and y
down. The function that makes a thing has the thing's name. It takes `u(low, high)`, a uniform draw, so that no two
things of a kind have the same proportions.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

GROUND, MAIN, SECOND, DARK, LIGHT = range(5)
"""Tones of the parts."""

Polygon = NDArray[np.float64]
Part = tuple[int, Polygon]
Uniform = Callable[[float, float], float]


def points(*xy: float) -> Polygon:
    """Return the polygon with the corners (x, y), (x, y), ..."""
    return np.asarray(xy, dtype=np.float64).reshape(-1, 2)


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """Return the rectangle between two corners."""
    return points(x0, y0, x1, y0, x1, y1, x0, y1)


def oval(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, turn: float = 0) -> Polygon:
    """Return an ellipse, or its slice between two angles in degrees (0: right, 90: down), turned about its centre."""
    a = np.radians(np.linspace(start, end, 25))
    t = np.radians(turn)
    px, py = rx * np.cos(a), ry * np.sin(a)
    return np.stack([x + px * np.cos(t) - py * np.sin(t), y + px * np.sin(t) + py * np.cos(t)], axis=1)


def mirror(half: ArrayLike) -> Polygon:
    """Return the outline with the given right half, from top to bottom, and its mirror image on the left."""
    right = np.asarray(half, dtype=np.float64)
    return np.concatenate([right, right[::-1] * [-1, 1]])


def bell(u: Uniform) -> list[Part]:
    w = u(0.6, 0.8)
    body = mirror([(0.12, -0.75), (0.4, -0.55), (0.5 * w + 0.05, 0), (w * 0.8, 0.35), (w, 0.5)])
    return [
        (DARK, oval(0, 0.62, 0.2, 0.2)),
        (SECOND, oval(0, -0.82, 0.14, 0.14)),
        (MAIN, body),
        (SECOND, box(-w * 0.8, 0.2, w * 0.8, 0.33)),
    ]


def boat(u: Uniform) -> list[Part]:
    m, h = u(-0.15, 0.1), u(0.75, 0.95)
    hull = points(-0.95, 0.3, 0.95, 0.3, 0.6, 0.8, -0.6, 0.8)
    return [
        (DARK, box(m - 0.05, -h, m + 0.05, 0.3)),
        (LIGHT, points(m + 0.1, -h, m + 0.1, 0.2, u(0.7, 0.9), 0.2)),
        (SECOND, points(m - 0.1, -h + 0.2, m - 0.1, 0.2, u(-0.8, -0.6), 0.2)),
        (MAIN, hull),
    ]


def bottle(u: Uniform) -> list[Part]:
    w, n = u(0.3, 0.42), u(0.12, 0.17)
    body = mirror([(n, -0.8), (n, -0.35), (w, -0.1), (w, 0.95)])
    return [(MAIN, body), (DARK, box(-n - 0.04, -0.98, n + 0.04, -0.75)), (LIGHT, box(-w, 0.15, w, u(0.55, 0.7)))]


def butterfly(u: Uniform) -> list[Part]:
    r, parts = u(0.4, 0.5), []
    for s in (-1, 1):
        parts += [
            (SECOND, oval(s * 0.4, 0.4, 0.34, 0.4, turn=s * 30)),
            (MAIN, oval(s * 0.5, -0.3, r, 0.42, turn=s * -35)),
            (LIGHT, oval(s * 0.52, -0.32, 0.16, 0.16)),
            (DARK, points(0, -0.5, s * 0.25, -0.95, s * 0.32, -0.9)),
        ]
    return [*parts, (DARK, oval(0, 0, 0.1, 0.65))]


def cactus(u: Uniform) -> list[Part]:
    w, a, b = u(0.2, 0.26), u(-0.1, 0.15), u(-0.25, 0.05)
    arms = [
        (MAIN, box(-0.65, a, 0, a + 0.25)),
        (MAIN, oval(-0.65, a - 0.1, 0.14, 0.35)),
        (MAIN, box(0, b, 0.65, b + 0.25)),
        (MAIN, oval(0.65, b - 0.1, 0.14, 0.35)),
    ]
    pot = points(-0.45, 0.55, 0.45, 0.55, 0.32, 0.98, -0.32, 0.98)
    return [*arms, (MAIN, np.concatenate([oval(0, -0.7, w, 0.28, 180, 360), points(w, 0.6, -w, 0.6)])), (SECOND, pot)]


def car(u: Uniform) -> list[Part]:
    f, t = u(0.35, 0.5), u(-0.5, -0.38)
    cabin = points(-0.6, 0, -f, t, f - 0.05, t, 0.6, 0)
    body = points(-0.98, 0.02, 0.75, 0.02, 0.98, 0.15, 0.98, 0.45, -0.98, 0.45)
    glass = points(-0.48, 0, -f + 0.04, t + 0.1, f - 0.09, t + 0.1, 0.46, 0)
    wheels = [(tone, oval(x, 0.45, r, r)) for x in (-0.55, 0.55) for tone, r in ((DARK, 0.25), (LIGHT, 0.11))]
    return [(MAIN, cabin), (LIGHT, glass), (MAIN, box(-0.06, t + 0.05, 0.04, 0)), (MAIN, body), *wheels]


def clock(u: Uniform) -> list[Part]:
    r, a, b = u(0.75, 0.85), np.radians(u(0, 360)), np.radians(u(0, 360))
    hands = []
    for t, n in ((a, 0.6), (b, 0.42)):
        cos, sin = np.cos(t), np.sin(t)
        hands.append((DARK, points(-0.07 * sin, 0.07 * cos, 0.07 * sin, -0.07 * cos, n * cos, n * sin)))
    ticks = [(DARK, oval(0.55 * np.cos(t), 0.55 * np.sin(t), 0.06, 0.06)) for t in np.arange(4) * np.pi / 2]
    feet = [(SECOND, points(s * 0.5, 0.6, s * 0.7, 0.95, s * 0.3, 0.75)) for s in (-1, 1)]
    return [*feet, (MAIN, oval(0, 0, r, r)), (LIGHT, oval(0, 0, r - 0.18, r - 0.18)), *ticks, *hands]


def crown(u: Uniform) -> list[Part]:
    h, d = u(0.5, 0.65), u(0.0, 0.15)
    body = points(-0.8, 0.6, -0.95, -h + 0.1, -0.45, d, 0, -h - 0.2, 0.45, d, 0.95, -h + 0.1, 0.8, 0.6)
    balls = [(SECOND, oval(x, y, 0.12, 0.12)) for x, y in ((-0.95, -h + 0.1), (0, -h - 0.2), (0.95, -h + 0.1))]
    return [
        (MAIN, body),
        *balls,
        (SECOND, box(-0.8, 0.4, 0.8, 0.65)),
        *[(LIGHT, oval(x, 0.2, 0.1, 0.12)) for x in (-0.4, 0, 0.4)],
    ]


def cup(u: Uniform) -> list[Part]:
    w, b, r = u(0.5, 0.6), u(0.38, 0.48), u(0.3, 0.36)
    body = points(-w - 0.2, -0.55, w - 0.2, -0.55, b - 0.2, 0.7, -b - 0.2, 0.7)
    return [
        (MAIN, oval(w - 0.2, 0.0, r + 0.1, r + 0.06)),
        (GROUND, oval(w - 0.22, 0.0, r - 0.08, r - 0.12)),
        (MAIN, body),
        (SECOND, points(-w - 0.16, -0.2, w - 0.24, -0.2, w - 0.28, 0.15, -w - 0.12, 0.15)),
        (LIGHT, oval(-0.2, -0.55, w, 0.14)),
    ]


def fish(u: Uniform) -> list[Part]:
    h, t = u(0.36, 0.5), u(0.35, 0.5)
    return [
        (SECOND, points(0.4, 0, 0.98, -t, 0.82, 0, 0.98, t)),
        (SECOND, points(-0.2, -h * 0.8, 0.25, -h - 0.25, 0.3, -h * 0.6)),
        (MAIN, oval(-0.15, 0, 0.75, h)),
        (SECOND, points(-0.1, 0.0, 0.25, -0.14, 0.25, 0.2)),
        (LIGHT, oval(-0.58, -0.1, 0.12, 0.12)),
        (DARK, oval(-0.6, -0.1, 0.06, 0.06)),
    ]


def flower(u: Uniform) -> list[Part]:
    n, r, a = int(u(5, 9)), u(0.2, 0.26), u(0, 1)
    turns = 2 * np.pi * (np.arange(n) + a) / n
    petals = [
        (MAIN, oval(0.36 * np.cos(t), -0.35 + 0.36 * np.sin(t), 0.27, r, turn=float(np.degrees(t)))) for t in turns
    ]
    return [
        (DARK, box(-0.05, -0.2, 0.05, 0.98)),
        (DARK, oval(0.25, 0.6, 0.26, 0.1, turn=-35)),
        (DARK, oval(-0.25, 0.72, 0.26, 0.1, turn=35)),
        *petals,
        (SECOND, oval(0, -0.35, 0.2, 0.2)),
    ]


def guitar(u: Uniform) -> list[Part]:
    w = u(0.44, 0.52)
    return [
        (DARK, box(-0.07, -0.8, 0.07, 0.2)), (SECOND, box(-0.14, -0.98, 0.14, -0.72)),
        (MAIN, oval(0, 0.12, w * 0.72, 0.3)), (MAIN, oval(0, 0.58, w, 0.4)),
        (MAIN, box(-w * 0.55, 0.12, w * 0.55, 0.5)), (DARK, oval(0, 0.25, 0.14, 0.14)),
        (SECOND, box(-0.2, 0.62, 0.2, 0.72)),
    ]  # fmt: skip


def heart(u: Uniform) -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 40)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    outline = np.stack([u(0.8, 0.95) * np.sin(t) ** 3, y * u(0.85, 0.95) - 0.05], axis=1)
    return [(MAIN, outline), (LIGHT, oval(-0.42, -0.42, 0.14, 0.2, turn=35))]


def house(u: Uniform) -> list[Part]:
    w, e, d = u(0.6, 0.75), u(-0.2, 0.0), u(-0.3, 0.1)
    return [
        (DARK, box(0.3, -0.8, 0.5, -0.2)),
        (MAIN, box(-w, e, w, 0.85)),
        (SECOND, points(-w - 0.2, e, 0, -0.9, w + 0.2, e)),
        (DARK, box(d, 0.3, d + 0.3, 0.85)),
        (LIGHT, box(-w + 0.1, 0.1, d - 0.05, 0.4)),
        (LIGHT, box(d + 0.36, 0.1, w - 0.06, 0.4)),
    ]


def key(u: Uniform) -> list[Part]:
    r, t = u(0.36, 0.44), u(0.25, 0.4)
    return [
        (MAIN, box(-0.3, -0.1, 0.95, 0.1)),
        (MAIN, box(0.72, 0, 0.92, t)),
        (MAIN, box(0.4, 0, 0.58, t - 0.08)),
        (MAIN, oval(-0.52, 0, r, r)),
        (GROUND, oval(-0.56, 0, r - 0.2, r - 0.2)),
    ]


def lamp(u: Uniform) -> list[Part]:
    w, n = u(0.55, 0.7), u(0.25, 0.35)
    return [
        (DARK, box(-0.06, 0, 0.06, 0.85)),
        (SECOND, oval(0, 0.85, u(0.35, 0.45), 0.13)),
        (MAIN, points(-n, -0.9, n, -0.9, w, 0.05, -w, 0.05)),
        (LIGHT, points(-w, 0.05, w, 0.05, w - 0.04, -0.1, 0.04 - w, -0.1)),
    ]


def leaf(u: Uniform) -> list[Part]:
    x = np.linspace(-1, 1, 15)
    edge = u(0.38, 0.5) * np.cos(x * np.pi / 2) ** 0.8
    blade = np.concatenate([np.stack([x, -edge], 1), np.stack([x[::-1], edge[::-1]], 1)]) * 0.8 + [-0.15, 0]
    veins = [
        (SECOND, points(a, -0.02, a - 0.2, s * 0.22, a - 0.12, s * 0.22, a + 0.08, 0))
        for a in (-0.35, 0, 0.3)
        for s in (-1, 1)
    ]
    return [(MAIN, blade), *veins, (SECOND, points(-0.9, -0.02, 0.95, -0.05, 0.95, 0.05))]


def moon(u: Uniform) -> list[Part]:
    a, r = u(115, 130), u(0.75, 0.95)
    outer = oval(0.1, 0, 0.85, 0.85, 180 - a, 180 + a)
    inner = oval(0.1 + u(0.38, 0.5), 0, r * 0.72, r * 0.72, 262, 98)
    return [
        (MAIN, np.concatenate([outer, inner])),
        (SECOND, oval(-0.5, 0.1, 0.09, 0.09)),
        (SECOND, oval(-0.35, -0.4, 0.07, 0.07)),
    ]


def mushroom(u: Uniform) -> list[Part]:
    w, s = u(0.75, 0.92), u(0.2, 0.3)
    cap = np.concatenate([oval(0, 0.0, w, u(0.75, 0.9), 180, 360), points(w * 0.8, 0.15, -w * 0.8, 0.15)])
    spots = [(LIGHT, oval(x * w, y, 0.13, 0.11)) for x, y in ((-0.5, -0.2), (0.05, -0.5), (0.5, -0.15))]
    return [(SECOND, points(-s, 0, s, 0, s + 0.1, 0.9, -s - 0.1, 0.9)), (MAIN, cap), *spots]


def rocket(u: Uniform) -> list[Part]:
    w = u(0.27, 0.35)
    body = mirror([(0, -0.98), (w * 0.7, -0.6), (w, -0.2), (w * 0.9, 0.5)])
    fins = [(SECOND, points(s * w * 0.8, 0.0, s * 0.68, 0.62, s * w * 0.8, 0.5)) for s in (-1, 1)]
    return [
        (DARK, points(-0.18, 0.5, 0.18, 0.5, 0, u(0.85, 0.98))),
        *fins,
        (MAIN, body),
        (LIGHT, oval(0, -0.2, 0.15, 0.15)),
    ]


def snowman(u: Uniform) -> list[Part]:
    a, b = u(0.38, 0.46), u(0.26, 0.32)
    return [
        (LIGHT, oval(0, 0.52, a + 0.05, a)), (LIGHT, oval(0, -0.12, b + 0.06, b)),
        (LIGHT, oval(0, -0.5, 0.22, 0.22)), (MAIN, box(-0.22, -0.95, 0.22, -0.66)),
        (MAIN, box(-0.35, -0.7, 0.35, -0.6)), (SECOND, points(0, -0.52, 0.3, -0.44, 0, -0.42)),
        *[(DARK, oval(0, y, 0.06, 0.06)) for y in (-0.15, 0.05, 0.4)],
    ]  # fmt: skip


def star(u: Uniform) -> list[Part]:
    t = np.arange(10) * np.pi / 5 - np.pi / 2
    r = np.where(np.arange(10) % 2, u(0.36, 0.48), 0.98)
    return [(MAIN, np.stack([r * np.cos(t), r * np.sin(t)], axis=1))]


def tree(u: Uniform) -> list[Part]:
    trunk = (DARK, box(-0.13, 0.3, 0.13, 0.98))
    if u(0, 1) < 0.5:
        return [
            trunk,
            *[
                (MAIN, points(0, y - 0.6, w, y + 0.1, -w, y + 0.1))
                for y, w in ((0.35, 0.75), (-0.05, 0.6), (-0.35, 0.45))
            ],
        ]
    return [trunk, *[(MAIN, oval(x, y, 0.42, 0.38)) for x, y in ((-0.38, 0), (0.38, 0), (0, -0.45), (0, 0.05))]]


def umbrella(u: Uniform) -> list[Part]:
    w, h = u(0.85, 0.98), u(0.65, 0.8)
    ribs = [(SECOND, np.concatenate([oval(0, 0, w * 0.36, h, 180, 360), points(0, 0.05)]))]
    return [
        (DARK, box(-0.05, -0.1, 0.05, 0.8)), (DARK, oval(0.14, 0.78, 0.2, 0.2, 0, 180)),
        (GROUND, oval(0.14, 0.78, 0.09, 0.1, 0, 180)), (DARK, box(-0.03, -h - 0.15, 0.03, -h)),
        (MAIN, oval(0, 0, w, h, 180, 360)), *ribs,
    ]  # fmt: skip


MAKERS: dict[str, Callable[[Uniform], list[Part]]] = {
    f.__name__: f
    for f in (bell, boat, bottle, butterfly, cactus, car, clock, crown, cup, fish, flower, guitar, heart, house, key,
              lamp, leaf, moon, mushroom, rocket, snowman, star, tree, umbrella)
}  # fmt: skip
