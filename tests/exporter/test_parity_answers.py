"""The judge of two answers, on logits made up by hand."""

import json

import numpy as np
import pytest

from mvlm_export.exporter.accuracy_report import AccuracyReport, ExactAnswers, TokenAccuracy
from mvlm_export.exporter.parity_answers import judge_answer, record_verdict, score_answers
from mvlm_export.exporter.parity_metrics import Distance
from mvlm_export.exporter.parity_report import (
    EndToEndParity,
    GraphParity,
    ParityReport,
    Verdict,
)
from mvlm_export.exporter.tolerances import TOLERANCES

TIE = 0.05
BEST = 4.0


def judge(found, wanted, reason="stop", **others):
    """PyTorch's logits hold ``BEST`` for its own token, and ``others["t<id>"]`` behind it."""

    def logits_at(place):
        logits = np.zeros(10, np.float32)
        logits[wanted[place]] = BEST
        for name, behind in others.items():
            logits[int(name[1:])] = BEST - behind
        return logits

    return judge_answer(found, wanted, reason, logits_at, TIE)


def unreachable(place):
    raise AssertionError(f"no logits are needed, but those of {place} were asked for")


def test_equal_answers():
    assert judge_answer([5, 6, 2], [5, 6, 2], "stop", unreachable, TIE).kind == "equal"


