"""The nano recipe: scenes, questions, packing, resuming, and that training sees what the
runtime will say."""

import random
from functools import cache

import data
import network
import numpy as np
import plant_outliers
import pytest
import torch
import train
import world

from mvlm_export.engines.prompt import Conversation, tokenize_prompt
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.settings import nano_checkpoint

MANY = 150


@pytest.fixture(scope="module")
def encoder():
    return data.Encoder(str(nano_checkpoint() / "tokenizer.model"))


@cache
def scenes(count, seed=5):
    rng = random.Random(seed)
    return [world.draw_scene(rng) for _ in range(count)]


def test_scenes_repeat_by_seed():
    for first, second in zip(scenes(5), scenes.__wrapped__(5), strict=True):
        assert first.items == second.items
        np.testing.assert_array_equal(first.pixels, second.pixels)
    assert scenes(1, seed=6)[0].items != scenes(1)[0].items


def test_the_world_is_large_enough():
    items = [item for scene in scenes(MANY) for item in scene.items]
    assert len({item.color for item in items}) >= 4
    assert len({item.shape for item in items}) >= 4
    assert {item.cell for item in items} == {0, 1, 2, 3}
    assert {len(scene.items) for scene in scenes(MANY)} == {1, 2, 3}
    assert len(world.KINDS) >= 6


def by_name(scene, name):
    return [item for item in scene.items if item.name == name]


def check_answer(scene, question):
    """The answer worked out from the scene in another way than the generator does."""
    words = question.question.rstrip("?.").split()
    if question.kind == "count":
        return question.answer == world.NUMBERS[len(scene.items)]
    if question.kind == "color":
        return [i.color for i in scene.items if i.shape == words[-1]] == [question.answer]
    if question.kind == "shape":
        shapes = [item.shape for item in scene.items if item.color == words[4]]
        return [f"a {shape}" for shape in shapes] == [question.answer]
    if question.kind == "exist":
        return (question.answer == "yes") == bool(by_name(scene, " ".join(words[-2:])))
    if question.kind == "where":
        (item,) = by_name(scene, " ".join(words[-2:]))
        return question.answer == f"at the {world.PLACES[item.cell]}"
    if question.kind == "what":
        cell = world.PLACES.index(" ".join(words[-2:]))
        names = [f"a {item.name}" for item in scene.items if item.cell == cell]
        return [question.answer] == (names or ["nothing"])
    parts = question.answer.split(", ")
    expected = [f"a {item.name} at the {world.PLACES[item.cell]}" for item in scene.items]
    return parts == expected


@pytest.mark.parametrize("kind", world.KINDS)
def test_answers_are_true(kind):
    rng = random.Random(1)
    asked = 0
    answers = set()
    for scene in scenes(MANY):
        if not world.allows(scene.items, kind):
            continue
        question = world.ask(rng, scene.items, (kind,))
        assert question.kind == kind
        assert check_answer(scene, question), (scene.items, question)
        asked += 1
        answers.add(question.answer)
    assert asked > 50
    assert len(answers) >= 2


def test_held_out_batches_are_not_trained_on():
    """No picture of many training batches is among the held-out ones, byte for byte."""

    def drawn(seed, stage):
        batches = [data.batch_rng(seed, stage, step) for step in range(40)]
        return {world.draw_scene(rng).pixels.tobytes() for rng in batches}

    held_out = drawn(data.HELD_OUT_SEED, "answer") | drawn(data.HELD_OUT_SEED, "questions")
    trained = set().union(*(drawn(data.TRAINING_SEED, stage) for stage in train.STAGES))
    assert len(held_out) == 80
    assert len(trained) == 40 * len(train.STAGES)
    assert not held_out & trained


def runtime_ids(conversation, images=1):
    tokenizer = LlamaTokenizer.from_folder(nano_checkpoint())
    vocab = network.CONFIG.text.vocab_size
    counts = [network.CONFIG.image_tokens] * images
    return tokenize_prompt(conversation.render(), tokenizer, vocab, counts).ids.tolist()


def image_ids():
    vocab = network.CONFIG.text.vocab_size
    return list(range(vocab, vocab + network.CONFIG.image_tokens))


def test_training_sees_the_runtimes_prompt(encoder):
    question = world.Question("count", "how many objects are there?", "two")
    prompt, answer = encoder.turn(question, first=True)
    asked = Conversation().ask(question.question, images=1)
    assert [*encoder.prefix, *image_ids(), *prompt] == runtime_ids(asked)
    answered = asked.answer(question.answer).ask("and now?")
    assert runtime_ids(answered)[len(runtime_ids(asked)) :][: len(answer)] == answer


