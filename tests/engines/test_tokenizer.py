"""Ids and text against transformers, streaming against whole decoding, failures by message."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece

from mvlm_export.engines.errors import CheckpointError, InputError
from mvlm_export.engines.tokenizer import LlamaTokenizer, StreamDecoder

from .tokenizer_files import TOKEN_FLAGS, train_model, write_tokenizer

TEXTS = (
    "",
    " ",
    "   ",
    "hello",
    " hello",
    "  hello  there ",
    "a\nb\n\nc",
    "\n",
    "\r\n\ttab",
    "What is this?\nAnswer the question using a single word or phrase.",
    "it's 12345 + 6.7",
    "é à ü ñ",
    "😀 ok 👩‍👩‍👧 🇩🇪",
    "日本語と中文 한국어",
    "▁x ▁ y",
    "zero\u200bwidth \u00a0nbsp",
    "null\0byte",
    "</s>",
    "<s>",
    "<unk>",
    "hi</s>USER: x",
    "a </s> b",
    "</s></s><s> <s>",
    "end</s>\n",
    "<pad> <image </ s> <S>",
)


def random_texts(count: int) -> list[str]:
    rng = random.Random(11)
    bits = ["hello", " ", "  ", "\n", "\t", "</s>", "<s>", "<unk>", "é", "😀", "日本", "▁"]
    bits += [
        "USER: ",
        "what is this?",
        "12345",
        "\u200b",
        "<image",
        " the",
        "'s",
        "ASSISTANT:",
    ]
    return ["".join(rng.choices(bits, k=rng.randint(1, 8))) for _ in range(count)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def slow(folder: Path):
    """The SentencePiece tokenizer of transformers, what the published code's has become."""
    module = pytest.importorskip("transformers.tokenization_utils_sentencepiece")
    return module.SentencePieceBackend.from_pretrained(folder)


def fast(folder: Path):
    return pytest.importorskip("transformers").LlamaTokenizer.from_pretrained(folder)


class TestEncode:
    @pytest.mark.parametrize("text", TEXTS)
    def test_equals_the_slow_tokenizer(self, text, tokenizer, slow) -> None:
        expected = slow(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, bos=False) == expected
        assert tokenizer.encode(text, bos=True) == [1, *expected]

    def test_equals_the_slow_tokenizer_on_random_texts(self, tokenizer, slow) -> None:
        for text in random_texts(300):
            expected = slow(text, add_special_tokens=False).input_ids
            assert tokenizer.encode(text, bos=False) == expected, repr(text)

    @pytest.mark.parametrize("legacy", [True, False])
    def test_equals_the_fast_tokenizer(self, legacy: bool, tmp_path) -> None:
        """Where no part starts with a space: there the fast one alone adds no second."""
        write_tokenizer(tmp_path, legacy=legacy)
        ours, theirs = LlamaTokenizer.from_folder(tmp_path), fast(tmp_path)
        assert ours.legacy is legacy
        compared = 0
        for text in (*TEXTS, *random_texts(300)):
            parts = re.split("</s>|<s>|<unk>", text)
            if any(part.startswith((" ", "▁")) for part in parts):
                continue
            compared += 1
            assert ours.encode(text, bos=True) == theirs(text).input_ids, repr(text)
        assert compared > 100

    @pytest.mark.parametrize(
        ("text", "pieces"),
        [
            (" cup", "▁▁cup"),
            ("hello</s>USER: a", "▁hello</s>▁USER:▁a"),
            ("</s> a", "</s>▁▁a"),
            ("\n", "▁<0x0A>"),
        ],
    )
    def test_legacy_puts_a_space_before_every_part(self, text, pieces, tokenizer) -> None:
        """The pieces that transformers 4.33, which the published code runs, gives as well."""
        processor = sentencepiece.SentencePieceProcessor(model_proto=train_model())
        ids = tokenizer.encode(text, bos=False)
        assert "".join(processor.id_to_piece(ids)) == pieces

    def test_not_legacy_puts_a_space_before_the_first_part_only(self) -> None:
        new = LlamaTokenizer(train_model(), {"legacy": False})
        old = LlamaTokenizer(train_model(), {"legacy": True})
        assert new.encode("a", bos=False) == old.encode("a", bos=False)
        assert new.encode("</s>a", bos=False) != old.encode("</s>a", bos=False)
        assert new.encode("</s> a", bos=False) == old.encode("</s>a", bos=False)

    @pytest.mark.parametrize("config", [{}, {"legacy": None, "add_bos_token": None}])
    def test_absent_and_null_mean_the_default(self, config: dict) -> None:
        tokenizer = LlamaTokenizer(train_model(), {**config, "add_prefix_space": None})
        assert tokenizer.legacy
        assert tokenizer.add_bos
        published = LlamaTokenizer(train_model(), {"legacy": True})
        assert tokenizer.encode("</s>a", bos=True) == published.encode("</s>a", bos=True)

    def test_refuses_half_a_surrogate_pair(self, tokenizer) -> None:
        with pytest.raises(InputError, match="surrogate"):
            tokenizer.encode("a\ud83d", bos=True)

    def test_refuses_bytes(self, tokenizer) -> None:
        with pytest.raises(InputError, match="not bytes"):
            tokenizer.encode(b"text", bos=True)


