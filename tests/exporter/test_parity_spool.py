import tempfile
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines.errors import EngineError
from mvlm_export.exporter.parity_spool import Spool, open_spool
from mvlm_export.exporter.reference import ForcedRun, Step


def random_step(generator, rows):
    tensors = [generator.random((rows, 2, 4), dtype=np.float32) for _ in range(4)]
    return Step(generator.random((rows, 7), dtype=np.float32), tensors)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_spool_gives_back_what_it_got(tmp_path, steps):
    generator = np.random.default_rng(steps)
    run = ForcedRun(
        random_step(generator, 5), [random_step(generator, 1) for _ in range(steps)]
    )
    with open_spool(tmp_path / "bundle") as spool:
        assert spool.folder.parent == tmp_path
        spool.write_run(3, run)
        spool.write("pixels", 3, run.prefill.logits)
        found = spool.read_run(3)
        np.testing.assert_array_equal(spool.read("pixels", 3), run.prefill.logits)
        for place, step in enumerate([run.prefill, *run.decode]):
            np.testing.assert_array_equal(spool.read_logits(3, place), step.logits[-1])
    assert len(found.decode) == steps
    pairs = zip([found.prefill, *found.decode], [run.prefill, *run.decode], strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.logits, b.logits)
        for row, wanted in zip(a.rows, b.rows, strict=True):
            np.testing.assert_array_equal(row, wanted)
    assert list(tmp_path.iterdir()) == []


def test_spool_lies_elsewhere_where_the_bundle_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_spool(Path("/nowhere/bundle")) as spool:
        assert spool.folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_full_disk_says_what_to_do(tmp_path):
    with pytest.raises(EngineError, match="Free space there"):
        Spool(tmp_path / "gone").write("pixels", 0, np.zeros(3))
