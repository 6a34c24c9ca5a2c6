"""Loads come together to the very files that were cut, or say which part or load is wrong."""

import json

import pytest
from carry import NEEDED, choose, locked_versions, platforms, read_names
from parts import LARGEST_LOAD, PartsError, join, main, receive, split


@pytest.fixture
def cut(tmp_path):
    """Three files of 2500, 400 and 0 bytes in loads of 1000."""
    files = []
    for name, size in (("a.whl", 2500), ("b.whl", 400), ("empty.whl", 0)):
        path = tmp_path / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(i * 7 % 251 for i in range(size)))
        files.append(path)
    index = split(files, tmp_path / "loads", 1000)
    return files, index


def receive_all(tmp_path, numbers):
    for number in numbers:
        missing = receive(tmp_path / "loads" / f"load-{number:02d}", tmp_path / "store")
    return missing


def test_loads_are_full_and_come_together_in_any_order(cut, tmp_path):
    files, index = cut
    assert index.loads == 3
    sizes = [
        sum(path.stat().st_size for path in load.iterdir() if ".part-" in path.name)
        for load in sorted((tmp_path / "loads").iterdir())
    ]
    assert sizes == [1000, 1000, 900]
    assert receive_all(tmp_path, (3, 1)) == (2,)
    assert receive_all(tmp_path, (2,)) == ()
    joined = join(tmp_path / "store", tmp_path / "out")
    assert [path.read_bytes() for path in joined] == [path.read_bytes() for path in files]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        path.name for path in files
    ]


def test_a_missing_load_is_named(cut, tmp_path, capsys):
    receive_all(tmp_path, (1, 3))
    with pytest.raises(PartsError, match=r"lacks load-02 of 3 loads"):
        join(tmp_path / "store", tmp_path / "out")
    assert main(["join", str(tmp_path / "store"), str(tmp_path / "out")]) == 2
    assert "load-02" in capsys.readouterr().err


def test_a_damaged_part_is_named_on_arrival_and_later(cut, tmp_path):
    part = tmp_path / "loads" / "load-02" / "a.whl.part-002"
    whole = part.read_bytes()
    part.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(PartsError, match=r"a\.whl\.part-002 is damaged.*Send load 2 again"):
        receive_all(tmp_path, (2,))
    part.write_bytes(whole)
    receive_all(tmp_path, (1, 2, 3))
    (tmp_path / "store" / "b.whl.part-001").write_bytes(b"short")
    with pytest.raises(PartsError, match=r"b\.whl\.part-001 is damaged.*Receive load 3 again"):
        join(tmp_path / "store", tmp_path / "out")


def test_a_part_that_a_load_lost_is_named(cut, tmp_path):
    (tmp_path / "loads" / "load-03" / "b.whl.part-001").unlink()
    with pytest.raises(PartsError, match=r"b\.whl\.part-001 is not there"):
        receive_all(tmp_path, (3,))


def test_loads_of_two_cuts_do_not_mix(cut, tmp_path):
    receive_all(tmp_path, (1,))
    split([tmp_path / "files" / "a.whl"], tmp_path / "other", 1000)
    with pytest.raises(PartsError, match="not cut together"):
        receive(tmp_path / "other" / "load-01", tmp_path / "store")


def test_what_is_joined_already_is_checked_and_written_again_if_wrong(cut, tmp_path):
    receive_all(tmp_path, (1, 2, 3))
    first = join(tmp_path / "store", tmp_path / "out")[0]
    whole = first.read_bytes()
    first.write_bytes(bytes(len(whole)))
    assert join(tmp_path / "store", tmp_path / "out")[0].read_bytes() == whole


def test_what_cannot_be_cut_or_read_is_refused(cut, tmp_path):
    with pytest.raises(PartsError, match="is there already"):
        split([], tmp_path / "loads")
    with pytest.raises(PartsError, match="1 to 60000000 bytes"):
        split([], tmp_path / "new", LARGEST_LOAD + 1)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.json").write_text(json.dumps({"loads": 1}))
    with pytest.raises(PartsError, match="cannot be read as an index"):
        join(tmp_path / "store", tmp_path / "out")


def test_versions_are_the_lock_files_for_the_other_python(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(
        "# comment\nonnxruntime==1.23.2 ; python_full_version < '3.11'\n"
        "onnxruntime==1.31.1 ; python_full_version >= '3.11'\n"
        "cuda-bindings==13.4.4 ; platform_machine == 'x86_64'\n"
    )
    assert locked_versions("3.12", "x86_64", lock) == {
        "onnxruntime": "1.31.1",
        "cuda-bindings": "13.4.4",
    }
    assert locked_versions("3.10", "riscv64", lock) == {"onnxruntime": "1.23.2"}


def test_all_that_is_needed_is_locked_and_what_is_there_is_left_out(tmp_path):
    versions = locked_versions("3.12", "x86_64")
    everything = choose(versions, ())
    assert len(everything) == len(NEEDED)
    assert f"onnxruntime-gpu=={versions['onnxruntime']}" in everything
    have = tmp_path / "have.txt"
    have.write_text("# a freeze\nonnx_ir==1.0.0\nPillow==11\n\nclick @ file:///x\n")
    assert read_names(have) == {"onnx-ir", "pillow", "click"}
    left = [line.split("==")[0] for line in choose(versions, read_names(have))]
    assert set(NEEDED) - set(left) == {"onnx-ir", "pillow", "click"}


def test_pip_is_asked_for_every_glibc_up_to_the_newest():
    assert {"manylinux_2_28_x86_64", "manylinux2014_x86_64"} <= set(platforms("x86_64"))