class TestDecode:
    @pytest.mark.parametrize("text", TEXTS)
    def test_equals_the_fast_tokenizer(self, text, tokenizer, folder) -> None:
        ids = tokenizer.encode(text, bos=True)
        theirs = fast(folder)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special=skip) == expected

    def test_gives_plain_text_back(self, tokenizer) -> None:
        for text in TEXTS:
            if not re.search("<s>|</s>|<unk>|▁", text):
                assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text

    def test_equals_sentencepiece_on_any_bytes(self, tokenizer) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_proto=train_model())
        byte_of = {processor.id_to_piece(i): i for i in range(512) if processor.is_byte(i)}
        rng = random.Random(5)
        starts = [0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0x41, 0xFF, 0xC0, 0xED]
        pieces = [processor.piece_to_id(piece) for piece in ("▁the", "a", "▁")]
        for _ in range(500):
            ids = [byte_of[f"<0x{rng.choice(starts):02X}>"] for _ in range(rng.randint(0, 7))]
            ids.insert(rng.randint(0, len(ids)), rng.choice(pieces))
            assert tokenizer.decode(ids) == processor.decode(ids), ids

    def test_refuses_ids_below_zero(self, tokenizer) -> None:
        with pytest.raises(InputError, match="Id -1 is below zero"):
            tokenizer.decode([5, -1])

    @pytest.mark.parametrize("skip", [True, False])
    def test_ids_that_no_token_has_are_marked(self, skip: bool, tokenizer) -> None:
        """The rows that pad a model's table to a round number can be generated too."""
        cup = tokenizer.encode("cup", bos=False)
        assert tokenizer.decode([*cup, 512, *cup], skip) == "cup\ufffd cup"
        assert tokenizer.decode([512, 31999], skip) == "\ufffd" * 2

    def test_an_id_between_the_pieces_and_an_added_token_is_marked(self) -> None:
        tokenizer = LlamaTokenizer(train_model(), added={"<cup>": 600})
        assert tokenizer.decode([550, 600, 601]) == "\ufffd<cup>\ufffd"


class TestStreamDecoder:
    @pytest.mark.parametrize("skip", [True, False])
    def test_deltas_are_whole_characters_and_add_up(self, skip: bool, tokenizer) -> None:
        for text in (*TEXTS, *random_texts(100)):
            ids = tokenizer.encode(text, bos=True)
            stream = StreamDecoder(tokenizer, skip)
            deltas = [stream.feed(id_) for id_ in ids]
            assert "\ufffd" not in "".join(deltas)
            assert "".join(deltas) + stream.finish() == tokenizer.decode(ids, skip)

    def test_a_character_comes_with_its_last_byte(self, tokenizer) -> None:
        ids = tokenizer.encode("😀", bos=False)
        stream = StreamDecoder(tokenizer)
        assert [stream.feed(id_) for id_ in ids] == ["", "", "", "", "😀"]
        assert stream.finish() == ""

    def test_an_unfinished_character_is_marked_at_the_end(self, tokenizer) -> None:
        ids = tokenizer.encode("a😀", bos=False)[:-1]
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.feed, ids)) == "a"
        assert stream.finish() == "\ufffd" * 3
        assert tokenizer.decode(ids) == "a" + "\ufffd" * 3

    def test_an_id_that_no_token_has_ends_an_unfinished_character(self, tokenizer) -> None:
        ids = [*tokenizer.encode("é", bos=False)[:-1], 4000, *tokenizer.encode("a", bos=False)]
        stream = StreamDecoder(tokenizer)
        deltas = [stream.feed(id_) for id_ in ids]
        assert "".join(deltas) + stream.finish() == tokenizer.decode(ids)
        assert "".join(deltas).count("\ufffd") == 2

    def test_special_ids_do_not_cut_a_character(self, tokenizer) -> None:
        """As in decode(): ids that are skipped are as if they were not there."""
        ids = tokenizer.encode("é", bos=False)
        ids.insert(2, 2)
        assert tokenizer.decode(ids) == "é"


