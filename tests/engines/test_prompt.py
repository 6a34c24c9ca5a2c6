"""Rendering, image marks, and ids against a plain reading of the published rules."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.prompt import (
    TEMPLATES,
    Conversation,
    get_template,
    tokenize_constant_prefix,
    tokenize_prompt,
)
from mvlm_export.engines.tokenizer import LlamaTokenizer

from .tokenizer_files import train_model, write_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)
VOCAB = 512


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_folder(folder)


class TestRender:
    def test_one_image_one_question(self) -> None:
        text = Conversation().ask("What is this?", images=1).render()
        assert text == f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"

    def test_without_image(self) -> None:
        assert Conversation().ask("Hi").render() == f"{SYSTEM} USER: Hi ASSISTANT:"

    def test_more_turns(self) -> None:
        chat = Conversation().ask("One?", images=1).answer("Yes.").ask("Two?").answer("No.")
        assert chat.render() == (
            f"{SYSTEM} USER: <image>\nOne? ASSISTANT: Yes.</s>USER: Two? ASSISTANT: No.</s>"
        )
        assert chat.ask("Three?").render() == f"{chat.render()}USER: Three? ASSISTANT:"

    def test_an_empty_answer_is_closed(self) -> None:
        chat = Conversation().ask("One?").answer("")
        assert chat.render() == f"{SYSTEM} USER: One? ASSISTANT:</s>"

    def test_plain(self) -> None:
        chat = Conversation(get_template("plain")).ask("", images=1)
        assert chat.render() == "<image>"
        assert chat.answer("A red cup.").render() == "<image>A red cup.\n"
        question = Conversation(get_template("plain")).ask("What is it?", images=1)
        assert question.render() == "<image>What is it?"

    @pytest.mark.parametrize("name", list(TEMPLATES))
    def test_constant_prefix_starts_every_prompt(self, name: str) -> None:
        empty = Conversation(get_template(name))
        prefix = empty.constant_prefix()
        for chat in (empty.ask("a", images=2), empty.ask("b").answer("c").ask("d", images=1)):
            assert chat.render().startswith(prefix)
        assert empty.ask("x", images=1).render()[len(prefix) :].startswith("<image>")

    def test_constant_prefix_of_v1(self) -> None:
        assert Conversation().constant_prefix() == f"{SYSTEM} USER: "

    def test_asking_leaves_the_conversation_as_it_was(self) -> None:
        chat = Conversation()
        chat.ask("a")
        assert chat.turns == ()
        with pytest.raises(FrozenInstanceError):
            chat.turns = ()


class TestImageMarks:
    def test_one_mark_for_each_image(self) -> None:
        chat = Conversation().ask("Which?", images=3)
        assert chat.turns[0].message == "<image>\n<image>\n<image>\nWhich?"
        assert chat.image_count == 3

    def test_marks_in_the_text_stay_where_they_are(self) -> None:
        chat = Conversation().ask("Is <image> like <image>?", images=2)
        assert chat.turns[0].message == "Is <image> like <image>?"

    def test_images_may_come_later(self) -> None:
        chat = Conversation().ask("Hi").answer("Hello.").ask("And this?", images=1)
        assert chat.render().endswith("</s>USER: <image>\nAnd this? ASSISTANT:")

    @pytest.mark.parametrize(
        ("text", "images"), [("<image> a", 0), ("<image>", 2), ("a<image><image>", 1)]
    )
    def test_marks_must_match_the_images(self, text: str, images: int) -> None:
        with pytest.raises(InputError, match=r"one image for each mark"):
            Conversation().ask(text, images=images)

    def test_a_mark_in_an_answer_is_no_image(self) -> None:
        chat = Conversation().ask("a", images=1).answer("The tag <image> shows one.")
        assert chat.render().count("<image>") == chat.image_count == 1
        assert "The tag <image > shows one.</s>" in chat.render()


class TestOrder:
    def test_two_questions_in_a_row(self) -> None:
        with pytest.raises(InputError, match="no answer yet"):
            Conversation().ask("a").ask("b")

    def test_an_answer_to_nothing(self) -> None:
        with pytest.raises(InputError, match="No question"):
            Conversation().answer("a")
        with pytest.raises(InputError, match="No question"):
            Conversation().ask("a").answer("b").answer("c")

    def test_an_empty_message(self) -> None:
        with pytest.raises(InputError, match="empty"):
            Conversation().ask("")

    def test_an_unknown_template(self) -> None:
        with pytest.raises(InputError, match=r"'v7'.* v1, plain"):
            get_template("v7")


def published_ids(text: str, tokenize, images: list[list[int]]) -> list[int]:
    """Tokenise each part with its bos, and drop the bos of all but the first."""
    ids: list[int] = []
    for place, part in enumerate(text.split("<image>")):
        with_bos = tokenize(part).input_ids
        assert with_bos[0] == 1
        ids += with_bos if place == 0 else images[place - 1] + with_bos[1:]
    return ids


class TestTokenizePrompt:
    @pytest.mark.parametrize(
        ("text", "counts"),
        [
            (Conversation().ask("What is this?", images=1).render(), [144]),
            (Conversation().ask("a\n\nb 😀 日本", images=2).render(), [3, 5]),
            (
                Conversation().ask("a", images=1).answer("b").ask("c", images=1).render(),
                [4, 4],
            ),
            (Conversation().ask("  no image  ").render(), []),
            ("<image>", [2]),
            ("<image><image>", [2, 1]),
            ("<image> </s><s> <image>\n", [1, 1]),
            ("", []),
            ("</s>", []),
        ],
    )
    def test_equals_the_published_rule(self, text, counts, tokenizer, folder) -> None:
        module = pytest.importorskip("transformers.tokenization_utils_sentencepiece")
        slow = module.SentencePieceBackend.from_pretrained(folder)

        def with_bos(part: str):
            encoded = slow(part, add_special_tokens=False)
            encoded["input_ids"] = [1, *encoded.input_ids]
            return encoded

        starts = np.cumsum([0, *counts]).tolist()
        images = [list(range(VOCAB + a, VOCAB + b)) for a, b in pairwise(starts)]
        prompt = tokenize_prompt(text, tokenizer, VOCAB, counts)
        assert prompt.ids.dtype == np.int32
        assert prompt.ids.ndim == 1
        assert prompt.ids.tolist() == published_ids(text, with_bos, images)
        assert [prompt.ids[a:b].tolist() for a, b in prompt.image_spans] == images

    def test_bos_stands_at_the_start_alone(self, tokenizer) -> None:
        chat = Conversation().ask("a", images=2).answer("b").ask("c", images=1)
        ids = tokenize_prompt(chat.render(), tokenizer, VOCAB, [2, 2, 2]).ids
        assert np.flatnonzero(ids == tokenizer.bos_id).tolist() == [0]
        assert np.count_nonzero(ids == tokenizer.eos_id) == 1

    def test_a_folder_without_bos(self) -> None:
        tokenizer = LlamaTokenizer(train_model(), {"add_bos_token": False})
        assert tokenize_prompt("<image>", tokenizer, VOCAB, [2]).ids.tolist() == [512, 513]

    def test_image_ids_start_at_the_models_vocabulary(self, tokenizer) -> None:
        prompt = tokenize_prompt("<image>", tokenizer, 32000, [3])
        assert prompt.ids.tolist() == [1, 32000, 32001, 32002]

    @pytest.mark.parametrize(
        ("text", "counts"), [("a", [1]), ("<image>", []), ("<image>", [1, 1])]
    )
    def test_images_must_match_the_marks(self, text, counts, tokenizer) -> None:
        with pytest.raises(InputError, match=r"one image for each mark"):
            tokenize_prompt(text, tokenizer, VOCAB, counts)

    def test_an_image_without_rows(self, tokenizer) -> None:
        with pytest.raises(InputError, match="needs one at least"):
            tokenize_prompt("<image>", tokenizer, VOCAB, [0])

    def test_a_token_that_the_model_does_not_know(self) -> None:
        tokenizer = LlamaTokenizer(train_model(), added={"<cup>": 512})
        with pytest.raises(InputError, match=r"'<cup>', token 512.* 512 tokens"):
            tokenize_prompt("a <cup>", tokenizer, VOCAB)


class TestConstantPrefix:
    def test_a_prompt_with_an_image_starts_with_all_of_it(self, tokenizer) -> None:
        prefix = tokenize_constant_prefix(TEMPLATES["v1"], tokenizer)
        text = Conversation().ask("What?", images=1).render()
        prompt = tokenize_prompt(text, tokenizer, VOCAB, [144])
        assert prompt.shared_prefix(prefix) == len(prefix)
        assert prompt.image_spans[0][0] == len(prefix)

    def test_a_prompt_without_shares_all_but_its_end(self, tokenizer) -> None:
        prefix = tokenize_constant_prefix(TEMPLATES["v1"], tokenizer)
        prompt = tokenize_prompt(Conversation().ask("the cup").render(), tokenizer, VOCAB)
        shared = prompt.shared_prefix(prefix)
        assert prompt.ids[:shared].tolist() == prefix[:shared].tolist()
        assert shared == len(prefix) - 1

    def test_shared_prefix_counts_until_the_first_difference(self, tokenizer) -> None:
        prompt = tokenize_prompt("a b c", tokenizer, VOCAB)
        assert prompt.shared_prefix(prompt.ids) == len(prompt)
        assert prompt.shared_prefix(np.append(prompt.ids, np.int32(7))) == len(prompt)
        assert prompt.shared_prefix(np.array([1, 99], np.int32)) == 1
        assert prompt.shared_prefix(np.array([], np.int32)) == 0
