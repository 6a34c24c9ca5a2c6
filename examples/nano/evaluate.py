"""Exact-answer accuracy of a checkpoint on held-out questions, greedy, in PyTorch float32.

python examples/nano/evaluate.py CHECKPOINT_DIR --count 2000
python examples/nano/evaluate.py CHECKPOINT_DIR --wrong-picture
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from questions import held_out
from world import KINDS, Question, Scene

from mvlm_export.engines.image_processor import ImageProcessorConfig, preprocess
from mvlm_export.engines.prompt import Conversation, tokenize_prompt
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.reference import ReferenceModel

MAX_TOKENS = 40


class Answerer:
    """A checkpoint in PyTorch that answers one question about one picture."""

    def __init__(self, folder: Path) -> None:
        self.model = ReferenceModel.open(folder)
        self.tokenizer = LlamaTokenizer.from_folder(folder)
        self.processor = ImageProcessorConfig(image_size=self.model.config.vision.image_size)

    def prompt(self, question: str) -> np.ndarray:
        config = self.model.config
        text = Conversation().ask(question, images=1).render()
        counts = [config.image_tokens]
        return tokenize_prompt(text, self.tokenizer, config.text.vocab_size, counts).ids

    def embeds(self, pixels: np.ndarray) -> np.ndarray:
        values = preprocess(pixels, self.processor)
        return self.model.image_embeds(self.model.image_features(values))[0]

    def answer(self, pixels: np.ndarray, question: str) -> str:
        stops = self.model.config.text.stop_token_ids
        ids, _ = self.model.greedy_run(
            self.prompt(question), self.embeds(pixels), MAX_TOKENS, stops
        )
        return self.tokenizer.decode([i for i in ids if i not in stops]).strip()


def accuracy(
    answerer: Answerer, pairs: list[tuple[Scene, Question]], wrong_picture: bool
) -> dict[str, float]:
    """Share of exact answers by kind and over ``all``; on the wrong picture if asked."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for index, (scene, question) in enumerate(pairs):
        shown = pairs[(index + 1) % len(pairs)][0] if wrong_picture else scene
        found = answerer.answer(shown.pixels, question.question)
        right[question.kind].append(found == question.answer)
    report = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    every = [hit for hits in right.values() for hit in hits]
    return {**report, "all": sum(every) / len(every)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--wrong-picture", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = accuracy(
        Answerer(options.checkpoint), held_out(options.count), options.wrong_picture
    )
    print(json.dumps({kind: round(value, 4) for kind, value in figures.items()}))
