import json

import pytest

from mvlm_export.calibration.conversations import read_conversations
from mvlm_export.calibration.data import Sample, read_samples
from mvlm_export.engines.errors import InputError


def turns(*texts):
    return [
        {"from": ("human", "gpt")[index % 2], "value": text}
        for index, text in enumerate(texts)
    ]


def entry(*texts, **changes):
    return {"id": "7", "image": "a.png", "conversations": turns(*texts), **changes}


def write(folder, *entries, name="chat.json"):
    (folder / "a.png").write_bytes(b"x")
    path = folder / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_every_question_is_a_sample_with_the_turns_before_it(tmp_path):
    image = tmp_path / "a.png"
    path = write(
        tmp_path, entry("<image>\nwhat?", "that", "why?", "so"), entry("hm?\n<image>", "hm")
    )
    expected = [
        Sample(image, "what?", "that"),
        Sample(image, "why?", "so", history=(("what?", "that"),)),
        Sample(image, "hm?", "hm"),
    ]
    assert read_conversations(path) == expected
    assert read_samples(path) == expected
    assert read_samples(path, limit=2) == expected[:2]


def test_a_folder_with_one_json_file(tmp_path):
    write(tmp_path, entry("q", "a"))
    assert read_samples(tmp_path) == [Sample(tmp_path / "a.png", "q", "a")]


def test_sample_lines_come_before_a_json_file(tmp_path):
    write(tmp_path, entry("q", "a"))
    line = '{"image": "a.png", "prompt": "from the lines"}'
    (tmp_path / "samples.jsonl").write_text(line, encoding="utf-8")
    assert [sample.prompt for sample in read_samples(tmp_path)] == ["from the lines"]


def test_a_folder_with_several_json_files_is_ambiguous(tmp_path):
    write(tmp_path, entry("q", "a"))
    write(tmp_path, entry("q", "a"), name="other.json")
    with pytest.raises(InputError, match=r"2 \.json files \(chat\.json, other\.json\)"):
        read_samples(tmp_path)


def test_images_may_lie_in_folders_below(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_bytes(b"x")
    path = write(tmp_path, entry("q", "a", image="coco/1.jpg"))
    assert read_conversations(path)[0].image == tmp_path / "coco" / "1.jpg"


@pytest.mark.parametrize("name", ["chat.json", "CHAT.JSON"])
def test_the_ending_says_json_in_any_case(tmp_path, name):
    path = write(tmp_path, entry("q", "a"), name=name)
    assert len(read_samples(path)) == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["x"], "entry 2 is not a JSON object"),
        (entry("q", "a", image=None), r"entry 2 \(id 7\) has no image"),
        (entry("q", "a", image=["a.png"]), '"image" must be a string'),
        (entry("q", "a", image="b.png"), r"entry 2 .*b\.png does not exist"),
        (entry("q", "a", conversations="q"), '"conversations" must be a list'),
        (entry(), '"conversations" must be a list'),
        (entry("q", "a", "q"), "has 3 turns, so its last question has no answer"),
        (entry("q", "a", conversations=["q", "a"]), "turn 1 is not"),
        (entry("q", 3), "turn 2 is not"),
        (
            entry(conversations=[*turns("q"), {"from": "human", "value": "q"}]),
            "turn 2 is from 'human', but 'gpt' must speak",
        ),
        (
            entry(conversations=[{"from": "gpt", "value": "a"}]),
            "turn 1 is from 'gpt', but 'human' must speak",
        ),
        (entry("<image><image> q", "a"), "holds <image> 2 times or after the first"),
        (entry("q", "a", "<image> q", "a"), "holds <image> 1 times or after the first"),
        (entry("<image> q", "a", " \n", "a"), "turn 3 is empty"),
    ],
)
def test_bad_entries_are_named(tmp_path, second, message):
    path = write(tmp_path, entry("q", "a"), second)
    with pytest.raises(InputError, match=message):
        read_conversations(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"image": 1}\n{"image": 2}', r"is not JSON .* must be named \.jsonl"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "no list of conversations: it holds one dict"),
        ("[]", "holds no samples"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "chat.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_conversations(path)


def test_missing_file_and_wrong_bytes(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations(tmp_path / "latin.json")
