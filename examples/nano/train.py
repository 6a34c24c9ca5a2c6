"""Train the nano model, step by step and resumable.

    python examples/nano/train.py RUN_DIR            # all stages, resuming where it stopped
    python examples/nano/train.py RUN_DIR --steps vit=4000 --steps describe=3000

Stages: ``vit`` warms the vision tower up on dense labels (its heads are dropped later);
``describe`` and ``answer`` are the paper's two stages, projector and decoder trained, tower
frozen: first descriptions alone, then all kinds of questions. ``sharpen`` goes on with the
second, asks the hard kinds more often, and about more crowded pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from data import (
    HELD_OUT_SEED,
    IGNORE,
    IMAGE_ROWS,
    TRAINING_SEED,
    Encoder,
    PackedBatch,
    batch_rng,
    packed_batch,
    patch_labels,
    presence_labels,
    stack_pixels,
)
from network import NanoTower, NanoVlm, normalize
from tokenizer import train_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from world import KINDS, SHAPES, draw_scene

LOG_EVERY = 100
SAVE_EVERY = 500


@dataclass(frozen=True)
class Stage:
    """Schedule of one stage: linear warm-up, then cosine down to 3 % of the peak rate."""

    steps: int
    batch: int
    rate: float
    warm_up: int = 200

    def rate_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.rate * rise * (0.03 + 0.97 * fall)


STAGES = {
    "vit": Stage(steps=4500, batch=32, rate=1.5e-3),
    "describe": Stage(steps=1000, batch=32, rate=1.5e-3),
    "answer": Stage(steps=2000, batch=32, rate=1.2e-3),
    "sharpen": Stage(steps=2000, batch=32, rate=1.2e-3),
}


@dataclass(frozen=True)
class Curriculum:
    """What a language stage asks.

    Attributes:
        kinds: of questions; repeats weigh more.
        questions: asked about each picture.
        capacity: tokens they may take.
        dialogue_share: of pictures with one conversation instead of separate questions.
        crowded_share: of pictures with at least two objects for sure.
    """

    kinds: tuple[str, ...]
    questions: int
    capacity: int
    dialogue_share: float = 0.25
    crowded_share: float = 0.0


HARD_KINDS = ("color", "exist", "where")
CURRICULA = {
    "describe": Curriculum(("describe",), 1, 48, dialogue_share=0.0),
    "answer": Curriculum(KINDS, 6, 96),
    "sharpen": Curriculum(KINDS + 3 * HARD_KINDS, 6, 96, crowded_share=0.7),
}


def make_optimizer(module: nn.Module) -> torch.optim.AdamW:
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    plain = [p for p in module.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))


class Run:
    """One training run in a folder: log, checkpoints of each stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, **record: object) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def checkpoint(self, stage: str) -> Path:
        return self.folder / f"{stage}.pt"

    def train(
        self,
        name: str,
        stage: Stage,
        module: nn.Module,
        loss_of_step: Callable[[int], Tensor],
        evaluate: Callable[[], dict[str, float]],
        evaluate_every: int,
    ) -> None:
        """Run (or resume) a stage to its last step."""
        optimizer, first = make_optimizer(module), 0
        path = self.checkpoint(name)
        if path.exists():
            saved = torch.load(path, weights_only=True)
            module.load_state_dict(saved["model"])
            first = int(saved["step"])
            if "optimizer" in saved:
                optimizer.load_state_dict(saved["optimizer"])
        losses: list[float] = []
        started = time.monotonic()
        for step in range(first, stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.rate_at(step)
            loss = loss_of_step(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            done = step + 1
            if done % LOG_EVERY == 0:
                speed = len(losses) * stage.batch / (time.monotonic() - started)
                recent = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
                self.log(
                    stage=name, step=done, loss=round(recent, 4), images_s=round(speed, 1)
                )
            if done % evaluate_every == 0 or done == stage.steps:
                self.log(stage=name, step=done, **evaluate())
            if done % SAVE_EVERY == 0 or done == stage.steps:
                state = {
                    "model": module.state_dict(),
                    "step": done,
                    "optimizer": optimizer.state_dict(),
                }
                partial = path.with_suffix(".tmp")
                torch.save(state, partial)
                partial.replace(path)


def vit_batch(seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = batch_rng(seed, "vit", step)
    scenes = [draw_scene(rng) for _ in range(size)]
    labels = [patch_labels(scene) for scene in scenes]
    shapes = torch.stack([torch.from_numpy(label[0]) for label in labels])
    colors = torch.stack([torch.from_numpy(label[1]) for label in labels])
    presence = torch.stack([torch.from_numpy(presence_labels(scene)) for scene in scenes])
    return normalize(stack_pixels(scenes)), shapes, colors, presence


def train_vit(run: Run, stage: Stage) -> NanoTower:
    tower = NanoTower()
    cut = 1 + len(SHAPES)

    def loss_of_step(step: int) -> Tensor:
        pixels, shapes, colors, presence = vit_batch(TRAINING_SEED, step, stage.batch)
        with torch.autocast("cpu", torch.bfloat16):
            dense, summary = tower(pixels)
        dense, summary = dense.float(), summary.float()
        return (
            F.cross_entropy(dense[..., :cut].flatten(0, 1), shapes.flatten())
            + F.cross_entropy(dense[..., cut:].flatten(0, 1), colors.flatten())
            + 0.1 * F.cross_entropy(summary.flatten(0, 1), presence.flatten())
        )

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        pixels, shapes, colors, presence = vit_batch(HELD_OUT_SEED, 0, 256)
        dense, summary = tower(pixels)
        on_object = shapes > 0
        found_shape = dense[..., :cut].argmax(-1) == shapes
        found_color = dense[..., cut:].argmax(-1) == colors
        return {
            "shape_on_objects": round(found_shape[on_object].float().mean().item(), 4),
            "color_on_objects": round(found_color[on_object].float().mean().item(), 4),
            "presence": round((summary.argmax(-1) == presence).float().mean().item(), 4),
        }

    run.train("vit", stage, tower, loss_of_step, evaluate, evaluate_every=500)
    return tower


def answer_logits(vlm: NanoVlm, tower: NanoTower, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a labelled token, and those labels."""
    with torch.no_grad():
        features = tower.features(normalize(batch.pixels))[:, 1:]
    hidden = vlm(batch.prefix_ids, features, batch.input_ids, batch.positions, batch.visible)
    predicting = hidden[:, IMAGE_ROWS - 1 : -1]
    chosen = batch.labels != IGNORE
    return vlm.decoder.lm_head(predicting[chosen]), batch.labels[chosen]


@torch.no_grad()
def exact_answers(
    vlm: NanoVlm, tower: NanoTower, encoder: Encoder, scenes: int = 256
) -> dict[str, float]:
    """Share of held-out answers right to the last token (teacher-forced equals greedy)."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for part in range(scenes // 64):
        rng = batch_rng(HELD_OUT_SEED, "answer", part)
        batch = packed_batch(rng, encoder, 64, KINDS, 6, 128, 0.0)
        logits, labels = answer_logits(vlm, tower, batch)
        hits = torch.zeros_like(batch.labels, dtype=torch.bool)
        hits[batch.labels != IGNORE] = logits.argmax(-1) == labels
        for span in batch.spans:
            right[span.kind].append(bool(hits[span.row, span.start : span.stop].all()))
    report = {kind: round(sum(hit) / len(hit), 3) for kind, hit in right.items() if hit}
    every = [hit for hits in right.values() for hit in hits]
    return {**report, "all": round(sum(every) / len(every), 4)}


def train_language(
    run: Run, name: str, stage: Stage, vlm: NanoVlm, tower: NanoTower, encoder: Encoder
) -> None:
    plan = CURRICULA[name]

    def loss_of_step(step: int) -> Tensor:
        rng = batch_rng(TRAINING_SEED, name, step)
        batch = packed_batch(
            rng,
            encoder,
            stage.batch,
            plan.kinds,
            plan.questions,
            plan.capacity,
            plan.dialogue_share,
            plan.crowded_share,
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = answer_logits(vlm, tower, batch)
        return F.cross_entropy(logits.float(), labels)

    def evaluate() -> dict[str, float]:
        return exact_answers(vlm, tower, encoder)

    run.train(name, stage, vlm, loss_of_step, evaluate, evaluate_every=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", action="append", default=[], metavar="STAGE=N")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    stages = dict(STAGES)
    for change in options.steps:
        name, steps = change.split("=")
        stages[name] = Stage(int(steps), stages[name].batch, stages[name].rate)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = Run(options.run_dir)
    if not (run.folder / "tokenizer.model").exists():
        train_tokenizer(run.folder)
    encoder = Encoder(str(run.folder / "tokenizer.model"))
    tower = train_vit(run, stages["vit"]).requires_grad_(False)
    vlm = NanoVlm()
    for name in CURRICULA:
        train_language(run, name, stages[name], vlm, tower, encoder)


if __name__ == "__main__":
    main()