@pytest.mark.parametrize(("behind", "kind"), [(0.04, "tie"), (0.06, "different")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_only_a_near_tie_is_forgiven(behind, kind, place):
    wanted = [5, 6, 7]
    found = [*wanted[:place], 8, *wanted[place + 1 :]]
    verdict = judge(found, wanted, t8=behind)
    assert verdict.kind == kind
    assert f"token {place}" in verdict.reason


def test_logits_of_the_place_that_parts_are_asked():
    """Token n was chosen from row n; only there is token 9 close to PyTorch's."""
    rows = np.zeros((3, 10), np.float32)
    rows[[0, 1, 2], [5, 6, 7]] = BEST
    rows[2, 9] = BEST - 0.01
    for place, kind in ((0, "different"), (1, "different"), (2, "tie")):
        found = [5, 6, 7]
        found[place] = 9
        assert judge_answer(found, [5, 6, 7], "length", rows.__getitem__, TIE).kind == kind


def test_ending_by_the_other_stop_id_is_a_difference():
    assert judge([5, 3], [5, 2]).kind == "different"
    assert judge([5, 3], [5, 2], t3=0.01).kind == "tie"


def test_stop_id_that_is_judged_is_the_one_that_came():
    """PyTorch goes on; stop id 2 is nearly as good there, but the runtime stopped by 3."""
    assert judge([5, 3], [5, 6, 2], t2=0.01).kind == "different"
    assert judge([5, 2], [5, 6, 2], t2=0.01).kind == "tie"
    assert judge([5, 6, 2], [5, 2], t6=0.01).kind == "tie"


def test_early_end_without_a_stop_id_is_no_tie():
    verdict = judge_answer([5, 6], [5, 6, 7, 2], "context", unreachable, TIE)
    assert verdict.kind == "different"
    assert "after 2 tokens without a stop id ('context')" in verdict.reason
    assert judge_answer([], [5], "length", unreachable, TIE).kind == "different"


def test_going_on_behind_the_end_is_no_tie():
    verdict = judge_answer([5, 2, 6], [5, 2], "length", unreachable, TIE)
    assert verdict.kind == "different"
    assert "goes on to 3 tokens" in verdict.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_tie(bad):
    logits = np.zeros(10, np.float32)
    logits[8] = bad
    for wanted, found in ((8, 5), (5, 8)):
        verdict = judge_answer([found], [wanted], "length", lambda place: logits, TIE)
        assert verdict.kind == "different"


@pytest.mark.parametrize("precision", TOLERANCES)
def test_verdicts_are_counted(precision):
    """What differs is listed always, and fails where answers are held to PyTorch's."""
    parity, bound = EndToEndParity(4), TOLERANCES[precision]
    record_verdict(parity, judge([5], [5]), "a", bound)
    record_verdict(parity, judge([8], [5], t8=0.01), "b", bound)
    record_verdict(parity, judge([8], [5], t8=1.0), "'c' on d.png", bound)
    assert (parity.equal, parity.ties) == (1, 1)
    (difference,) = parity.differences
    assert difference.startswith("'c' on d.png: token 0 is 8, PyTorch's 5")
    assert parity.failures == ([difference] if precision.startswith("float") else [])


@pytest.mark.parametrize("precision", TOLERANCES)
def test_no_answer_fails_in_any_precision(precision):
    parity = EndToEndParity(1)
    verdict = Verdict("failed", "the runtime gave no answer: why")
    record_verdict(parity, verdict, "'a' on b.png", TOLERANCES[precision])
    assert parity.failures == ["'a' on b.png: the runtime gave no answer: why"]


def test_accuracy_counts_a_missing_answer_as_wrong():
    parity = EndToEndParity(3)
    for answer, truth, kind in (("a", "a ", "x"), (None, "b", "y"), ("c", None, "y")):
        item = {"answer": answer, "reference": "a", "truth": truth, "kind": kind}
        parity.answers.append(item)
    score_answers(parity)
    assert (parity.known, parity.accuracy, parity.reference_accuracy) == (2, 0.5, 0.5)
    assert parity.by_kind["y"] == {"samples": 1, "accuracy": 0.0, "reference_accuracy": 0.0}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("relative", [np.nan, np.inf])
def test_figures_that_are_not_finite_miss_every_bound(relative, precision):
    bound, graph = TOLERANCES[precision], GraphParity("decoder", precision)
    graph.check("logits", Distance(relative, relative, np.nan), bound)
    assert not graph.check_finite("cache rows", Distance(relative, relative, np.nan))
    graph.check_tokens(0.0, relative, 1.0, bound)
    graph.check_tokens(0.0, 0.0, np.nan, bound)
    assert len(graph.failures) == 4


def test_bounds_of_tokens():
    bound, graph = TOLERANCES["int4"], GraphParity("decoder", "int4")
    graph.check_tokens(7.0, 0.9 * bound.kl_mean, bound.top1, bound)
    assert graph.failures == []  # the worst row is reported, not judged
    graph.check_tokens(7.0, 1.1 * bound.kl_mean, bound.top1 - 0.01, bound)
    assert [text.split()[0] for text in graph.failures] == ["mean", "top-1"]
    strict = TOLERANCES["float16"]
    graph = GraphParity("decoder", "float16")
    graph.check_tokens(1.1 * strict.kl, 0.0, 1.0, strict)
    assert [text.split()[0] for text in graph.failures] == ["KL"]


def test_json_has_no_number_that_json_lacks():
    graph = GraphParity("decoder", "float32", Distance(np.nan, np.inf, -np.inf), kl=np.inf)
    tokens = TokenAccuracy(1, 1, 0, np.inf, np.inf, np.inf, 0.0, None, None)
    accuracy = AccuracyReport({}, {}, [], tokens, ExactAnswers(0), ["mean KL inf"])
    report = ParityReport("onnxruntime", [graph], EndToEndParity(0), accuracy)
    (found,) = json.loads(json.dumps(report.to_json(), allow_nan=False))["graphs"]
    assert found["values"] == {"max_abs": "nan", "relative": "inf", "cosine": "-inf"}
    assert (found["kl"], found["top1"]) == ("inf", None)
    figures = json.loads(json.dumps(accuracy.to_json(), allow_nan=False))
    assert figures["tokens"]["kl_mean"] == "inf"
    assert report.failures == ["accuracy: mean KL inf"]
    assert report.passed is figures["passed"] is False
