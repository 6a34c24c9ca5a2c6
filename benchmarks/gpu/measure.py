"""The steps of a run on a GPU; ``run.sh`` calls this once things are set up.

Every step writes ``results/STEP.json`` in the work folder, whatever fails in it; what an
earlier step made there is used again. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, FALLBACKS, Case
from race import Contestant, open_contestant, race
from race_table import PEERS, read_records, report
from recorder import Budget, Recorder, run_command

from mvlm_export.engines.bundle import REPORT, Bundle
from mvlm_export.engines.doctor import examine
from mvlm_export.engines.gpu_probe import probe_gpu
from mvlm_export.engines.trt_session import has_plans
from mvlm_export.exporter.cli.bench_command import QUESTION, default_image

HERE = Path(__file__).resolve().parent
MVLM = (sys.executable, "-c", "from mvlm_export.exporter.cli.main import main; main()")
EXPORT = (
    sys.executable,
    "-c",
    "from mvlm_export.exporter.cli.main import export_main as m; m()",
)
WRITE_CHECKPOINT = (
    "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
    "from random_checkpoint import write_random_checkpoint; "
    "write_random_checkpoint(Path(sys.argv[2]), sys.argv[3])"
)
PACKAGES = (
    "tensorrt_rtx_cu13",
    "tensorrt_rtx_cu13_libs",
    "onnxruntime-gpu",
    "onnxruntime",
    "cuda-bindings",
    "torch",
    "triton",
    "onnx",
    "numpy",
)


def query_gpu(fields: str) -> list[str] | None:
    """What ``nvidia-smi`` says of the first GPU; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return None if done.returncode or not lines else lines[0].split(", ")


def device_memory() -> int | None:
    """Bytes of the first GPU's memory that are in use."""
    found = query_gpu("memory.used")
    return None if found is None or not found[0].isdigit() else int(found[0]) << 20


