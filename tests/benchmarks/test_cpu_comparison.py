"""The comparison on the CPU: what follows from runs, the protocol, the reader of files."""

import sys
import xml.etree.ElementTree
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parents[2] / "benchmarks" / "cpu"
sys.path.insert(0, str(HERE))

from catalogue import INT8_ENCODER, PEERS, our_engine  # noqa: E402
from checkpoint_tensors import CheckpointTensors  # noqa: E402
from measurement import cosine  # noqa: E402
from plot import svg  # noqa: E402
from preparation import Preparation, only_run  # noqa: E402
from results import Results, Run, Spread, Subject, gigabytes_per_second  # noqa: E402
from run import choose, parse_bundles  # noqa: E402
from table import markdown, ratios  # noqa: E402
from worker_client import WorkerClient, WorkerFailedError  # noqa: E402

WHOLE = Subject("ours-int4", "ours, int4", 1_000_000, weights_read=2e9, kv_row_bytes=1e6)
DECODER = Subject("peer", "a peer", 2_000_000, encoder="eye")
ENCODER = Subject("eye", "an encoder", 3_000_000)
SUBJECTS = (WHOLE, DECODER, ENCODER)


def run(round_, engine, **values):
    return Run(round=round_, engine=engine, load=1.0, peak_rss=10**9, bandwidth=40.0, **values)


def ours(round_, seconds):
    """An answer of 256 tokens whose decode takes so long."""
    return run(
        round_,
        "ours-int4",
        tokens=256,
        steps=255,
        encode=2.0,
        project=0.5,
        prefill=2.0,
        decode=seconds,
        total=4.5 + seconds,
    )


def peer(round_, seconds, tokens=256):
    return run(
        round_,
        "peer",
        tokens=tokens,
        steps=tokens - 1,
        prefill=3.0,
        decode=seconds,
        total=3.0 + seconds,
    )


def eye(round_, seconds):
    return run(round_, "eye", encode=seconds, project=0.0, total=seconds)


def test_ratios_are_taken_in_each_round_before_the_median():
    """The machine is twice as slow in the second round and thrice in the third."""
    runs = [run for n in (1, 2, 3) for run in (ours(n, 5.0 * n), peer(n, 10.0 * n))]
    ratio = Results(SUBJECTS, runs, 256).ratio("ours-int4", "peer", "decode")
    assert ratio == Spread(2.0, 2.0, 2.0)


def test_a_ratio_of_seconds_says_how_many_times_faster():
    results = Results(SUBJECTS, [ours(0, 5.0), peer(0, 5.0)], 256)
    assert results.ratio("ours-int4", "peer", "prefill").median == 1.5
    assert results.ratio("peer", "ours-int4", "prefill").median == pytest.approx(2 / 3)


def test_rounds_that_only_one_engine_ran_give_no_ratio():
    results = Results(SUBJECTS, [ours(0, 5.0), peer(1, 5.0)], 256)
    assert results.ratio("ours-int4", "peer", "decode") is None


def test_a_decoder_is_completed_by_its_partner_of_the_same_round():
    runs = [peer(0, 7.0), eye(0, 1.0), peer(1, 7.0), eye(1, 2.0), peer(2, 7.0)]
    results = Results(SUBJECTS, runs, 256)
    totals = [results.total(run) for run in results.runs_of("peer")]
    assert totals == [11.0, 12.0, None]
    assert results.figures("peer").total == Spread(11.5, 11.0, 12.0)


def test_short_answers_and_encoders_have_no_total():
    results = Results(SUBJECTS, [peer(0, 4.0, tokens=16), eye(0, 1.0)], 256)
    assert results.figures("peer").total is None
    assert results.figures("eye").total is None
    assert "3.8 (3.8-3.8), 16 tokens" in markdown(results)


def test_bytes_read_count_the_cache_at_its_mean_length():
    read = gigabytes_per_second(ours(0, 25.5), WHOLE)
    assert read == pytest.approx((2e9 + 1e6 * (200 + 127.5)) * 10 / 1e9)
    assert gigabytes_per_second(eye(0, 1.0), ENCODER) is None
    share = Results(SUBJECTS, [ours(0, 25.5)], 256).figures("ours-int4").share_of_bandwidth
    assert share.median == pytest.approx(read / 40)


def test_the_table_has_a_row_for_each_engine_that_ran():
    results = Results(SUBJECTS, [ours(0, 5.0), eye(0, 1.0)], 256)
    lines = markdown(results).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "| 51.0 (51.0-51.0) |" in lines[2]
    assert "| an encoder | 1.00" in lines[3]
    assert "| an encoder | 0.40x" in ratios(results, "ours-int4").replace(" (0.40-0.40)", "")


def test_the_picture_has_a_bar_for_each_measured_value():
    results = Results(SUBJECTS, [ours(0, 5.0), peer(0, 8.0), eye(0, 1.0)], 256)
    root = xml.etree.ElementTree.fromstring(svg(results, "a < b"))
    bars = [rect for rect in root if rect.tag.endswith("rect") and "x" in rect.attrib]
    assert len(bars) == 2 + 2 + 2 + 2  # total, decode, prefill; two that see
    widths = [float(bar.get("width")) for bar in bars[2:4]]
    assert widths[0] / widths[1] == pytest.approx(8 / 5, abs=0.01)
    texts = [text.text for text in root if text.tag.endswith("text")]
    assert "a < b" in texts


