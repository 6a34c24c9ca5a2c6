"""Freeze 256 held-out scenes with questions, answers and float32 logits.

    python examples/nano/golden.py CHECKPOINT_DIR OUT.npz

Arrays: ``pixels`` uint8 [256, 64, 64, 3]; ``questions``, ``answers``, ``kinds`` str [256];
``answer_ids`` int32 [R], the true answers' tokens (closed by </s>) one after the other;
``logits`` float32 [R, V], what PyTorch predicts for each of them, teacher-forced; ``starts``
int32 [257], where each scene's rows begin.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from evaluate import Answerer
from questions import held_out

SCENES = 256


@torch.inference_mode()
def teacher_forced(
    answerer: Answerer, pixels: np.ndarray, question: str, answer: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [A] of the answer and its logits [A, V]."""
    prompt = answerer.prompt(question)
    ids = answerer.tokenizer.encode(answer, bos=False)
    ids = np.array([*ids, answerer.model.config.text.eos_token_id], np.int32)
    whole = np.concatenate([prompt, ids[:-1]])
    embeds = torch.from_numpy(answerer.embeds(pixels))
    text = answerer.model.config.text
    empty = torch.zeros(0, text.num_key_value_heads, text.head_dim)
    logits = answerer.model.decoder(
        torch.from_numpy(whole), embeds, [empty] * (2 * text.num_hidden_layers)
    )[0]
    return ids, logits[len(prompt) - 1 :].numpy()


def freeze(checkpoint: Path, path: Path) -> None:
    """Write the golden file."""
    answerer = Answerer(checkpoint)
    pairs = held_out(SCENES, part="golden")
    rows = [teacher_forced(answerer, s.pixels, q.question, q.answer) for s, q in pairs]
    starts = np.cumsum([0, *(len(ids) for ids, _ in rows)]).astype(np.int32)
    np.savez_compressed(
        path,
        pixels=np.stack([scene.pixels for scene, _ in pairs]),
        questions=np.array([question.question for _, question in pairs]),
        answers=np.array([question.answer for _, question in pairs]),
        kinds=np.array([question.kind for _, question in pairs]),
        answer_ids=np.concatenate([ids for ids, _ in rows]),
        logits=np.concatenate([logits for _, logits in rows]),
        starts=starts,
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    freeze(Path(sys.argv[1]), Path(sys.argv[2]))
