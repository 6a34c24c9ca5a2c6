"""The whole check on a tiny model: what it finds, where it ends, what it leaves behind."""

import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mvlm_export.calibration.data import Sample, read_samples
from mvlm_export.engines.bundle import Bundle, write_json
from mvlm_export.engines.errors import EngineError, InputError, MissingPackageError
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.models.components import COMPONENTS
from mvlm_export.exporter.parity import ParityCheck
from mvlm_export.exporter.parity_spool import Spool
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import CompileSettings

from .conftest import Silent

STAGES = [
    "Running PyTorch's vision encoder",
    "Running PyTorch's projector",
    "Comparing vision_encoder with PyTorch",
    "Comparing projector with PyTorch",
    "Answering with PyTorch",
    "Comparing decoder with PyTorch, teacher-forced",
    "Answering with the runtime",
]


class Watching(Silent):
    """Calls ``watch(stage, done)`` at each stage's begin (done 0) and after each part."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def stage(self, title):
        super().stage(title)
        self.watch(title, 0)

    def advance(self, done, total, label):
        self.watch(self.stages[-1], done)


@pytest.fixture
def check(compiled, checkpoint, samples):
    """Makes a check of the compiled bundle; arguments replace its parts."""

    def make(bundle=None, questions=None, listener=None, max_tokens=4, threads=1):
        return ParityCheck(
            bundle or compiled.bundle,
            ReferenceModel.open(checkpoint),
            questions or read_samples(samples),
            listener or Silent(),
            max_tokens,
            threads,
        )

    return make


def broken_copy(compiled, folder, graph, tensor, change):
    """The bundle with one weight changed, as a wrong rewrite would.

    Args:
        tensor: the weight's name in the checkpoint; rewrites have put more behind it.
    """
    path = folder / "broken"
    shutil.copytree(compiled.bundle.path, path)
    file = path / graph / "model.onnx"
    model = onnx.load(str(file))
    (initializer,) = (
        t
        for t in model.graph.initializer
        if t.name == tensor or t.name.startswith(f"{tensor}.")
    )
    array = change(onnx.numpy_helper.to_array(initializer).copy())
    initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
    (path / graph / "model.onnx.data").unlink()
    onnx.save(model, str(file), save_as_external_data=True, location="model.onnx.data")
    return Bundle.load(path, verify=False)


def scale_value(array):
    """One column of the value projection, which stands last in the merged weight."""
    array[:, -1] *= 1.5
    return array


@pytest.mark.parametrize(
    ("graph", "tensor", "change", "blamed"),
    [
        ("vision_encoder", "pre_layrnorm.weight", lambda a: a * 1.01, "vision_encoder"),
        ("projector", "mlp.mlp.2.bias", lambda a: a + 0.05, "projector"),
        ("decoder", "lm_head.weight", lambda a: a * 1.01, "decoder: logits"),
        ("decoder", "model.layers.1.self_attn.q_proj.weight", scale_value, "decoder: cache"),
        ("decoder", "rotary_sin", lambda a: -a, "decoder: cache"),
    ],
)
def test_parity_finds_a_wrong_graph(
    compiled, checkpoint, samples, tmp_path, graph, tensor, change, blamed
):
    bundle = broken_copy(compiled, tmp_path, graph, tensor, change)
    reference = ReferenceModel.open(checkpoint)
    check = ParityCheck(bundle, reference, read_samples(samples, 1), Silent(), 4, threads=1)
    report = check.run()
    assert not report.passed
    assert any(failure.startswith(blamed) for failure in report.failures), report.failures
    others = [part.graph for part in report.graphs if part.failures]
    assert others == [graph]


@pytest.mark.parametrize("side", ["bundle", "reference"])
def test_nan_on_either_side_fails(check, compiled, tmp_path, monkeypatch, side):
    """NaN image rows reach both decoders in the second case: equal NaN is no agreement."""
    bundle = compiled.bundle
    if side == "bundle":
        nan = np.float32("nan")
        bundle = broken_copy(
            compiled, tmp_path, "decoder", "lm_head.weight", lambda a: a * nan
        )
    else:
        real = ReferenceModel.image_embeds
        monkeypatch.setattr(
            ReferenceModel, "image_embeds", lambda *args: real(*args) * np.float32("nan")
        )
    report = check(bundle).run()
    failures = "\n".join(report.failures)
    assert "decoder: logits are not finite" in failures
    assert "decoder: KL inf" in failures
    if side == "bundle":
        assert "runtime gave no answer" in failures
        assert report.end_to_end.equal == 0
    else:
        assert "projector: outputs are not finite" in failures
    figures = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert figures["passed"] is False


def changed_copy(compiled, folder, **changes):
    """The bundle with other fields in its manifest's model."""
    path = folder / "changed"
    shutil.copytree(compiled.bundle.path, path)
    manifest = compiled.bundle.manifest
    manifest = replace(manifest, model=replace(manifest.model, **changes))
    write_json(path / "manifest.json", manifest.to_json())
    return Bundle.load(path, verify=False)