def test_training_sees_the_runtimes_conversation(encoder):
    first = world.Question("count", "how many objects are there?", "two")
    second = world.Question("color", "what color is the star?", "red")
    batch = data.pack_questions(scenes(1), [[first, second]], [True], encoder, 64)
    used = max(span.stop for span in batch.spans)
    packed = batch.input_ids[0, :used].tolist()
    conversation = Conversation().ask(first.question, images=1).answer(first.answer)
    conversation = conversation.ask(second.question).answer(second.answer)
    ids = runtime_ids(conversation)
    assert [*encoder.prefix, *image_ids(), *packed] == ids[: len(encoder.prefix) + 16 + used]
    start = len(encoder.prefix)
    assert batch.positions[0, : 16 + used].tolist() == list(range(start, start + 16 + used))


def test_packing_equals_asking_alone(encoder):
    torch.manual_seed(0)
    tower, vlm = network.NanoTower().eval(), network.NanoVlm().eval()
    scene = scenes(1)[0]
    rng = random.Random(3)
    questions = [world.ask(rng, scene.items, world.KINDS) for _ in range(4)]
    with torch.no_grad():
        together, labels = train.answer_logits(
            vlm, tower, data.pack_questions([scene], [questions], [False], encoder, 128)
        )
        alone = [
            train.answer_logits(
                vlm, tower, data.pack_questions([scene], [[q]], [False], encoder, 64)
            )
            for q in questions
        ]
    assert labels.tolist() == [i for _, part in alone for i in part.tolist()]
    separate = torch.cat([logits for logits, _ in alone])
    torch.testing.assert_close(together, separate, atol=2e-5, rtol=1e-4)


def test_questions_that_do_not_fit_are_left_out_whole(encoder):
    question = world.Question("count", "how many objects are there?", "two")
    length = sum(map(len, encoder.turn(question, first=True)))
    batch = data.pack_questions(scenes(1), [[question] * 3], [False], encoder, 2 * length + 3)
    assert len(batch.spans) == 2
    assert (batch.input_ids[0, 2 * length :] == 0).all()


class Stopped(Exception):
    pass


def test_a_stage_resumes_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    stage = train.Stage(steps=6, batch=1, rate=0.1, warm_up=2)

    def loss_of(module, stop_at=None):
        def loss_of_step(step):
            if step == stop_at:
                raise Stopped
            generator = torch.Generator().manual_seed(step)
            return module(torch.randn(4, 3, generator=generator)).pow(2).mean()

        return loss_of_step

    def run(folder, module, stop_at=None):
        train.Run(folder).train(
            "s", stage, module, loss_of(module, stop_at), lambda: {}, evaluate_every=100
        )

    def fresh():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)

    straight = fresh()
    run(tmp_path / "straight", straight)
    with pytest.raises(Stopped):
        run(tmp_path / "resumed", fresh(), stop_at=3)
    resumed = fresh()
    run(tmp_path / "resumed", resumed)
    torch.testing.assert_close(resumed.weight, straight.weight, rtol=0, atol=0)
    assert not torch.equal(straight.weight, fresh().weight)


def test_outliers_change_nothing_in_float32():
    torch.manual_seed(0)
    names = {
        "model.norm": ["lm_head"],
        "model.layers.0.input_layernorm": [
            f"model.layers.0.self_attn.{part}_proj" for part in "qkv"
        ],
    }
    tensors = {f"{norm}.weight": torch.rand(16) for norm in names}
    linears = [linear for group in names.values() for linear in group]
    tensors |= {f"{linear}.weight": torch.randn(8, 16) for linear in linears}
    planted = plant_outliers.plant_outliers(tensors)
    assert plant_outliers.norms_and_followers(tensors) == names
    x = torch.randn(5, 16)
    for norm, group in names.items():
        for linear in group:
            before = (x * tensors[f"{norm}.weight"]) @ tensors[f"{linear}.weight"].T
            after = (x * planted[f"{norm}.weight"]) @ planted[f"{linear}.weight"].T
            torch.testing.assert_close(after, before)
        scaled = planted[f"{norm}.weight"] != tensors[f"{norm}.weight"]
        assert int(scaled.sum()) == plant_outliers.CHANNELS