def test_figures_are_plain_values():
    figures = Results(SUBJECTS, [ours(0, 5.0)], 256).figures("ours-int4").to_json()
    assert figures["prefill"] == asdict(Spread(2.0, 2.0, 2.0))
    assert figures["subject"]["name"] == "ours-int4"


def test_engines_bring_their_partners():
    chosen = choose({"int4": "int4"}, "ort-b128-sym,ours-int4")
    assert [engine.name for engine in chosen] == ["ours-int4", "ort-b128-sym", INT8_ENCODER]
    with pytest.raises(click.UsageError, match="no engine nothing"):
        choose({}, "nothing")
    with pytest.raises(click.UsageError, match="NAME=RECIPE"):
        parse_bundles(["int4"])


def test_every_engine_has_a_worker_and_its_partner_exists():
    engines = [our_engine("a"), *PEERS]
    names = [engine.name for engine in engines]
    assert len(set(names)) == len(names)
    for engine in engines:
        assert (HERE / engine.worker).is_file()
        assert engine.encoder is None or engine.encoder in names


def test_paths_are_told_to_workers_in_full(tmp_path):
    spec = our_engine("int4").spec(tmp_path, 32000, 2)
    assert spec["options"] == {"bundle": str(tmp_path / "bundles/int4"), "vocab_size": 32000}


def test_a_compiled_bundle_is_taken_as_it_is(tmp_path):
    bundle = tmp_path / "compiled"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("12345")
    work = tmp_path / "work"
    (work / "mini" / "checkpoint").mkdir(parents=True)
    preparation = Preparation(work, "mini", {"mine": str(bundle)})
    engine = our_engine("mine")
    preparation.prepare(engine, print)
    assert (work / "mini/bundles/mine").resolve() == bundle
    assert preparation.file_bytes(engine) == 5


def test_checkpoints_are_read_without_torch(tmp_path):
    torch.manual_seed(0)
    weights = {name: torch.randn(3, 5).to(torch.bfloat16) for name in "ab"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    tensors = CheckpointTensors(tmp_path)
    assert sorted(tensors.names()) == ["a", "b"]
    for name, weight in weights.items():
        np.testing.assert_array_equal(tensors.read(name), weight.float().numpy())


def test_other_dtypes_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="as F32"):
        CheckpointTensors(tmp_path)


WORKER = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import numpy as np
from worker_protocol import Worker, serve

class Counter(Worker):
    sees = speaks = True

    def load(self):
        print("noise among the replies", flush=True)
        self.features = None

    def facts(self):
        return {{"weights_read": 7}}

    def encode(self):
        self.features = 1

    def project(self):
        assert self.features == 1

    def prefill(self, ids):
        assert len(ids) == 200 and ids.max() < self.options["vocab_size"]
        self.steps = 0
        return 3

    def step(self, token):
        if self.options.get("fails"):
            raise RuntimeError("out of order")
        assert token == 3 + self.steps
        self.steps += 1
        return token + 1

    def outputs(self):
        return {{"logits": np.arange(self.steps)}}

serve(Counter)
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def start(**options):
        spec = {"options": {"vocab_size": 50, **options}, "threads": 1}
        return WorkerClient(Path(sys.executable), script, spec, tmp_path / "log")

    return start


def test_a_worker_answers_phase_by_phase(worker, tmp_path):
    with worker() as client:
        assert client.loaded["weights_read"] == 7
        taken = client.ask("answer", tokens=6)
        client.ask("outputs", file=str(tmp_path / "out.npz"))
    assert (taken["tokens"], taken["steps"]) == (6, 5)
    phases = sum(taken[name] for name in ("encode", "project", "prefill", "decode"))
    assert phases == pytest.approx(taken["total"], abs=1e-3)
    assert taken["peak_rss"] > 1e6
    with np.load(tmp_path / "out.npz") as found:
        assert len(found["logits"]) == 5
    assert "noise" in (tmp_path / "log").read_text()


def test_a_worker_that_breaks_is_told_with_its_log(worker, tmp_path):
    with (
        worker(fails=True) as client,
        pytest.raises(WorkerFailedError, match="code 1; what it said"),
    ):
        client.ask("answer", tokens=6)
    assert "out of order" in (tmp_path / "log").read_text()


def test_cosine():
    one = np.array([[1.0, 0.0]])
    assert cosine(one, np.array([[2.0, 0.0]])) == 1.0
    assert cosine(one, np.array([[0.0, 5.0]])) == 0.0


def test_a_work_folder_serves_one_run_at_a_time(tmp_path):
    with (
        only_run(tmp_path),
        pytest.raises(RuntimeError, match="Another comparison runs"),
        only_run(tmp_path),
    ):
        pass
    with only_run(tmp_path):
        assert (tmp_path / "lock").exists()
