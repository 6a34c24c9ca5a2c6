"""The engines that are compared: what each is made of, and how its worker opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIP_PIXELS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
INT8_ENCODER = "ort-int8-dynamic"
"""The engine whose encoder decoders without one are paired with."""


@dataclass(frozen=True)
class Engine:
    """One row of the comparison.

    Attributes:
        name: on the command line and in JSON.
        title: in the table.
        env: environment of its worker, ``ours`` or a peer's.
        worker: the script.
        options: what the worker opens; paths relative to the folder of the geometry.
        files: what it needs on disk, whose bytes are counted; relative likewise.
        steps: set-up steps that make these files.
        encoder: the engine whose encoder completes this one's total, where it has none.
        tokens: of its answers where the usual number would take too long.
        whole: it has a path of its own from question to answer, measured besides.
    """

    name: str
    title: str
    env: str
    worker: str
    options: Mapping[str, Any]
    files: Sequence[str]
    steps: Sequence[str]
    encoder: str | None = None
    tokens: int | None = None
    whole: bool = False
    path_options: Sequence[str] = field(default=())

    def spec(self, folder: Path, vocab_size: int, threads: int) -> dict[str, Any]:
        """What the worker is told first."""
        options = dict(self.options, vocab_size=vocab_size)
        for key in self.path_options:
            options[key] = str(folder / options[key])
        return {"options": options, "threads": threads}


def our_engine(name: str) -> Engine:
    """A bundle of ours, by the name it was given."""
    folder = f"bundles/{name}"
    return Engine(
        name=f"ours-{name}",
        title=f"mvlm-export, {name}",
        env="ours",
        worker="worker_ours.py",
        options={"bundle": folder},
        path_options=("bundle",),
        files=(folder,),
        steps=(f"bundle:{name}",),
        whole=True,
    )


def _llama(kind: str, mmproj: str) -> Engine:
    files = {"decoder": f"gguf/decoder-{kind}.gguf", "mmproj": f"gguf/mmproj-{mmproj}.gguf"}
    return Engine(
        name=f"llama-{kind}",
        title=f"llama.cpp {kind.upper()}, mmproj {mmproj.upper()}",
        env="llama",
        worker="worker_llama.py",
        options=files,
        path_options=tuple(files),
        files=tuple(files.values()),
        steps=("gguf",),
    )


@dataclass(frozen=True)
class GenaiForm:
    """Settings of ONNX Runtime GenAI's builder."""

    block: int
    symmetric: bool

    @property
    def name(self) -> str:
        return f"b{self.block}-{'sym' if self.symmetric else 'asym'}"


GENAI_FORMS = {
    form.name: form for form in (GenaiForm(b, s) for b in (32, 128) for s in (True, False))
}
GENAI_DEFAULT = "b32-sym"


def _ort(form: GenaiForm) -> Engine:
    kind = "" if form.symmetric else " asymmetric"
    return Engine(
        name=f"ort-{form.name}",
        title=f"ONNX Runtime, GenAI's graph INT4 block {form.block}{kind}",
        env="genai",
        worker="worker_ort_decoder.py",
        options={"folder": f"genai/{form.name}"},
        path_options=("folder",),
        files=(f"genai/{form.name}",),
        steps=(f"genai:{form.name}",),
        encoder=INT8_ENCODER,
    )


def _torch(name: str, title: str, graphs: Sequence[str], dtype: str, **more: Any) -> Engine:
    return Engine(
        name=name,
        title=title,
        env="ours",
        worker="worker_torch.py",
        options={
            "checkpoint": "checkpoint",
            "graphs": list(graphs),
            "dtype": dtype,
            "compile": "compile" in name,
        },
        path_options=("checkpoint",),
        files=("checkpoint",),
        steps=("checkpoint",),
        **more,
    )


SEEING = ("vision_encoder", "projector")
ALL = (*SEEING, "decoder")

PEERS: Sequence[Engine] = (
    _llama("q4_0", "f16"),
    _llama("q4_k_m", "q8_0"),
    *(_ort(form) for form in GENAI_FORMS.values()),
    Engine(
        name="genai-api",
        title="ONNX Runtime GenAI's API, its default INT4",
        env="genai",
        worker="worker_genai.py",
        options={"folder": f"genai/{GENAI_DEFAULT}"},
        path_options=("folder",),
        files=(f"genai/{GENAI_DEFAULT}",),
        steps=(f"genai:{GENAI_DEFAULT}",),
        encoder=INT8_ENCODER,
    ),
    Engine(
        name=INT8_ENCODER,
        title="ONNX Runtime INT8 dynamic encoder",
        env="genai",
        worker="worker_ort_encoder.py",
        options={"folder": "ort-int8-dynamic", "pixels": CLIP_PIXELS},
        path_options=("folder",),
        files=("ort-int8-dynamic",),
        steps=("ort-int8-dynamic",),
    ),
    _torch("torch-bf16", "PyTorch eager bfloat16", ALL, "bfloat16", tokens=16),
    _torch("torch-fp32", "PyTorch eager float32", ALL, "float32", tokens=16),
    _torch("torch-compile-fp32", "torch.compile float32 encoder", SEEING, "float32"),
    _torch("torch-compile-bf16", "torch.compile bfloat16 encoder", SEEING, "bfloat16"),
    _torch(
        "torch-compile-decoder-bf16",
        "torch.compile bfloat16 decoder",
        ("decoder",),
        "bfloat16",
        tokens=16,
        encoder="torch-compile-bf16",
    ),
)

REFERENCE = "torch-fp32"
"""Whose numbers the others' are compared with."""
