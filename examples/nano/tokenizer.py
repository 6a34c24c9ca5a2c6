"""Train the nano model's SentencePiece tokenizer: LLaMA's settings, 512 pieces.

python examples/nano/tokenizer.py OUT_DIR
"""

from __future__ import annotations

import random
import sys
from io import BytesIO
from pathlib import Path

import sentencepiece
from world import KINDS, ask, draw_scene

from mvlm_export.engines.prompt import TEMPLATES

VOCAB_SIZE = 512
SYSTEM = TEMPLATES["v1"].system.strip()
ENGLISH = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "Please tell me what you can see in this picture, and how many things are in it.",
    "Hello! Is there anything else that you would like to know about the image?",
    "I think that this one is not the same as the other; they were both shown before.",
    "Which of these objects is near the left side, and which is on the right hand?",
    "It looks like a small camera on a robot: it can answer questions about the world.",
    "0123456789 + - * / = ( ) [ ] { } < > @ # $ % & _ ~ | \\ ^ ` \" ' : ; , . ! ?",
)


def corpus(scenes: int = 3000) -> list[str]:
    """Conversations about drawn scenes, the system sentence, and a little plain English."""
    rng = random.Random(7)
    lines = [SYSTEM] * 3000 + [line for line in ENGLISH for _ in range(5)]
    for _ in range(scenes):
        items = draw_scene(rng).items
        for _ in range(3):
            question = ask(rng, items, KINDS)
            lines.append(f"USER: {question.question} ASSISTANT: {question.answer}")
    return lines


def train_tokenizer(folder: Path) -> Path:
    """Write ``tokenizer.model`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
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
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


if __name__ == "__main__":
    print(train_tokenizer(Path(sys.argv[1])))
