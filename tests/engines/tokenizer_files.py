"""A small LLaMA tokenizer folder for tests: 512 pieces, byte fallback, LLaMA's settings."""

from __future__ import annotations

import json
from functools import cache
from io import BytesIO
from pathlib import Path

import sentencepiece

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is on the table in this picture? ASSISTANT: I see two red cups and a book.",
    "USER: How many people are there? ASSISTANT: I can see three people, near the left side.",
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    "Hello! Is there anything else that you would like to know about the image?",
    "It looks like a small camera on a robot: it can answer questions about the world.",
    "0123456789 + - * / = ( ) [ ] { } < > @ # $ % & _ ~ | \\ ^ ` \" ' : ; , . ! ?",
)

TOKEN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", **TOKEN_FLAGS},
    "clean_up_tokenization_spaces": False,
    "eos_token": {"__type": "AddedToken", "content": "</s>", **TOKEN_FLAGS},
    "legacy": True,
    "model_max_length": 2048,
    "pad_token": None,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": {"__type": "AddedToken", "content": "<unk>", **TOKEN_FLAGS},
}
"""Of the shape that the published checkpoints have."""

SPECIAL_MAP = {
    "bos_token": {"content": "<s>", **TOKEN_FLAGS},
    "eos_token": {"content": "</s>", **TOKEN_FLAGS},
    "pad_token": "<unk>",
    "unk_token": {"content": "<unk>", **TOKEN_FLAGS},
}


@cache
def train_model() -> bytes:
    """The content of ``tokenizer.model``; about a second, once."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
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
    return model.getvalue()


def write_tokenizer(folder: Path, **config: object) -> Path:
    """A folder as published, with changes to tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL_MAP))
    return folder
