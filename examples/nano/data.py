"""Batches for the three stages, each a pure function of (seed, stage, step)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
from network import CONFIG
from torch import Tensor
from world import COLOR_NAMES, MAX_OBJECTS, SHAPES, Question, Scene, ask, draw_scene

from mvlm_export.engines.prompt import TEMPLATES

IGNORE = -100
BOS, EOS = 1, 2
TEMPLATE = TEMPLATES["v1"]
IMAGE_ROWS = CONFIG.image_tokens
TRAINING_SEED = 1
HELD_OUT_SEED = 1_000_003


def batch_rng(seed: int, stage: str, step: int) -> random.Random:
    """The random numbers of one batch, the same whenever the run is resumed."""
    return random.Random(f"{seed}/{stage}/{step}")


def stack_pixels(scenes: list[Scene]) -> Tensor:
    """uint8 [B, H, W, 3]."""
    return torch.from_numpy(np.stack([scene.pixels for scene in scenes]))


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Shape and colour index of each patch, int64 [patches] each; 0 is the ground."""
    grid, size = CONFIG.vision.grid, CONFIG.vision.patch_size
    centers = (np.arange(grid) + 0.5) * size
    shapes = np.zeros((grid, grid), np.int64)
    colors = np.zeros((grid, grid), np.int64)
    for item in scene.items:
        near_x = np.abs(centers - item.center[0]) <= item.radius
        near_y = np.abs(centers - item.center[1]) <= item.radius
        covered = near_y[:, None] & near_x[None, :]
        shapes[covered] = 1 + SHAPES.index(item.shape)
        colors[covered] = 1 + COLOR_NAMES.index(item.color)
    return shapes.ravel(), colors.ravel()


def presence_labels(scene: Scene) -> np.ndarray:
    """How many objects have each shape, then each colour, int64 [shapes + colours]."""
    by_shape = [sum(item.shape == shape for item in scene.items) for shape in SHAPES]
    by_color = [sum(item.color == color for item in scene.items) for color in COLOR_NAMES]
    assert max(by_shape) <= MAX_OBJECTS
    return np.array(by_shape + by_color, np.int64)


class Encoder:
    """Turns questions into token ids in the published prompt template."""

    def __init__(self, tokenizer_model: str) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer_model)
        self.prefix = [BOS, *self.pieces.encode(TEMPLATE.constant_prefix())]

    def turn(self, question: Question, first: bool) -> tuple[list[int], list[int]]:
        """Prompt ids and answer ids (closed by </s>) of one turn."""
        opening = "\n" if first else TEMPLATE.user_start
        asked = question.question + TEMPLATE.user_end + TEMPLATE.assistant_start
        prompt = opening + asked
        prompt_ids = self.pieces.encode(prompt)
        whole = self.pieces.encode(f"{prompt} {question.answer}")
        assert whole[: len(prompt_ids)] == prompt_ids
        return prompt_ids, [*whole[len(prompt_ids) :], EOS]


@dataclass
class Span:
    """Where a question's answer lies in a packed row, [start, stop)."""

    row: int
    kind: str
    start: int
    stop: int


@dataclass
class PackedBatch:
    """Questions packed behind one image each; see ``NanoVlm.forward`` for the shapes."""

    pixels: Tensor
    prefix_ids: Tensor
    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    visible: Tensor
    spans: list[Span]


def pack_questions(
    scenes: list[Scene],
    asked: list[list[Question]],
    dialogue: list[bool],
    encoder: Encoder,
    capacity: int,
) -> PackedBatch:
    """Pack turns behind each image.

    A row of independent questions has a block-diagonal mask and restarting positions, which
    equals asking each alone; a row of dialogue is one conversation of several turns.
    """
    prefix, rows = len(encoder.prefix), len(scenes)
    start = prefix + IMAGE_ROWS
    ids = torch.zeros(rows, capacity, dtype=torch.long)
    labels = torch.full((rows, capacity), IGNORE)
    blocks = torch.full((rows, capacity), -1)
    positions = torch.zeros(rows, capacity, dtype=torch.long)
    spans = []
    for row, questions in enumerate(asked):
        used = 0
        for block, question in enumerate(questions):
            prompt, answer = encoder.turn(question, block == 0 or not dialogue[row])
            stop = used + len(prompt) + len(answer)
            if stop > capacity:
                continue
            ids[row, used:stop] = torch.tensor(prompt + answer)
            labels[row, used + len(prompt) : stop] = torch.tensor(answer)
            blocks[row, used:stop] = 0 if dialogue[row] else block
            first = used if dialogue[row] else 0
            positions[row, used:stop] = start + first + torch.arange(stop - used)
            spans.append(Span(row, question.kind, used + len(prompt), stop))
            used = stop
    image_positions = (prefix + torch.arange(IMAGE_ROWS)).expand(rows, -1)
    total = IMAGE_ROWS + capacity
    same_block = blocks.unsqueeze(1) == blocks.unsqueeze(2)
    visible = torch.ones(rows, total, prefix + total, dtype=torch.bool)
    visible[:, :, prefix:] = torch.ones(total, total, dtype=torch.bool).tril()
    visible[:, IMAGE_ROWS:, prefix + IMAGE_ROWS :] &= same_block
    return PackedBatch(
        pixels=stack_pixels(scenes),
        prefix_ids=torch.tensor(encoder.prefix),
        input_ids=ids,
        labels=labels,
        positions=torch.cat([image_positions, positions], dim=1),
        visible=visible,
        spans=spans,
    )


def _crowd(rng: random.Random, scene: Scene, share: float) -> Scene:
    """Draw again, with probability ``share``, until there are two objects."""
    if rng.random() < share:
        while len(scene.items) < 2:
            scene = draw_scene(rng)
    return scene


def packed_batch(
    rng: random.Random,
    encoder: Encoder,
    size: int,
    kinds: tuple[str, ...],
    questions: int,
    capacity: int,
    dialogue_share: float,
    crowded_share: float = 0.0,
) -> PackedBatch:
    """Draw ``size`` scenes and ask up to ``questions`` about each."""
    scenes = [draw_scene(rng) for _ in range(size)]
    if crowded_share:
        scenes = [_crowd(rng, scene, crowded_share) for scene in scenes]
    dialogue = [rng.random() < dialogue_share for _ in range(size)]
    asked = [[ask(rng, scene.items, kinds) for _ in range(questions)] for scene in scenes]
    return pack_questions(scenes, asked, dialogue, encoder, capacity)