def test_answers_that_a_stop_id_ends(check, compiled, tmp_path):
    bundle = compiled.bundle
    first, second = spied_answers(check(bundle, max_tokens=6))
    stops = (2, first[2], second[1])
    report = check(changed_copy(compiled, tmp_path, stop_ids=stops), max_tokens=6).run()
    assert report.passed, report.failures
    assert report.end_to_end.equal == 2
    stopped = spied_answers(
        check(Bundle.load(tmp_path / "changed", verify=False), max_tokens=6)
    )
    for ids, full in zip(stopped, (first, second), strict=True):
        ends = [place for place, token in enumerate(full) if token in stops]
        assert ids == full[: ends[0] + 1]
        assert len(ids) < 6


def spied_answers(parity_check):
    """PyTorch's answers in a check's run."""
    answers, real = [], parity_check.reference.greedy_run

    def spy(*args):
        answers.append(real(*args)[0])
        return real(*args)

    parity_check.reference.greedy_run = spy
    parity_check.run()
    return answers


def filling_sample(check, samples, room):
    """A sample whose prompt leaves ``room`` positions."""
    image = samples / "0.png"

    def length(words):
        made = check(questions=[Sample(image, "@" * words)])
        return len(made.cases[0].prompt), made.model.max_positions

    base, positions = length(10)
    assert length(20)[0] == base + 10
    return Sample(image, "@" * (10 + positions - room - base), answer="?")


def test_answer_ends_where_the_positions_do(check, samples):
    made = check(questions=[filling_sample(check, samples, 3)], max_tokens=40)
    assert made.cases[0].limit == 3
    assert made.model.max_positions == len(made.cases[0].prompt) + 3
    (answer,) = spied_answers(made)
    assert len(answer) == 3
    report = made.run()
    assert report.passed, report.failures
    assert report.end_to_end.equal == 1


def test_earlier_turns_are_kept(check, samples):
    """On both sides: greedy answers and true ones come behind the whole conversation."""
    first = read_samples(samples, 1)[0]
    later = replace(first, prompt="why?", history=((first.prompt, "so"), ("who?", "they")))
    bare = replace(later, history=())
    made = check(questions=[later, bare], max_tokens=6)
    with_turns, without = made.cases
    text = made._given.tokenizer.decode([i for i in with_turns.prompt.tolist() if i < 512])
    assert text.endswith(
        f"{first.prompt} ASSISTANT: so USER: who? ASSISTANT: they USER: why? ASSISTANT:"
    )
    assert with_turns.truth == without.truth
    answers = spied_answers(made)
    assert answers[0] != answers[1]
    report = made.run()
    assert report.passed, report.failures
    assert report.end_to_end.equal == 2


def test_bundle_of_fewer_positions_than_the_checkpoint(check, checkpoint, tmp_path):
    length = max(len(case.prompt) for case in check().cases)
    settings = CompileSettings(
        output=tmp_path / "short", model=checkpoint, max_length=length + 2, parity=False
    )
    made = check(compile_checkpoint(settings, Silent()).bundle, max_tokens=40)
    assert min(case.limit for case in made.cases) == 2
    report = made.run()
    assert report.passed, report.failures
    assert report.end_to_end.equal == 2


def test_sample_that_leaves_no_room_is_refused(check, samples):
    too_long = filling_sample(check, samples, 1)
    too_long = replace(too_long, prompt=too_long.prompt + "@")
    with pytest.raises(InputError, match=r"0\.png.* takes 256 positions.* has 256"):
        check(questions=[too_long])


def test_reference_alone_knows_its_positions(checkpoint):
    reference = ReferenceModel.open(checkpoint)
    prompt, embeds = np.full(254, 5, np.int32), np.zeros((1, 64), np.float32)
    answer, run = reference.greedy_run(prompt, embeds, 40)
    assert len(answer) == 2
    assert len(run.decode) == 1
    with pytest.raises(InputError, match="256 positions"):
        reference.greedy_run(np.full(256, 5, np.int32), embeds, 40)


def test_picture_or_question_that_cannot_be_used_is_named(check, samples, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"'what\?' on .*broken\.png cannot be used"):
        check(questions=[Sample(broken, "what?")])
    with pytest.raises(InputError, match=r"0\.png cannot be used"):
        check(questions=[Sample(samples / "0.png", "<image> and <image>?")])


@pytest.mark.parametrize("field", ["max_tokens", "threads"])
def test_settings_that_cannot_be_used(check, field):
    with pytest.raises(InputError, match=field):
        check(**{field: 0}).run()


