import json

import pytest

from mvlm_export.calibration.data import Sample, read_samples
from mvlm_export.engines.errors import InputError


def write_lines(folder, *lines):
    (folder / "a.png").write_bytes(b"x")
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_reads_a_folder_and_a_file(tmp_path):
    full = {"image": "a.png", "prompt": "what?", "answer": "that", "kind": "k"}
    path = write_lines(tmp_path, json.dumps(full), "", '{"image": "a.png", "prompt": "hm"}')
    expected = [
        Sample(tmp_path / "a.png", "what?", "that", "k"),
        Sample(tmp_path / "a.png", "hm"),
    ]
    assert read_samples(tmp_path) == expected
    assert read_samples(path) == expected
    assert read_samples(path, limit=1) == expected[:1]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0c", "\x1e"])
def test_only_a_newline_ends_a_line(tmp_path, mark):
    whole = json.dumps({"image": "a.png", "prompt": f"a{mark}b"}, ensure_ascii=ord(mark) < 32)
    last = '{"image": "a.png", "prompt": "last"}'
    write_lines(tmp_path, whole, last)
    assert [sample.prompt for sample in read_samples(tmp_path)] == [f"a{mark}b", "last"]


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = write_lines(tmp_path)
    lines = '{"image": "a.png", "prompt": "x"}\r\n\r\n{"image": "a.png", "prompt": "y"}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [sample.prompt for sample in read_samples(path)] == ["x", "y"]


def test_line_numbers_count_newlines_alone(tmp_path):
    write_lines(tmp_path, '{"image": "a.png", "prompt": "\u2028"}', "{")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"prompt": "x"}', '"image" must be a string'),
        ('{"image": "a.png"}', '"prompt" must be a string'),
        ('{"image": "a.png", "prompt": "x", "answer": 3}', '"answer" must be a string'),
        ('{"image": "b.png", "prompt": "x"}', r"b\.png does not exist"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    write_lines(tmp_path, '{"image": "a.png", "prompt": "ok"}', line)
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_samples(tmp_path / "nowhere.jsonl")
    write_lines(tmp_path, "")
    with pytest.raises(InputError, match="no samples"):
        read_samples(tmp_path)