class TestSpecialTokens:
    def test_ids_of_the_published_form(self, tokenizer) -> None:
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
        assert tokenizer.vocab_size == 512
        assert tokenizer.add_bos
        assert [tokenizer.is_special(id_) for id_ in (0, 1, 2, 3, 300)] == [True] * 3 + [
            False
        ] * 2

    def test_model_alone_is_enough(self, tmp_path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(train_model())
        tokenizer = LlamaTokenizer.from_folder(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
        assert tokenizer.encode("</s>", bos=True) == [1, 2]

    def test_added_tokens_file(self, tmp_path) -> None:
        write_tokenizer(tmp_path)
        added = {"<cup>": 513, "[PAD]": 512, "<cup><cup>": 514}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        special = {"pad_token": "[PAD]", "additional_special_tokens": ["<dog>", "</s>"]}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
        tokenizer = LlamaTokenizer.from_folder(tmp_path)
        assert tokenizer.pad_id == 512
        assert tokenizer.vocab_size == 516
        ids = tokenizer.encode("<cup><cup><cup>[PAD]<dog>", bos=False)
        assert ids == [514, 513, 512, 515]
        assert tokenizer.decode(ids) == "<cup><cup><cup>"
        assert tokenizer.decode(ids, skip_special=False) == "<cup><cup><cup>[PAD]<dog>"

    def test_added_tokens_of_the_config(self, tmp_path) -> None:
        record = {"content": "<mark>", **TOKEN_FLAGS, "lstrip": True, "rstrip": True}
        named = {
            str(i): {"content": text, **TOKEN_FLAGS, "special": True}
            for i, text in enumerate(("<unk>", "<s>", "</s>"))
        }
        decoder = {**named, "512": {**record, "special": True}}
        write_tokenizer(tmp_path, added_tokens_decoder=decoder)
        module = pytest.importorskip("transformers.tokenization_utils_sentencepiece")
        theirs = module.SentencePieceBackend.from_pretrained(tmp_path)
        ours = LlamaTokenizer.from_folder(tmp_path)
        for text in ("a <mark> b", "<mark>", "  <mark>  </s> <mark>", "a\n<mark>\nb"):
            expected = theirs(text, add_special_tokens=False).input_ids
            assert ours.encode(text, bos=False) == expected, repr(text)

    def test_extra_tokens_by_name(self) -> None:
        config = {"extra_special_tokens": {"image_token": "<img>"}}
        assert LlamaTokenizer(train_model(), config).encode("<img>", bos=False) == [512]


class TestFailures:
    def test_missing_model(self, tmp_path) -> None:
        with pytest.raises(CheckpointError, match=r"tokenizer\.model.* Copy tokenizer\.model"):
            LlamaTokenizer.from_folder(tmp_path)

    def test_missing_model_beside_the_other_form(self, tmp_path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(CheckpointError, match="another form"):
            LlamaTokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"version https://git-lfs.github.com/spec/v1\n", train_model()[:-5]],
        ids=["empty", "lfs-pointer", "cut-short"],
    )
    def test_damaged_model(self, content: bytes, tmp_path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"not a SentencePiece model.*download"):
            LlamaTokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize(
        "content",
        ["{", "[]", "\udcff", "[" * 100_000],
        ids=["cut", "list", "bytes", "deep"],
    )
    def test_damaged_json(self, content: str, tmp_path) -> None:
        write_tokenizer(tmp_path)
        path = tmp_path / "special_tokens_map.json"
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"special_tokens_map\.json.*download"):
            LlamaTokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"add_eos_token": True}, "add_eos_token"),
            ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs"),
            ({"eos_token": 2}, "written as 2"),
            ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "written as 'x'"),
            (
                {"added_tokens_decoder": {"512": {"content": "<a>", "single_word": True}}},
                "single words",
            ),
            ({"legacy": "false"}, "gives legacy as 'false' instead of true or false"),
            ({"add_bos_token": []}, "gives add_bos_token as"),
            ({"add_eos_token": "no"}, "gives add_eos_token as 'no'"),
            ({"added_tokens_decoder": {"0": "<unk>"}}, r"added_tokens_decoder\.0 as '<unk>'"),
            ({"added_tokens_decoder": {"0": {}}}, "written as {}"),
            ({"added_tokens_decoder": {"0": None}}, r"added_tokens_decoder\.0 as None"),
            ({"added_tokens_decoder": {"0": {"content": "x", "special": 1}}}, "special as 1"),
            ({"added_tokens_decoder": [{"content": "<a>"}]}, "instead of an object"),
            ({"additional_special_tokens": 5}, "additional_special_tokens as 5"),
            ({"additional_special_tokens": "<a>"}, "as '<a>' instead of a list"),
            ({"additional_special_tokens": [["<a>"]]}, r"written as \['<a>'\]"),
            ({"extra_special_tokens": {"image_token": 7}}, "written as 7"),
            ({"bos_token": ["<s>"]}, r"written as \['<s>'\]"),
        ],
    )
    def test_refused_settings(self, change: dict, message: str, tmp_path) -> None:
        write_tokenizer(tmp_path, **change)
        with pytest.raises(CheckpointError, match=message):
            LlamaTokenizer.from_folder(tmp_path)