@pytest.mark.parametrize("graph", ["projector", "decoder"])
def test_graph_that_does_not_load_is_named(check, compiled, tmp_path, graph):
    bundle = changed_copy(compiled, tmp_path)
    bundle.graph_path(graph).write_bytes(b"no graph")
    with pytest.raises(EngineError, match=f"cannot load the graph '{graph}'"):
        check(bundle).run()


def test_graph_that_does_not_run_is_named(check, compiled, tmp_path):
    """A shorter rotary table than the manifest says: ONNX Runtime's own InvalidArgument."""
    bundle = broken_copy(compiled, tmp_path, "decoder", "rotary_cos", lambda a: a[:40])
    with pytest.raises(EngineError, match="cannot run the graph 'decoder'"):
        check(bundle).run()


def test_graph_of_another_shape_is_named(check, monkeypatch):
    real = ReferenceModel.image_features
    monkeypatch.setattr(ReferenceModel, "image_features", lambda *args: real(*args)[:, 1:])
    monkeypatch.setattr(ReferenceModel, "image_embeds", lambda self, features: features)
    with pytest.raises(EngineError, match=r"'vision_encoder' gives .*\[1, 16, 32\]"):
        check().run()


def test_onnxruntime_is_asked_for_when_missing(check, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"mvlm-export\[cpu\]"):
        check()


def test_import_does_not_need_onnxruntime():
    code = "import sys; sys.modules['onnxruntime'] = None; import mvlm_export.exporter.parity"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_stage_reports_its_progress(check):
    seen = []
    report = check(listener=Watching(lambda stage, done: seen.append((stage, done)))).run()
    assert report.passed
    assert seen == [(stage, done) for stage in STAGES for done in (0, 1, 2)]


def test_one_component_in_memory_at_a_time(check, monkeypatch):
    sessions = weakref.WeakSet()
    real = onnxruntime.InferenceSession

    def opened(*args, **options):
        session = real(*args, **options)
        sessions.add(session)
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    seen = {}

    def watch(stage, done):
        loaded = [name for name in COMPONENTS if name in vars(made.reference)]
        seen.setdefault(stage, []).append((loaded, len(sessions)))

    made = check(listener=Watching(watch))
    made.run()
    nothing, vision = ([], 0), (["vision_encoder"], 0)
    projector, decoder = (["projector"], 0), (["decoder"], 0)
    graph, runtime = ([], 1), ([], 3)
    expected = [
        [nothing, vision, vision],
        [nothing, projector, projector],
        [nothing, graph, graph],
        [nothing, graph, graph],
        [nothing, decoder, decoder],
        [nothing, graph, graph],
        [nothing, runtime, runtime],
    ]
    assert list(seen.values()) == expected
    assert vars(made.reference)["_checkpoint"] is None


def test_runs_wait_on_disk(check, compiled, samples, monkeypatch):
    """However many samples, no run stays in memory between two of them."""
    made, kept, files = [], [], []
    real_answer, real_read = ReferenceModel.greedy_run, Spool.read_run

    def answer(*args):
        ids, run = real_answer(*args)
        made.append(weakref.ref(run))
        return ids, run

    def read(*args):
        run = real_read(*args)
        made.append(weakref.ref(run))
        return run

    def watch(stage, done):
        kept.append(sum(run() is not None for run in made))
        files.append(len(list(compiled.bundle.path.parent.glob(".*.parity.*/run-*.npz"))))

    monkeypatch.setattr(ReferenceModel, "greedy_run", answer)
    monkeypatch.setattr(Spool, "read_run", read)
    questions = read_samples(samples) * 3
    check(questions=questions, listener=Watching(watch), max_tokens=2).run()
    assert len(made) == 2 * len(questions)
    assert max(kept) == 0
    assert max(files) == len(questions)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("stage", [STAGES[0], STAGES[4], STAGES[6]])
def test_nothing_is_left_behind(check, compiled, error, stage):
    place, threads = compiled.bundle.path.parent, torch.get_num_threads()
    before, during = sorted(place.iterdir()), []

    def watch(current, done):
        during.append((len(list(place.iterdir())), torch.get_num_threads()))
        if error is not None and (current, done) == (stage, 1):
            raise error

    made = check(listener=Watching(watch), threads=threads + 1)
    if error is None:
        made.run()
    else:
        with pytest.raises(error):
            made.run()
    assert set(during) == {(len(before) + 1, threads + 1)}
    assert sorted(place.iterdir()) == before
    assert torch.get_num_threads() == threads
    assert not [name for name in COMPONENTS if name in vars(made.reference)]


def test_threads_are_left_alone_without_a_number(check):
    before, seen = torch.get_num_threads(), set()
    check(listener=Watching(lambda *_: seen.add(torch.get_num_threads())), threads=None).run()
    assert seen == {before}
