"""LLaMA's SentencePiece tokenizer, from ``tokenizer.model`` and the JSON files beside it.

The ids are those of the tokenizer that the published code runs: ``LlamaTokenizer`` of
transformers 4.33, slow, in its *legacy* mode. There the text is cut at special tokens
(``</s>`` inside a text is id 2), and every part between them is encoded by SentencePiece as a
text of its own, with a space put in front. Transformers 5 cuts alike, but puts no space in
front of a part that starts with one already. A folder whose tokenizer_config.json says
``"legacy": false`` gets the newer rule: a space in front of the whole text only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from .errors import CheckpointError, InputError
from .tokenizer_config import (
    AddedToken,
    added_from_record,
    extra_texts,
    named_texts,
    read_flag,
    read_id,
    read_json_object,
    read_object,
    refuse_settings,
)

MODEL_FILE = "tokenizer.model"
TOKENIZER_FILES = (
    MODEL_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What :meth:`LlamaTokenizer.from_folder` reads; all but the first may be absent."""

REPLACEMENT = "\ufffd"
"""Stands for bytes that are no character, and for ids that the tokenizer has no token for."""

_SPACE = "▁"
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""``normalizer_spec { add_dummy_prefix: false }``; protobuf merges what is appended."""


class LlamaTokenizer:
    """Text to ids and back; made by :meth:`from_folder`.

    Attributes:
        bos_id: first id of every prompt.
        eos_id: id that ends an answer.
        pad_id: id of padding; the unknown token's where the folder names none.
        add_bos: whether the folder asks for ``bos_id`` in front of a text.
        legacy: see the module's docstring; true where the folder does not say.
        vocab_size: one more than the highest id, added tokens included.
    """

    def __init__(
        self,
        model: bytes,
        config: Mapping[str, Any] | None = None,
        special_map: Mapping[str, Any] | None = None,
        added: Mapping[str, int] | None = None,
    ) -> None:
        """From the files' contents; the mappings are those of the three JSON files."""
        config = config or {}
        named = {**_DEFAULTS, **named_texts(config), **named_texts(special_map or {})}
        self.legacy = read_flag(config, "legacy", default=True)
        self.add_bos = read_flag(config, "add_bos_token", default=True)
        self._prefix = _SPACE if read_flag(config, "add_prefix_space", default=True) else ""
        refuse_settings(config)
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(
                model if self.legacy else model + _NO_DUMMY_PREFIX
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"{MODEL_FILE} ({len(model)} bytes) is not a SentencePiece model: {error}. It "
                "is damaged or a Git LFS pointer; download the file again."
            ) from error
        self._added = self._collect_added(config, special_map or {}, added or {}, named)
        self.bos_id = self._added[named["bos_token"]].id
        self.eos_id = self._added[named["eos_token"]].id
        self.unk_id = self._added[named["unk_token"]].id
        self.pad_id = self._added[named.get("pad_token", named["unk_token"])].id
        self._by_id = {token.id: token for token in self._added.values()}
        self.vocab_size = max(self._pieces.get_piece_size(), *(i + 1 for i in self._by_id))

    @classmethod
    def from_folder(cls, folder: str | Path) -> LlamaTokenizer:
        """Read a checkpoint's or a bundle's tokenizer files.

        Raises:
            CheckpointError: ``tokenizer.model`` is missing or damaged, a JSON file cannot be
                read, or asks for something that this tokenizer does not do.
        """
        folder = Path(folder)
        try:
            model = (folder / MODEL_FILE).read_bytes()
        except OSError as error:
            raise CheckpointError(_missing_model(folder, error)) from error
        config, special_map, added = (
            read_json_object(folder / name) for name in TOKENIZER_FILES[1:]
        )
        try:
            return cls(model, config, special_map, added)
        except CheckpointError as error:
            message = f"The tokenizer in '{folder}' cannot be used. {error}"
            raise CheckpointError(message) from error

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of a text, after ``bos_id`` when ``bos``; no ``eos_id`` is ever appended.

        Raises:
            InputError: the text is not a str, or holds half a surrogate pair.
        """
        if not isinstance(text, str):
            raise InputError(f"A text is a str, not {type(text).__name__}; decode it first.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"The text holds {text[error.start]!r} at place {error.start}, half of a "
                "surrogate pair, which is no character; decode the text from its bytes again."
            ) from error
        ids = [self.bos_id] if bos else []
        if not self.legacy and text:
            text = self._prefix + text.replace(_SPACE, " ")
        for part in self._split(text):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; one space at its very start is the tokenizer's own and is left out.

        Bytes that are not UTF-8 become U+FFFD, one each, as SentencePiece does; so does an id
        that no token has, which a model can give whose table has more rows than the tokenizer
        has tokens.

        Raises:
            InputError: an id is below zero.
        """
        stream = StreamDecoder(self, skip_special)
        return "".join([stream.feed(id_) for id_ in ids] + [stream.finish()])

    def is_special(self, id_: int) -> bool:
        """Whether the id stands for a mark such as ``</s>`` instead of text."""
        token = self._by_id.get(id_)
        if token is not None:
            return token.special
        return self._is_piece(id_) and bool(self._pieces.is_control(id_))

    def surface(self, id_: int) -> str | int:
        """What an id stands for: its text, or the byte (0..255) of a byte fallback piece.

        U+FFFD where no token has this id.

        Raises:
            InputError: the id is below zero.
        """
        token = self._by_id.get(id_)
        if token is not None:
            return token.content
        if id_ < 0:
            raise InputError(
                f"Id {id_} is below zero and stands for no text: it is padding or a mask of "
                "the caller's own; leave it out."
            )
        if not self._is_piece(id_):
            return REPLACEMENT
        piece: str = self._pieces.id_to_piece(id_)
        if self._pieces.is_byte(id_):
            return int(piece[3:-1], 16)
        return piece.replace(_SPACE, " ")

    def _is_piece(self, id_: int) -> bool:
        return 0 <= id_ < int(self._pieces.get_piece_size())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def _split(self, text: str) -> list[str | AddedToken]:
        """Cut at added tokens, leftmost and longest first; empty parts are left out."""
        texts = self._pattern.split(text)
        for place in range(1, len(texts), 2):
            token = self._added[texts[place]]
            if token.rstrip:
                texts[place + 1] = texts[place + 1].lstrip()
            if token.lstrip:
                texts[place - 1] = texts[place - 1].rstrip()
        parts = [self._added[t] if place % 2 else t for place, t in enumerate(texts)]
        if not self.legacy and len(parts) > 1 and parts[0] == _SPACE:
            parts = parts[1:]
        return [part for part in parts if part]

    def _collect_added(
        self,
        config: Mapping[str, Any],
        special_map: Mapping[str, Any],
        added: Mapping[str, int],
        named: Mapping[str, str],
    ) -> dict[str, AddedToken]:
        """All texts that are one token: those with an id of their own, then the named ones."""
        specials = list(dict.fromkeys([*named.values(), *extra_texts(config, special_map)]))
        tokens = {
            text: AddedToken(text, read_id(id_), text in specials)
            for text, id_ in added.items()
            if text
        }
        for id_, record in read_object(config, "added_tokens_decoder").items():
            token = added_from_record(read_id(id_), record)
            tokens[token.content] = token
        for text in specials:
            if text not in tokens:
                tokens[text] = AddedToken(text, self._id_of(text, tokens.values()))
        return tokens

    def _id_of(self, text: str, tokens: Iterable[AddedToken]) -> int:
        """The piece that is spelt like this, else the first free id behind all others."""
        id_ = int(self._pieces.piece_to_id(text))
        if self._pieces.id_to_piece(id_) == text:
            return id_
        return max([int(self._pieces.get_piece_size()), *(token.id + 1 for token in tokens)])


