"""Does TensorRT-RTX build for, load on and run on this GPU? One small product tells.

NVIDIA's papers name the GPUs that TensorRT-RTX serves, and Hopper is not among them. So each
compute capability that its builder knows is tried, and so are its own choice (no capability
named) and the GPU at hand (``CURRENT``): built, loaded, run and compared with PyTorch, each in
a process of its own, as a library that meets a GPU it does not know may end the process.

    python probe_rtx.py            all of them, as JSON
    python probe_rtx.py SM80       one of them
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np

from mvlm_export.engines.trt_api import LogRecord, load_tensorrt, tensorrt_log

SIZE = 64
OWN_CHOICE = "default"
LIMIT = 120.0
"""Seconds for one capability."""


def capabilities() -> list[str]:
    """What can be tried."""
    known = load_tensorrt("tensorrt_rtx").ComputeCapability
    return [OWN_CHOICE, "CURRENT", *sorted(n for n in dir(known) if n.startswith("SM"))]


def errors_in(records: list[LogRecord]) -> str:
    """What TensorRT logged as errors, word for word."""
    return " | ".join(record.text for record in records if record.is_error) or "no message"


def build(trt: Any, capability: str) -> Any:  # noqa: ANN401 - TensorRT has no stubs
    """A plan of ``x @ weight`` in float16; None if TensorRT gives none."""
    builder = trt.Builder(tensorrt_log(trt).logger)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (SIZE, SIZE))
    weight = weights()
    constant = network.add_constant((SIZE, SIZE), trt.Weights(weight)).get_output(0)
    kind = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(x, kind, constant, kind).get_output(0)
    product.name = "y"
    network.mark_output(product)
    config = builder.create_builder_config()
    if capability != OWN_CHOICE:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    return builder.build_serialized_network(network, config)


def weights() -> np.ndarray[Any, np.dtype[np.float16]]:
    """float16 [SIZE, SIZE], always the same."""
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE))
    return np.ascontiguousarray(values.astype(np.float16))


def run(trt: Any, engine: Any) -> float:  # noqa: ANN401
    """Largest difference from PyTorch's product on the GPU."""
    import torch

    context = engine.create_execution_context()
    torch.manual_seed(0)
    x = torch.randn(SIZE, SIZE, device="cuda").half()
    y = torch.empty_like(x)
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError("execute_async_v3 gave False")
    stream.synchronize()
    return float((y - x @ torch.from_numpy(weights()).cuda()).abs().max())


def try_capability(capability: str) -> dict[str, Any]:
    """How far one capability gets, and what TensorRT said where it stopped."""
    trt = load_tensorrt("tensorrt_rtx")
    log = tensorrt_log(trt)
    with log.collecting() as records:
        plan = build(trt, capability)
        if plan is None:
            return _outcome(capability, "build", errors_in(records))
    with log.collecting() as records:
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
        if engine is None:
            return _outcome(capability, "load", errors_in(records))
    with log.collecting() as records:
        try:
            difference = run(trt, engine)
        except Exception as error:  # noqa: BLE001 - whatever it says is the finding
            said = f"{type(error).__name__}: {error} | {errors_in(records)}"
            return _outcome(capability, "run", said)
    return {
        "capability": capability,
        "runs": True,
        "difference": difference,
        "outcome": f"built, loaded and ran; largest difference from PyTorch {difference:.2g}",
    }


def _outcome(capability: str, stage: str, said: str) -> dict[str, Any]:
    return {
        "capability": capability,
        "runs": False,
        "stage": stage,
        "outcome": f"{_REACHED[stage]}: {said}",
    }


_REACHED = {
    "build": "not built",
    "load": "built, not loaded",
    "run": "built and loaded, not run",
}
"""In words, by the stage that failed."""


def try_apart(capability: str) -> dict[str, Any]:
    """:func:`try_capability` in a process of its own."""
    command = [sys.executable, __file__, capability]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        said, stage = f"no result after {LIMIT:.0f} s", "timeout"
    else:
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
        said = f"ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}"
        stage = "crash"
    return {"capability": capability, "runs": False, "stage": stage, "outcome": said}


def main() -> None:
    """Try one or all."""
    if len(sys.argv) > 1:
        print(json.dumps(try_capability(sys.argv[1])))
    else:
        print(json.dumps([try_apart(capability) for capability in capabilities()]))


if __name__ == "__main__":
    main()
