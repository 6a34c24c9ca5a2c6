"""Weights that are read when they are written."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.deferred import (
    SMALL,
    DeferredValues,
    derive,
    is_deferred,
    stored_bytes,
    values_of,
)


class Source:
    """A weight that counts how often it is read."""

    def __init__(self, shape=(64, 32)):
        self.array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        self.reads = 0

    def constant(self, name="w"):
        def read():
            self.reads += 1
            return self.array

        return gs.Constant(name, DeferredValues(self.array.shape, np.float32, read))


def test_nothing_is_read_until_values_are_asked_for():
    source = Source()
    weight = source.constant()
    scaled = derive("v", [weight], lambda w: w * 2, weight.shape)
    assert source.reads == 0
    assert (tuple(scaled.shape), scaled.dtype) == ((64, 32), np.float32)
    np.testing.assert_array_equal(values_of(scaled), source.array * 2)
    values_of(scaled)
    assert source.reads == 2, "what was read is not kept"
    assert is_deferred(scaled)


def test_derived_constants_chain_and_outlive_changes_of_their_sources():
    one, two = Source(), Source()
    merged = derive(
        "m",
        [one.constant("a"), two.constant("b")],
        lambda a, b: np.concatenate([a, b], 1),
        (64, 64),
    )
    half = derive("h", [merged], lambda m: m, (64, 64), np.float16)
    merged._values = None
    expected = np.concatenate([one.array, two.array], 1).astype(np.float16)
    np.testing.assert_array_equal(values_of(half), expected)
    assert half._values.nbytes == 64 * 64 * 2


def test_small_ones_of_known_values_are_computed_at_once():
    small = derive("s", [gs.Constant("c", np.ones(4, np.float32))], lambda c: c + 1, (4,))
    assert not is_deferred(small)
    np.testing.assert_array_equal(small._values, np.full(4, 2, np.float32))
    large = np.ones(SMALL, np.float32)
    assert is_deferred(derive("l", [gs.Constant("c", large)], lambda c: c, large.shape))
    assert is_deferred(derive("d", [Source((2,)).constant()], lambda c: c, (2,)))


@pytest.mark.parametrize(
    ("compute", "complaint"),
    [
        (lambda w: w[:1], r"float32 \[1, 32\].*float32 \[64, 32\] was promised"),
        (None, "int32"),
    ],
    ids=["shape", "dtype"],
)
def test_a_broken_promise_is_an_error(compute, complaint):
    source = Source()
    if compute is None:
        values = DeferredValues((64, 32), np.float32, lambda: source.array.astype(np.int32))
        broken = gs.Constant("b", values)
    else:
        broken = derive("b", [source.constant()], compute, (64, 32))
    with pytest.raises(PassError, match=complaint):
        values_of(broken)


def test_two_4_bit_values_share_a_byte():
    import ml_dtypes

    assert stored_bytes((3, 5), np.float16) == 30
    assert stored_bytes((), np.int64) == 8
    assert stored_bytes((3, 5), ml_dtypes.int4) == 8
