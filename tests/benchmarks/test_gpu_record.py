"""What fails is written down word for word, and the rest goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from race import Contestant, open_contestant, race
from race_table import compare, format_table, read_records, report, same_beginning
from recorder import Budget, Recorder

RUN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"

SCRIPT = """
import json, sys, time
kind, speed = sys.argv[1], float(sys.argv[2])
say = lambda **message: print(json.dumps(message), flush=True)
if kind == "refuses":
    print("the log's last line", file=sys.stderr)
    say(error="TensorRT plans need a GPU")
    sys.exit()
if kind == "hangs":
    time.sleep(60)
say(ready={"load": 1.0})
for count, line in enumerate(sys.stdin):
    if kind == "dies" and count == 1:
        sys.exit("segmentation fault, as it were")
    seconds = {n: speed * (1 + count) for n in
               ("vision", "projector", "prefill", "time_to_first_token", "total")}
    say(answer={"seconds": seconds, "decode_tokens_per_second": 1 / speed,
                "tokens_per_second": 0.5 / speed, "ids": [3, 1, 4 if speed < 1 else 5]})
"""


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path / "results" / "step.json", {"date": "2026"}, Budget(30))


def written(recorder):
    return json.loads(recorder.path.read_text())


def fake(tmp_path, kind, speed=1.0):
    command = [sys.executable, "-c", SCRIPT, kind, str(speed)]
    return Contestant(kind, command, tmp_path / f"{kind}.log")


def test_a_failed_command_is_recorded_with_what_it_said(recorder):
    code = "import sys; print('Error: SM90 is not known', file=sys.stderr); sys.exit(2)"
    assert not recorder.run("build", [sys.executable, "-c", code])
    assert not recorder.run("build", ["no-such-program"])
    first, second = written(recorder)["attempts"]
    assert first["error"] == "exit code 2\nError: SM90 is not known"
    assert first["command"] == [sys.executable, "-c", code]
    assert "cannot be started" in second["error"]


def test_any_exception_is_a_finding_and_the_step_goes_on(recorder):
    assert recorder.attempt("divide", lambda: 1 / 0) is None
    assert recorder.attempt("add", lambda: 1 + 1) == 2
    assert [a["error"] for a in written(recorder)["attempts"]] == [
        "ZeroDivisionError: division by zero",
        None,
    ]


def test_a_command_ends_with_the_steps_time(tmp_path):
    """What it has started ends with it, or its output would be waited for."""
    recorder = Recorder(tmp_path / "step.json", {}, Budget(3))
    command = ["sh", "-c", "echo so far >&2; sleep 600; echo never"]
    assert not recorder.run("wait", command)
    assert not recorder.run("more", command)
    late, never = (a["error"] for a in written(recorder)["attempts"])
    assert late.startswith("ended after") and late.endswith("so far")
    assert never == "not started: the step's time was used up"


def test_output_goes_to_a_file(recorder, tmp_path):
    assert recorder.run("say", [sys.executable, "-c", "print(7)"], tmp_path / "said")
    assert (tmp_path / "said").read_text() == "7\n"


def test_a_race_goes_on_without_those_that_refuse_or_die(recorder, tmp_path):
    racers = [
        fake(tmp_path, kind, s) for kind, s in (("runs", 0.5), ("dies", 2), ("refuses", 1))
    ]
    opened = [open_contestant(racer, recorder, lambda: None) for racer in racers]
    assert opened == [True, True, False]
    found = race(racers, 3, recorder)
    assert set(found) == {"runs", "dies"}
    assert found["runs"]["runs"] == 3
    assert found["runs"]["seconds"]["total"] == 1.0  # of 0.5, 1 and 1.5
    assert found["runs"]["same_every_run"] and found["runs"]["load"] == 1.0
    assert found["dies"]["runs"] == 1
    for racer in racers:
        racer.close()
    errors = {a["what"]: a["error"] for a in written(recorder)["attempts"] if a["error"]}
    assert errors == {
        "open refuses": "TensorRT plans need a GPU\nthe log's last line",
        "answer of dies": "crashed with exit code 1\nsegmentation fault, as it were",
    }


def test_one_that_hangs_is_ended(tmp_path):
    """In time for the others to race."""
    recorder = Recorder(tmp_path / "step.json", {}, Budget(20))
    quick = fake(tmp_path, "runs")
    assert open_contestant(quick, recorder, lambda: None)
    assert not open_contestant(fake(tmp_path, "hangs"), recorder, lambda: None)
    assert recorder.attempts[1].error.startswith("ended after")
    assert race([quick], 1, recorder)["runs"]["runs"] == 1
    quick.close()


def test_device_memory_is_what_opening_took(recorder, tmp_path):
    used = iter((1000, 5000))
    racer = fake(tmp_path, "runs")
    assert open_contestant(racer, recorder, lambda: next(used))
    assert racer.ready["device_bytes"] == 4000
    racer.close()


def figures(scale, ids):
    phases = ("vision", "projector", "prefill", "time_to_first_token", "total")
    return {
        "seconds": dict.fromkeys(phases, 0.01 / scale),
        "decode_tokens_per_second": 100.0 * scale,
        "tokens_per_second": 50.0 * scale,
        "ids": ids,
    }


def test_ratios_are_ours_over_the_peers():
    found = {
        "tensorrt_rtx": {**figures(3, [1, 2, 9]), "device_bytes": 2e6},
        "torch-eager": figures(1, [1, 2, 3]),
        "torch-compile": figures(2, [1, 2, 3]),
    }
    head, ours, eager, _ = (line.split() for line in compare(found).splitlines())
    assert head[-6:] == ["all", "x", "compile", "ids", "as", "compile"]
    assert ours[:9] == ["tensorrt_rtx", *["3.3"] * 5, "300.0", "150.0", "2"]
    assert ours[9:] == ["3.00", "3.00", "2/3", "1.50", "1.50", "2/3"]
    assert eager[-6:] == ["1.00", "1.00", "3/3", "0.50", "0.50", "3/3"]
    assert "compile" not in compare({name: found[name] for name in list(found)[:2]})


def test_a_report_shows_failures_and_verdicts(tmp_path):
    failed = {"what": "open tensorrt_rtx", "seconds": 1.0, "error": "no kernel\nfor sm90"}
    fine = {"what": "compile", "seconds": 2.0, "error": None}
    record = {"date": "1", "device": "H", "attempts": [fine, failed]}
    record["parity_rtx"] = {"passed": False, "failures": ["kl is 2"]}
    record["capabilities"] = [{"capability": "SM80", "outcome": "built, not loaded: why"}]
    (tmp_path / "b.json").write_text(json.dumps(record))
    (tmp_path / "a.json").write_text(json.dumps({"date": "2", "remark": "none"}))
    records = read_records(tmp_path)
    assert list(records) == ["b", "a"]
    text = report(records)
    assert "FAILED open tensorrt_rtx (1.0 s):\n    no kernel\n    for sm90" in text
    assert "FAILED compile" not in text
    assert "parity of rtx: kl is 2" in text and "SM80: built, not loaded: why" in text


def test_small_parts_of_tables():
    assert same_beginning([1, 2, 3], [1, 2, 4]) == 2
    assert same_beginning([], [1]) == 0
    assert format_table(("a", "b"), [("long", "1")]) == "a     b\nlong  1"


def test_the_shell_script_parses_and_explains_itself(tmp_path):
    subprocess.run(["bash", "-n", str(RUN)], check=True)
    shown = subprocess.run([str(RUN)], capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert "run.sh receive LOAD" in shown.stdout


def test_setup_without_loads_says_so(tmp_path):
    options = ["--python", sys.executable, "--work", tmp_path / "w", "--store", tmp_path / "s"]
    done = subprocess.run(
        [str(RUN), *map(str, options), "setup"], capture_output=True, text=True, check=True
    )
    assert "No loads in" in done.stdout
    assert (tmp_path / "w" / "path" / "mvlm_export" / "engines" / "vlm.py").is_file()
