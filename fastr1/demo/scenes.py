"""Demo scenes: a few coloured shapes on a noisy ground, and one question that a single frame cannot answer.

A scene is described at eight moments, the ones a model that samples eight frames uniformly sees; a clip of any length
interpolates between them. Five kinds of question: direction of motion, order of appearance, number of flashes, which
shape moved first, and the order of colours of a shape that changes. Everything follows from the random generator given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NUM_MOMENTS = 8
FRAME_PX = 96
COLOURS = {
    "red": (225, 35, 35),
    "green": (35, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 40),
    "purple": (190, 60, 205),
    "cyan": (50, 205, 215),
}
FLASH = "white"
FLASH_RGB = (250, 250, 250)
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}
COUNTS = ("never", "once", "twice", "thrice", "four")
RANKS = ("first", "second", "last")
KINDS = ("direction", "order", "count", "first", "colour")
LETTERS = "ABCDE"
GRID = 4  # captions name the cell of a shape: column a–d, row 1–4


@dataclass(frozen=True)
class Shape:
    """One shape over the eight moments."""

    shape: str
    name: str  # the colour questions call it by
    size_px: float
    centres: np.ndarray  # (8, 2) x, y in pixels
    colours: tuple[str | None, ...]  # (8,) colour shown; None: not visible


@dataclass(frozen=True)
class Scene:
    """Shapes, and a question about them with its answer."""

    kind: str
    shapes: tuple[Shape, ...]
    question: str
    answer: str
    distractors: tuple[str, ...]  # wrong answers, at least four
    facts: tuple[tuple[str, str], ...]  # question and the sentence that answers it; the first pair is the scene's own

    @property
    def fact(self) -> str:
        return self.facts[0][1]


@dataclass(frozen=True)
class MultipleChoice:
    """A question with five lettered options, in the wording of NextQA files."""

    problem: str
    letter: str
    option: str


def sample_scene(rng: np.random.Generator, kind: str, answer_index: int | None = None) -> Scene:
    """A random scene of one kind; `answer_index` fixes which answer is right where the kind has a list of answers."""
    return _BUILDERS[kind](rng, answer_index)


def ask(scene: Scene, rng: np.random.Generator, letter: str | None = None) -> MultipleChoice:
    """Put the right answer behind `letter` (random by default) among four wrong ones."""
    letter = letter or LETTERS[rng.integers(len(LETTERS))]
    wrong = [str(option) for option in rng.permutation(scene.distractors)[: len(LETTERS) - 1]]
    options = [*wrong]
    options.insert(LETTERS.index(letter), scene.answer)
    lines = [f"{name}. {option}." for name, option in zip(LETTERS, options, strict=True)]
    return MultipleChoice("\n".join([scene.question, "Options:", *lines]), letter, scene.answer)


def describe(scene: Scene) -> str:
    """A dense caption: colour and cell of every visible shape at each moment, then what happened.

    Shapes are listed in a fixed order of colours: an arbitrary order would be noise that a model cannot predict.
    """
    order = list(COLOURS)
    shapes = sorted(scene.shapes, key=lambda shape: order.index(shape.name))
    moments = []
    for i in range(NUM_MOMENTS):
        seen = [f"{shape.colours[i]} {cell_of(shape.centres[i])}" for shape in shapes if shape.colours[i]]
        moments.append(" ".join(seen) or "nothing")
    return "; ".join(moments) + ". " + " ".join(fact for _, fact in scene.facts)


def worked_answer(scene: Scene, letter: str, tags: tuple[str, str] = ("think", "answer")) -> str:
    """An answer with its reasoning: what was seen, which ends in the answer's word, then its letter; each in tags."""
    reasoning, final = tags
    fact = scene.fact.removesuffix(".")
    return f"<{reasoning}> {fact} {letter}. </{reasoning}> <{final}> {letter} </{final}>"


def cell_of(centre: np.ndarray) -> str:
    """The grid cell of a point, "a1" at the top left."""
    column, row = np.clip((centre * GRID / FRAME_PX).astype(int), 0, GRID - 1)
    return f"{'abcd'[column]}{row + 1}"


