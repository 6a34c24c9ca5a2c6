import numpy as np
import pytest

from mvlm_export.exporter.parity_metrics import (
    INFINITELY_FAR,
    Distance,
    binomial_tail,
    distance,
    first_divergence,
    kl_divergence,
    negative_log_likelihood,
    top1_agreement,
)


def test_distance_by_hand():
    found, reference = np.array([3.0, 4.5]), np.array([3.0, 4.0])
    result = distance(found, reference)
    assert result.max_abs == pytest.approx(0.5)
    assert result.relative == pytest.approx(0.1)
    assert result.cosine == pytest.approx(27 / (29.25**0.5 * 5))


def test_distance_of_equal_and_of_empty():
    row = np.arange(5, dtype=np.float32)
    assert distance(row, row) == Distance(0.0, 0.0, 1.0)
    assert distance(row[:0], row[:0]) == Distance()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sides", ["found", "reference", "both"])
def test_not_finite_is_infinitely_far(bad, sides):
    broken, whole = np.array([bad, 0.0]), np.ones(2)
    found = whole if sides == "reference" else broken
    reference = whole if sides == "found" else broken
    assert distance(found, reference) == INFINITELY_FAR
    assert Distance(np.inf, np.inf, -1.0) == INFINITELY_FAR


def test_all_zero_output_is_far_from_anything():
    result = distance(np.zeros(3), np.ones(3))
    assert result.relative == pytest.approx(1.0)
    assert result.cosine == 0.0


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match="shapes differ"):
        distance(np.zeros((2, 1)), np.zeros((1, 2)))


def test_worst_keeps_the_worst_of_each():
    assert Distance(1, 0.5, 0.9).worst(Distance(2, 0.1, 0.8)) == Distance(2, 0.5, 0.8)


@pytest.mark.parametrize("swap", [False, True])
def test_worst_keeps_what_is_not_a_number(swap):
    broken, whole = Distance(np.nan, np.nan, np.nan), Distance(1.0, 1.0, 0.5)
    worst = whole.worst(broken) if swap else broken.worst(whole)
    assert np.isnan([worst.max_abs, worst.relative, worst.cosine]).all()


def test_kl_by_hand():
    reference = np.log(np.array([[0.5, 0.5]]))
    found = np.log(np.array([[0.25, 0.75]])) + 7.0
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_divergence(reference, found) == pytest.approx([expected])
    assert kl_divergence(reference, reference + 3.0) == pytest.approx([0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sides", ["found", "reference", "both"])
def test_rows_that_are_not_finite_never_agree(bad, sides):
    whole = np.array([[2.0, 1.0], [2.0, 1.0]])
    broken = whole.copy()
    broken[1, 0] = bad
    found = whole if sides == "reference" else broken
    reference = whole if sides == "found" else broken
    assert kl_divergence(reference, found).tolist() == [0.0, np.inf]
    assert top1_agreement(reference, found, tie=0.01) == 0.5


def test_top1_counts_rows_and_forgives_ties():
    reference = np.array([[1.0, 0.0], [1.0, 0.999], [0.0, 1.0], [2.0, 1.0]])
    found = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0]])
    assert top1_agreement(reference, found, tie=0.01) == 0.75
    assert top1_agreement(reference, found, tie=1e-6) == 0.5


@pytest.mark.parametrize(
    ("found", "reference", "place"),
    [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2], [1], 1)],
)
def test_first_divergence(found, reference, place):
    assert first_divergence(found, reference) == place


def test_likelihood_by_hand():
    logits = np.log(np.array([[0.5, 0.5], [0.2, 0.8]])) + 3.0
    found = negative_log_likelihood(logits, [1, 0])
    assert found == pytest.approx([-np.log(0.5), -np.log(0.2)])
    logits[0, 0] = np.nan
    assert negative_log_likelihood(logits, [1, 0]) == pytest.approx([np.inf, -np.log(0.2)])


def test_binomial_tail_by_hand_and_by_drawing():
    assert binomial_tail(7, 0, 0.05) == binomial_tail(0, 0, 0.05) == 1.0
    assert binomial_tail(7, -2, 0.05) == 1.0
    assert binomial_tail(7, 1, 0.05) == pytest.approx(1 - 0.95**7)
    assert binomial_tail(7, 7, 0.05) == pytest.approx(0.05**7, abs=1e-12)
    drawn = np.random.default_rng(0).binomial(2000, 0.05, 200_000)
    assert binomial_tail(2000, 120, 0.05) == pytest.approx((drawn >= 120).mean(), abs=2e-3)