class StreamDecoder:
    """Text of ids that arrive one by one.

    Every delta is whole characters; the deltas and the text of :meth:`finish` together equal
    ``tokenizer.decode`` of all the ids.
    """

    def __init__(self, tokenizer: LlamaTokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._bytes = bytearray()
        self._started = False

    def feed(self, id_: int) -> str:
        """The text that this id completes, often empty.

        Raises:
            InputError: the id is below zero.
        """
        id_ = int(id_)
        if self._skip_special and self._tokenizer.is_special(id_):
            return ""
        surface = self._tokenizer.surface(id_)
        if isinstance(surface, int):
            self._bytes.append(surface)
            return self._emit(self._take_characters())
        return self._emit(self._flush() + surface)

    def finish(self) -> str:
        """What is left when no id follows: U+FFFD for each byte of an unfinished character."""
        return self._emit(self._flush())

    def _emit(self, text: str) -> str:
        if self._started or not text:
            return text
        self._started = True
        return text.removeprefix(" ")

    def _take_characters(self) -> str:
        """Take whole characters off the front; bytes that can start none become U+FFFD."""
        text = ""
        while self._bytes:
            length = _utf8_length(self._bytes[0])
            if length > len(self._bytes):
                break
            text += self._take(length)
        return text

    def _take(self, length: int) -> str:
        try:
            character = self._bytes[:length].decode("utf-8")
        except UnicodeDecodeError:
            character, length = REPLACEMENT, 1
        del self._bytes[:length]
        return character

    def _flush(self) -> str:
        text = ""
        while self._bytes:
            text += self._take(_utf8_length(self._bytes[0]))
        return text


def _utf8_length(first: int) -> int:
    """Bytes of the character that starts with this one (RFC 3629); 1 where none does."""
    if 0xC2 <= first <= 0xDF:
        return 2
    if 0xE0 <= first <= 0xEF:
        return 3
    return 4 if 0xF0 <= first <= 0xF4 else 1


def _missing_model(folder: Path, error: OSError) -> str:
    what = f"'{folder / MODEL_FILE}' cannot be read: {error.strerror or error}."
    if (folder / "tokenizer.json").is_file():
        what += " The tokenizer.json beside it is another form, which is not read here."
    return f"{what} Copy {MODEL_FILE} of the original checkpoint into the folder."
