"""Train the nano model's SentencePiece tokenizer: LLaMA's settings, 512 pieces.

    python examples/nano/tokenizer.py OUT_DIR
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import sentencepiece
from world import KINDS, ask, draw_scene

VOCAB_SIZE = 512
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ENGLISH = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "Please tell me what you can see in this picture, and how many things are in it.",
    "Hello! Is there anything else that you would like to know about the image?",
    "I think that this one is not the same as the other; they were both shown before.",
    "Which of these objects is near the left side, and which is on the right hand?",
    "It looks like a small camera on a robot: it can answer questions about the world.",
    "0123456789 + - * / = ( ) [ ] { } < > @ # $ % & _ ~ | \\ ^ ` \" ' : ; , . ! ?",
)


def write_corpus(path: Path, scenes: int = 3000) -> None:
    """Conversations about drawn scenes, the system sentence, and a little plain English."""
    rng = random.Random(7)
    lines = [SYSTEM] * 3000 + [line for line in ENGLISH for _ in range(5)]
    for _ in range(scenes):
        items = draw_scene(rng).items
        for _ in range(3):
            question = ask(rng, items, KINDS)
            lines.append(f"USER: {question.question} ASSISTANT: {question.answer}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_tokenizer(folder: Path) -> Path:
    """Write ``tokenizer.model`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    write_corpus(corpus)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


if __name__ == "__main__":
    print(train_tokenizer(Path(sys.argv[1])))