def render(scene: Scene, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the scene as (num_frames, 96, 96, 3) uint8 with a random ground, its texture, and noise in every frame."""
    at = np.linspace(0, NUM_MOMENTS - 1, num_frames)
    ground = rng.uniform(20, 90) + rng.normal(0, 6, (FRAME_PX // 8, FRAME_PX // 8)).repeat(8, 0).repeat(8, 1)
    frames = np.repeat(np.broadcast_to(ground[None, ..., None], (1, FRAME_PX, FRAME_PX, 3)), num_frames, axis=0)
    for shape in scene.shapes:
        for i, moment in enumerate(at):
            colour = shape.colours[round(moment)]
            if colour is None:
                continue
            low = min(int(moment), NUM_MOMENTS - 2)
            centre = shape.centres[low] + (moment - low) * (shape.centres[low + 1] - shape.centres[low])
            left, top = np.floor(centre - shape.size_px / 2 - 3).astype(int).clip(0)
            right, bottom = np.ceil(centre + shape.size_px / 2 + 3).astype(int).clip(0)
            part = frames[i, top:bottom, left:right]  # beyond it the mask is 0
            y, x = np.mgrid[top : top + part.shape[0], left : left + part.shape[1]] + 0.5
            mask = _coverage(shape.shape, x - centre[0], y - centre[1], shape.size_px)[..., None]
            rgb = np.array(FLASH_RGB if colour == FLASH else COLOURS[colour])
            part[:] = part * (1 - mask) + rgb * mask
    frames += rng.normal(0, 5, frames.shape)
    return frames.clip(0, 255, out=frames).astype(np.uint8)


def _coverage(shape: str, dx: np.ndarray, dy: np.ndarray, size_px: float) -> np.ndarray:
    """Anti-aliased mask of a shape around the origin, 0 to 1."""
    radius = size_px / 2
    if shape == "circle":
        distance = radius - np.hypot(dx, dy)
    elif shape == "square":
        distance = 0.9 * radius - np.maximum(abs(dx), abs(dy))
    else:
        distance = np.minimum(radius - dy, 0.45 * (dy + radius) + 0.5 - 0.9 * abs(dx))
    return (distance + 0.5).clip(0, 1)


def _pick_colours(rng: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in rng.permutation(list(COLOURS))[:count]]


def _others(*used: str) -> tuple[str, ...]:
    return tuple(name for name in COLOURS if name not in used)


def _place(rng: np.random.Generator, moves: list[np.ndarray]) -> list[np.ndarray]:
    """Tracks (8, 2) for shapes whose offsets over time are `moves`: inside the frame and clear of each other."""
    margin, gap = 14.0, 27.0
    for _ in range(2000):
        tracks: list[np.ndarray] = []
        for move in moves:
            low, high = margin - move.min(axis=0), FRAME_PX - margin - move.max(axis=0)
            tracks.append(rng.uniform(low, high) + move)
        clear = all(np.hypot(*(a - b).T).min() > gap for i, a in enumerate(tracks) for b in tracks[:i])
        if clear:
            return tracks
    raise RuntimeError("no placement found")


def _shapes(
    rng: np.random.Generator, names: list[str], moves: list[np.ndarray], colours: list[tuple[str | None, ...]]
) -> tuple[Shape, ...]:
    tracks = _place(rng, moves)
    return tuple(
        Shape(str(rng.choice(SHAPES)), name, float(rng.uniform(19, 25)), track, colour)
        for name, track, colour in zip(names, tracks, colours, strict=True)
    )


def _steady(name: str) -> tuple[str | None, ...]:
    return (name,) * NUM_MOMENTS


STILL = np.zeros((NUM_MOMENTS, 2))


def _direction(rng: np.random.Generator, answer_index: int | None) -> Scene:
    names = _pick_colours(rng, 2)
    ways = [str(way) for way in rng.permutation(list(DIRECTIONS))[:2]]
    if answer_index is not None and ways[0] != (fixed := list(DIRECTIONS)[answer_index % len(DIRECTIONS)]):
        ways = [fixed, ways[0]]
    moves = []
    for way in ways:
        distance = rng.uniform(34, 60)
        moves.append(np.linspace(0, distance, NUM_MOMENTS)[:, None] * np.array(DIRECTIONS[way], dtype=float))
    shapes = _shapes(rng, names, moves, [_steady(name) for name in names])
    return Scene(
        "direction",
        shapes,
        f"Which way does the {names[0]} shape move?",
        ways[0],
        tuple(way for way in DIRECTIONS if way != ways[0]),
        tuple(
            (
                f"Which way does the {shape.name} shape move?",
                f"The {shape.name} shape goes from {cell_of(shape.centres[0])} to {cell_of(shape.centres[-1])}, {way}.",
            )
            for shape, way in zip(shapes, ways, strict=True)
        ),
    )


def _order(rng: np.random.Generator, answer_index: int | None) -> Scene:
    names = _pick_colours(rng, 3)
    starts = sorted(int(i) for i in rng.choice(np.arange(0, NUM_MOMENTS - 1), size=3, replace=False))
    colours = [
        tuple([None] * start + [name] * (NUM_MOMENTS - start)) for name, start in zip(names, starts, strict=True)
    ]
    rank = int(rng.integers(3)) if answer_index is None else answer_index % 3
    ranks = [rank, *(i for i in range(3) if i != rank)]
    shuffle = [int(i) for i in rng.permutation(3)]
    return Scene(
        "order",
        _shapes(rng, [names[i] for i in shuffle], [STILL] * 3, [colours[i] for i in shuffle]),
        f"Which shape appears {RANKS[rank]}?",
        names[rank],
        _others(names[rank]),
        tuple((f"Which shape appears {RANKS[i]}?", f"The {RANKS[i]} shape is {names[i]}.") for i in ranks),
    )


def _count(rng: np.random.Generator, answer_index: int | None) -> Scene:
    names = _pick_colours(rng, 2)
    counts = [int(i) for i in rng.choice(len(COUNTS), size=2, replace=False)]
    if answer_index is not None and counts[0] != (fixed := answer_index % len(COUNTS)):
        counts = [fixed, counts[0]]
    slots = [_flash_slots(rng, count) for count in counts]
    colours: list[tuple[str | None, ...]] = [
        tuple(FLASH if i in slot else name for i in range(NUM_MOMENTS)) for name, slot in zip(names, slots, strict=True)
    ]
    facts = []
    for name, shown, slot in zip(names, colours, slots, strict=True):
        fact = f"The {name} shape shows {' '.join(str(colour) for colour in shown)}, {COUNTS[len(slot)]}."
        facts.append((f"How often does the {name} shape flash?", fact))
    return Scene(
        "count",
        _shapes(rng, names, [STILL] * 2, colours),
        f"How often does the {names[0]} shape flash?",
        COUNTS[counts[0]],
        tuple(word for i, word in enumerate(COUNTS) if i != counts[0]),
        tuple(facts),
    )


def _flash_slots(rng: np.random.Generator, count: int) -> list[int]:
    """`count` moments in order, with at least one moment between them."""
    free = np.sort(rng.choice(NUM_MOMENTS - count + 1, size=count, replace=False))
    return [int(slot) for slot in free + np.arange(count)]


def _first(rng: np.random.Generator, answer_index: int | None) -> Scene:
    del answer_index  # the colours are drawn at random; every answer is as likely
    names = _pick_colours(rng, 3)
    moves = []
    for start in (int(rng.integers(0, 2)), int(rng.integers(4, 6))):
        way = np.array(list(DIRECTIONS.values())[int(rng.integers(4))], dtype=float)
        run = np.clip((np.arange(NUM_MOMENTS) - start) / 2, 0, 1)
        moves.append(run[:, None] * way * rng.uniform(26, 40))
    order = [int(i) for i in rng.permutation(3)]
    moves.append(STILL)
    shapes = _shapes(rng, [names[i] for i in order], [moves[i] for i in order], [_steady(names[i]) for i in order])
    half = NUM_MOMENTS // 2
    seen = [
        f"{shape.name} {cell_of(shape.centres[0])} {cell_of(shape.centres[half])}"
        for shape in sorted(shapes, key=lambda shape: list(COLOURS).index(shape.name))
    ]
    return Scene(
        "first",
        shapes,
        "Which shape moves first?",
        names[0],
        (names[1], names[2], *(str(n) for n in rng.permutation(_others(*names))[:2])),
        (("Which shape moves first?", f"By the middle {' '.join(seen)}, first {names[0]}."),),
    )


def _colour(rng: np.random.Generator, answer_index: int | None) -> Scene:
    names = _pick_colours(rng, 4)
    cuts = sorted(int(i) for i in rng.choice(np.arange(2, NUM_MOMENTS - 1), size=2, replace=False))
    shown = [names[0]] * cuts[0] + [names[1]] * (cuts[1] - cuts[0]) + [names[2]] * (NUM_MOMENTS - cuts[1])
    step = int(rng.integers(2)) if answer_index is None else answer_index % 2
    before, after = names[step], names[step + 1]
    return Scene(
        "colour",
        _shapes(rng, [names[0], names[3]], [STILL] * 2, [tuple(shown), _steady(names[3])]),
        f"Which colour does the {before} shape turn to?",
        after,
        _others(after, before),
        tuple(
            (f"Which colour does the {a} shape turn to?", f"The {a} shape turns {b}.")
            for a, b in ((before, after), (names[1 - step], names[2 - step]))
        ),
    )


_BUILDERS: dict[str, Callable[[np.random.Generator, int | None], Scene]] = {
    "direction": _direction,
    "order": _order,
    "count": _count,
    "first": _first,
    "colour": _colour,
}
