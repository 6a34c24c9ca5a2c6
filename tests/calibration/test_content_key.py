from dataclasses import replace
from pathlib import Path

import pytest

from mvlm_export.calibration.content_key import samples_key
from mvlm_export.calibration.data import Sample, read_samples
from mvlm_export.engines.errors import InputError

NANO = Path(__file__).parents[2] / "examples" / "nano" / "images"


@pytest.fixture
def sample(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    return Sample(tmp_path / "a.png", "q", "a", "kind", (("earlier", "turn"),))


def test_places_and_kinds_do_not_count(tmp_path, sample):
    (tmp_path / "b.png").write_bytes(b"picture")
    moved = replace(sample, image=tmp_path / "b.png", kind=None)
    assert samples_key([sample]) == samples_key([moved])
    assert len(samples_key([sample])) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "q2"},
        {"answer": None},
        {"answer": ""},
        {"history": ()},
        {"history": (("earlier", "turn"), ("q", "a"))},
        {"prompt": "a", "answer": "q"},
        {"prompt": "\ud83d"},
    ],
)
def test_words_count(sample, change):
    assert samples_key([sample]) != samples_key([replace(sample, **change)])


def test_pictures_count(sample):
    before = samples_key([sample])
    sample.image.write_bytes(b"another")
    assert samples_key([sample]) != before


def test_number_and_order_count(sample):
    other = replace(sample, prompt="q2")
    keys = [
        samples_key(samples)
        for samples in ([sample], [sample, sample], [sample, other], [other, sample], [])
    ]
    assert len(set(keys)) == 5


def test_a_picture_that_is_gone_is_named(sample):
    sample.image.unlink()
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        samples_key([sample])


def test_the_key_of_the_nano_models_questions_stays():
    """Caches outlive versions: change the key only together with what it is made of."""
    assert (
        samples_key(read_samples(NANO))
        == "299976ffd58706702084576fe8dd045cff88218cc76a3eb59e4f3953b1b4648a"
    )
