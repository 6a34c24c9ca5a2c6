import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from mvlm_export.calibration.data import Sample, as_samples, choose_samples, read_samples
from mvlm_export.engines.errors import InputError

NANO = Path(__file__).parents[2] / "examples" / "nano"


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


def pictures(folder, count):
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(b"picture %d" % index)
    return paths


def test_a_folder_without_samples_says_what_is_read(tmp_path):
    with pytest.raises(InputError, match=r"samples\.jsonl.*list of conversations"):
        read_samples(tmp_path)


def test_own_samples(tmp_path):
    (image,) = pictures(tmp_path, 1)
    given = (Sample(path, "q", history=[["a", "b"]]) for path in (image, str(image)))
    assert as_samples(given) == [Sample(image, "q", history=(("a", "b"),))] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt must be a string"),
        ({"answer": 3}, "answer must be a string"),
        ({"kind": 3}, "kind must be a string"),
        ({"history": (("q",),)}, "pairs of strings"),
        ({"history": ("qa",)}, "pairs of strings"),
        ({"history": None}, "pairs of strings"),
        ({"history": (("q", None),)}, "pairs of strings"),
        ({"image": Path("nowhere.png")}, r"nowhere\.png does not exist"),
        ({"image": None}, "None does not exist"),
    ],
)
def test_own_samples_that_are_wrong_are_counted(tmp_path, change, message):
    (image,) = pictures(tmp_path, 1)
    good = Sample(image, "q")
    with pytest.raises(InputError, match=f"Sample 2.*{message}"):
        as_samples([good, replace(good, **change)])


def test_own_samples_must_be_some_and_be_samples():
    with pytest.raises(InputError, match="no samples"):
        as_samples([])
    with pytest.raises(InputError, match="Sample 1 is a str"):
        as_samples("samples")


def content(sample):
    return sample.prompt, sample.answer, sample.kind, sample.image.read_bytes()


def test_a_subset_is_the_same_in_any_order_and_any_place(tmp_path):
    (tmp_path / "moved").mkdir()
    samples = [
        Sample(path, f"q{n % 3}", f"a{n % 2}", f"kind {n % 4}")
        for n, path in enumerate(pictures(tmp_path, 40))
    ]
    moved = [
        replace(sample, image=path)
        for sample, path in zip(samples, pictures(tmp_path / "moved", 40), strict=True)
    ]
    random.Random(1).shuffle(moved)
    chosen = [content(sample) for sample in choose_samples(samples, 12)]
    assert chosen == [content(sample) for sample in choose_samples(moved, 12)]
    assert chosen != [content(sample) for sample in choose_samples(samples, 12, seed=1)]
    assert chosen[:7] == [content(sample) for sample in choose_samples(samples, 7)]


def test_a_subset_takes_kinds_in_turn(tmp_path):
    (image,) = pictures(tmp_path, 1)
    many = [Sample(image, f"q{n}", kind="many") for n in range(50)]
    few = [Sample(image, f"q{n}", kind="few") for n in range(3)]
    none = [Sample(image, f"q{n}") for n in range(20)]
    kinds = [sample.kind for sample in choose_samples([*many, *few, *none], 12)]
    assert all(set(kinds[n : n + 3]) == {"many", "few", None} for n in (0, 3, 6))
    assert [kinds.count(kind) for kind in ("few", "many", None)] in ([3, 5, 4], [3, 4, 5])
    assert len(choose_samples(many, 80)) == 50
    assert len({sample.prompt for sample in choose_samples(many, 80)}) == 50


def test_seeds_part_equal_words_by_their_pictures(tmp_path):
    samples = [Sample(path, "same", "words") for path in pictures(tmp_path, 30)]
    firsts = {choose_samples(samples, 1, seed)[0].image.name for seed in range(8)}
    assert len(firsts) > 3


def test_pictures_are_read_only_where_words_are_equal(tmp_path):
    gone = [Sample(tmp_path / f"gone {n}.png", f"q{n}") for n in range(9)]
    assert len(choose_samples(gone, 4)) == 4
    with pytest.raises(InputError, match="cannot be read"):
        choose_samples([gone[0], gone[0]], 1)


def test_a_subset_is_not_empty():
    with pytest.raises(InputError, match="at least one"):
        choose_samples([], 0)
    assert choose_samples([], 3) == []


def test_the_nano_models_own_questions():
    samples = read_samples(NANO / "images")
    chosen = choose_samples(samples, 5)
    assert len(samples) == 21
    assert {sample.kind for sample in chosen} == {sample.kind for sample in samples}
