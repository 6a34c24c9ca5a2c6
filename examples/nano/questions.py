"""Write held-out scenes as PNG files with their questions, for ``mvlm parity --samples``.

python examples/nano/questions.py OUT_DIR --count 200
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data import HELD_OUT_SEED, batch_rng
from PIL import Image
from world import KINDS, Question, Scene, allows, ask, draw_scene


def held_out(count: int, part: str = "questions") -> list[tuple[Scene, Question]]:
    """``count`` scenes never trained on, each with a question; kinds take turns."""
    pairs = []
    for index in range(count):
        rng = batch_rng(HELD_OUT_SEED, part, index)
        scene = draw_scene(rng)
        kind = KINDS[index % len(KINDS)]
        while not allows(scene.items, kind):
            scene = draw_scene(rng)
        pairs.append((scene, ask(rng, scene.items, (kind,))))
    return pairs


def write_questions(folder: Path, pairs: list[tuple[Scene, Question]]) -> None:
    """PNG files and ``samples.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (scene, question) in enumerate(pairs):
        name = f"scene-{index:04d}.png"
        Image.fromarray(scene.pixels).save(folder / name, optimize=True)
        line = {
            "image": name,
            "prompt": question.question,
            "answer": question.answer,
            "kind": question.kind,
        }
        lines.append(json.dumps(line))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    write_questions(options.folder, held_out(options.count))
