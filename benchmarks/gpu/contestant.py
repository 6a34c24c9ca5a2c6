"""One of those that race: a process that opens a model, warms up, and answers when told to.

It reads words on stdin: ``answer`` or ``quit``. On stdout it writes a line of JSON for each:
first ``{"ready": {...}}`` once warm-up is over, then ``{"answer": {...}}``; in place of either
``{"error": "..."}``, and ends. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mvlm_export.engines.errors import MvlmError

Answer = Callable[[], dict[str, Any]]
Describe = Callable[[], dict[str, Any]]


def open_torch(given: argparse.Namespace) -> tuple[Answer, Describe]:
    """PyTorch, eager or compiled."""
    from torch_peer import TorchPeer

    peer = TorchPeer(
        given.checkpoint,
        given.image,
        given.question,
        given.tokens,
        given.device,
        given.dtype,
        given.kind == "torch-compile",
    )
    return peer.answer, peer.describe


def open_ours(given: argparse.Namespace) -> tuple[Answer, Describe]:
    """A bundle in our runtime; prefix and picture are run anew each time, as PyTorch's are."""
    if given.kind == "onnxruntime" and given.device == "cuda":
        import torch  # noqa: F401 - loads the CUDA libraries that ONNX Runtime looks for

    from mvlm_export.engines import VLM
    from mvlm_export.engines.bench import bench

    backend, provider = "tensorrt_rtx", None
    if given.kind == "onnxruntime":
        backend, provider = "onnxruntime", given.device
    vlm = VLM.load(given.bundle, backend, provider, use_prefix=False, reuse=False)
    last: dict[str, Any] = {}

    def answer() -> dict[str, Any]:
        report = bench(vlm, given.image, given.question, given.tokens, runs=1, warmup=0)
        last.update(report.to_json())
        return {
            "seconds": {name: spread["median"] for name, spread in last["seconds"].items()},
            "decode_tokens_per_second": last["decode_tokens_per_second"]["median"],
            "tokens_per_second": last["tokens_per_second"]["median"],
            "ids": last["ids"],
        }

    def describe() -> dict[str, Any]:
        return {name: last[name] for name in ("load", "prompt_tokens", "bytes_per_token")}

    return answer, describe


def open_foreign(given: argparse.Namespace) -> tuple[Answer, Describe]:
    """Plans of another GPU, which our runtime would refuse to load: what does TensorRT say?"""
    from mvlm_export.engines import trt_session
    from mvlm_export.engines.gpu_probe import GpuInfo, probe_gpu

    major, minor = (int(number) for number in given.capability.split("."))
    found = probe_gpu()
    claimed = GpuInfo(found.name, (major, minor), found.problem)
    trt_session.probe_gpu = lambda: claimed  # in this process, which does nothing else
    return open_ours(given)


KINDS = {
    "tensorrt_rtx": open_ours,
    "tensorrt_rtx-foreign": open_foreign,
    "onnxruntime": open_ours,
    "torch-eager": open_torch,
    "torch-compile": open_torch,
}


def host_peak() -> int | None:
    """Bytes of memory that this process took at most; None where Linux does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else None


def serve(given: argparse.Namespace, replies: IO[str]) -> None:
    """Open, warm up, answer."""

    def say(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        answer, describe = KINDS[given.kind](given)
        started = time.perf_counter()
        for _ in range(given.warmup):
            answer()
        warmed = time.perf_counter() - started
        say(ready={**describe(), "warmup": warmed, "host_peak_bytes": host_peak()})
        for line in sys.stdin:
            if line.strip() != "answer":
                return
            say(answer=answer())
    except MvlmError as error:
        say(error=str(error))
    except Exception as error:  # noqa: BLE001 - passed on word for word
        say(error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Serve one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    add = parser.add_argument
    add("kind", choices=KINDS)
    add("--bundle", type=Path)
    add("--checkpoint", type=Path)
    add("--image", type=Path, required=True)
    add("--question", required=True)
    add("--tokens", type=int, required=True)
    add("--warmup", type=int, required=True)
    add("--device", choices=("cuda", "cpu"), required=True)
    add("--dtype", default="float16")
    add("--capability", help="that foreign plans are for, 8.6")
    given = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(given, replies)


if __name__ == "__main__":
    main()