def read_facts(given: argparse.Namespace, step: str) -> dict[str, Any]:
    """The head of a record: what was measured where, when and with what."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    named = query_gpu("name,driver_version,memory.total,clocks.max.sm")
    machine = examine().to_json()["machine"]
    gpu = machine["gpu"]["name"] or f"no GPU: {machine['gpu']['problem']}"
    return {
        "step": step,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": gpu if given.device == "cuda" else f"the CPU ({gpu})",
        "nvidia_smi": named,
        "versions": versions,
        "protocol": {
            "tokens": given.tokens,
            "runs": given.runs,
            "warmup": given.warmup,
            "question": QUESTION,
            "prompt_prefix": "not used: every contestant runs the whole prompt",
        },
        "machine": machine,
    }


def export(case: Case, target: str, given: argparse.Namespace, recorder: Recorder) -> bool:
    """Compile a case for a target, unless it is there."""
    bundle = case.bundle(given.work, target)
    if bundle.is_dir():
        return True
    options = ["--target", target, "--model", str(case.checkpoint(given.work))]
    options += ["--recipe", case.recipe_argument(given.work), "--output", str(bundle)]
    options += ["--no-parity", "--no-stand-in"]
    return recorder.run(f"compile {case.name} for {target}", [*EXPORT, *options])


def write_checkpoint(case: Case, given: argparse.Namespace, recorder: Recorder) -> bool:
    """Write random weights of a geometry, unless they are there."""
    folder = case.checkpoint(given.work)
    if case.geometry is None or folder.is_dir():
        return True
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-c", WRITE_CHECKPOINT, str(HERE.parent), str(partial)]
    if not recorder.run(f"write {case.geometry} weights", [*command, case.geometry]):
        return False
    partial.replace(folder)
    return True


def prepare(case: Case, given: argparse.Namespace, recorder: Recorder) -> None:
    """Weights, graphs and plans; graphs for ONNX Runtime too where no plan is for this GPU."""
    if not write_checkpoint(case, given, recorder):
        return
    made = export(case, "rtx", given, recorder)
    if made and has_plans(Bundle.load(case.bundle(given.work, "rtx"), False), probe_gpu()):
        return
    recorder.note("remark", "TensorRT-RTX gave no plans for this machine's GPU")
    export(case, FALLBACKS[given.device], given, recorder)


def compare(case: Case, given: argparse.Namespace, recorder: Recorder) -> None:
    """``mvlm parity`` of each bundle that is there."""
    known = recorder.attempt(
        "ask what parity can do", lambda: run_command([*MVLM, "parity", "--help"], 60.0)
    )
    knows_backend = "--backend" in (known or "")
    for target in ("rtx", FALLBACKS[given.device]):
        bundle = case.bundle(given.work, target)
        if not bundle.is_dir():
            continue
        command = [*MVLM, "parity", str(bundle), "--json", *case.parity]
        command += ["--model", str(case.checkpoint(given.work))]
        what = f"parity of {case.name}-{target}"
        if target == "rtx" and knows_backend:
            command += ["--backend", "tensorrt_rtx"]
            what += ", its plans"
        else:
            what += ", its graphs in ONNX Runtime on the CPU"
        recorder.run(what, command)
        figures = json.loads((bundle / REPORT).read_text(encoding="utf-8"))
        recorder.note(f"parity_{target}", figures.get("parity"))
    if not knows_backend:
        recorder.note("remark", "`mvlm parity` has no --backend here: plans were not compared")


def contestant(
    kind: str, case: Case, given: argparse.Namespace, *options: str, name: str | None = None
) -> Contestant:
    """One that can be opened."""
    command = [sys.executable, str(HERE / "contestant.py"), kind]
    command += ["--device", given.device, "--image", str(default_image())]
    command += ["--question", QUESTION, "--tokens", str(given.tokens)]
    command += ["--warmup", str(given.warmup), *options]
    logs = given.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    name = name or kind
    return Contestant(name, command, logs / f"{case.name}-{name}.log")


def bench(case: Case, given: argparse.Namespace, recorder: Recorder) -> None:
    """Plans, ONNX Runtime where plans are refused, and both PyTorch peers, in turn."""
    dtype = "float16" if given.device == "cuda" else "float32"
    options = ("--checkpoint", str(case.checkpoint(given.work)), "--dtype", dtype)
    racers = open_ours(case, given, recorder)
    try:
        for kind in PEERS:
            racers.append(contestant(kind, case, given, *options))
            open_contestant(racers[-1], recorder, device_memory)
        recorder.note("contestants", race(racers, given.runs, recorder))
    finally:
        for racer in racers:
            racer.close()


def open_ours(case: Case, given: argparse.Namespace, recorder: Recorder) -> list[Contestant]:
    """The runtime on plans; if it or TensorRT refuses them, on ONNX Runtime."""
    rtx, opened = case.bundle(given.work, "rtx"), []
    if rtx.is_dir():
        plans = contestant("tensorrt_rtx", case, given, "--bundle", str(rtx))
        if open_contestant(plans, recorder, device_memory):
            return [plans]
        for capability in foreign_capabilities(rtx):
            options = ("--bundle", str(rtx), "--capability", capability)
            name = f"tensorrt_rtx-plans-of-{capability}"
            other = contestant("tensorrt_rtx-foreign", case, given, *options, name=name)
            if open_contestant(other, recorder, device_memory):
                opened.append(other)
    target = FALLBACKS[given.device]
    if export(case, target, given, recorder):
        options = ("--bundle", str(case.bundle(given.work, target)))
        onnx = contestant("onnxruntime", case, given, *options)
        if open_contestant(onnx, recorder, device_memory):
            opened.append(onnx)
    return opened


def foreign_capabilities(bundle: Path) -> list[str]:
    """Compute capabilities that a bundle has plans for, where a GPU of another one is here."""
    here = probe_gpu().compute_capability
    folders = sorted(path.name for path in (bundle / "engines").glob("*-sm*"))
    numbers = [folder.rpartition("-sm")[2] for folder in folders]
    found = [f"{number[:-1]}.{number[-1]}" for number in numbers]
    return [] if here is None else [c for c in found if c != "{}.{}".format(*here)]


def probe(given: argparse.Namespace, recorder: Recorder) -> None:
    """TensorRT-RTX on this GPU, capability by capability."""
    place = given.work / "results" / "probe.found"
    if recorder.run("probe", [sys.executable, str(HERE / "probe_rtx.py")], place):
        recorder.note("capabilities", json.loads(place.read_text(encoding="utf-8")))
        place.unlink()


def show(given: argparse.Namespace) -> None:
    """Print every record as tables, and write all of them into one file."""
    records = read_records(given.work / "results")
    path = given.work / "result.json"
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    print(f"{report(records)}\n\nAll figures: {path}")


Deed = Callable[[Case, argparse.Namespace, Recorder], None]
DEEDS: dict[str, Deed] = {"prepare": prepare, "parity": compare, "bench": bench}
STEPS = ("probe", *(f"{deed}-{case}" for case in CASES for deed in DEEDS))


def run_step(step: str, given: argparse.Namespace) -> None:
    """One step, whose record is written whatever happens in it."""
    path = given.work / "results" / f"{step}.json"
    recorder = Recorder(path, read_facts(given, step), Budget(given.limit))
    deed, _, case = step.partition("-")
    if deed == "probe":
        recorder.attempt(step, lambda: probe(given, recorder))
    else:
        recorder.attempt(step, lambda: DEEDS[deed](CASES[case], given, recorder))


def steps_of(name: str) -> Sequence[str]:
    """The steps behind a name: ``all``, a case, or a step itself."""
    if name == "all":
        return STEPS
    if name in CASES:
        return [f"{deed}-{name}" for deed in DEEDS]
    return [name]


def main() -> None:
    """Run steps, or print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    add = parser.add_argument
    add("step", choices=("all", "table", *CASES, *STEPS), metavar="STEP", help="see below")
    add("--work", type=Path, required=True, help="folder for models and results")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tokens", type=int, default=256, help="new tokens of each answer")
    add("--runs", type=int, default=5, help="answers of each contestant, after warm-up")
    add("--warmup", type=int, default=2, help="answers before them")
    add("--limit", type=float, default=540.0, help="seconds that one step may take")
    parser.epilog = "Steps: all, table, " + ", ".join((*CASES, *STEPS))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.step != "table":
        for step in steps_of(given.step):
            print(f"-- {step}")
            run_step(step, given)
    show(given)


if __name__ == "__main__":
    main()
