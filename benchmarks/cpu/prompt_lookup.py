"""What looking tokens up gives at best: a text that repeats its prompt, on true sizes.

A random model writes nothing that repeats on purpose, so this one is built to: its layers add
next to nothing to the residual stream, and the head's row of a token is the embedding of the
token before it in a cycle, so that each token is followed by the next of its cycle. Matrices,
their sizes and their kernels are those of the random checkpoint. A prompt of 200 tokens ends
in one whole cycle; the answer goes round and round. Draft on and draft off take turns in one
process, on one session; both must give the same tokens.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_checkpoint import write_random_checkpoint

from mvlm_export.engines.backends import open_backend
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.decoder_state import DecoderState
from mvlm_export.engines.prompt import PromptIds
from mvlm_export.engines.prompt_lookup import GreedySteps
from mvlm_export.engines.session import BackendOptions
from mvlm_export.exporter.cli.console import StageProgress, print_table
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings

PERIOD, PROMPT, ANSWER = 12, 200, 256
"""Tokens of a cycle, of the prompt, and of the answer."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUIET = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""What writes to the residual stream."""


def write_cyclic_checkpoint(folder: Path, geometry: str) -> None:
    """A random checkpoint whose greedy answers go round cycles of ``PERIOD`` tokens."""
    write_random_checkpoint(folder, geometry)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    embedding = load_file(folder / index[EMBEDDING])[EMBEDDING]
    for file in sorted(set(index.values())):
        tensors = load_file(folder / file)
        for name in tensors:
            if name == HEAD:
                tensors[name] = embedding[_before(len(embedding))].contiguous()
            elif name.endswith(QUIET) and "vision" not in name:
                tensors[name] = tensors[name] * 1e-3
        save_file(tensors, folder / file, metadata={"format": "pt"})


def _before(count: int) -> torch.Tensor:
    """Of each token, the one before it in its cycle; the last tokens are a shorter cycle."""
    ids = torch.arange(count)
    start = ids // PERIOD * PERIOD
    period = torch.clamp(count - start, max=PERIOD)
    return start + (ids - start - 1) % period


def answer(
    state: DecoderState, prompt: PromptIds, width: int, vocab_size: int, most: int | None
) -> tuple[float, GreedySteps, list[int]]:
    """Seconds of decoding, the steps with their counts, and the answer's ids."""
    rows = np.zeros((1, width), np.float32)
    state.rewind(prompt)
    first = int(state.prefill(prompt, rows).argmax())
    steps = GreedySteps(state, [*prompt.ids.tolist(), first], rows, vocab_size, most)
    started = time.perf_counter()
    ids = [first, *(steps.next_id(ANSWER - given) for given in range(1, ANSWER))]
    return time.perf_counter() - started, steps, ids


def measure(bundle: Bundle, threads: int, rounds: int) -> dict[str, object]:
    """Tokens a second with and without, by round."""
    model = bundle.manifest.model
    backend = open_backend(bundle, "onnxruntime", BackendOptions(threads=threads))
    state = DecoderState(backend.open_decoder())
    ids = np.random.default_rng(0).integers(0, model.vocab_size, PROMPT).astype(np.int32)
    ids[-PERIOD:] = 10 * PERIOD + np.arange(PERIOD)
    prompt = PromptIds(ids)
    speeds: dict[str, list[float]] = {"plain": [], "looked up": []}
    kept: list[float] = []
    answers = set()
    for _ in range(rounds + 1):
        for name, most in (("plain", 0), ("looked up", None)):
            taken = answer(state, prompt, model.hidden_size, model.vocab_size, most)
            seconds, steps, tokens = taken
            speeds[name].append((ANSWER - 1) / seconds)
            answers.add(tuple(tokens))
            if most is None:
                kept.append(steps.kept / max(steps.guessed, 1))
    speeds = {name: values[1:] for name, values in speeds.items()}  # the first warms up
    pairs = zip(speeds["looked up"], speeds["plain"], strict=True)
    return {
        "tokens_per_second": speeds,
        "ratios": [fast / slow for fast, slow in pairs],
        "right": kept[1:],
        "answers_differ": len(answers) > 1,
    }


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Keeps the bundle."
)
@click.option("--geometry", default="v2-1.7b", show_default=True)
@click.option("--recipe", default=str(Path(__file__).with_name("int4-rtn.json")))
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    work: Path, geometry: str, recipe: str, rounds: int, threads: int, as_json: bool
) -> None:
    """Measure greedy decoding of a text that repeats its prompt, with and without look-up."""
    path = work / f"cyclic-{geometry}"
    if not path.is_dir():
        checkpoint = work / f"cyclic-{geometry}-checkpoint"
        if not checkpoint.is_dir():
            write_cyclic_checkpoint(checkpoint, geometry)
        settings = CompileSettings(
            output=path, model=checkpoint, target="cpu", recipe=recipe, parity=False
        )
        with StageProgress() as progress:
            compile_checkpoint(settings, progress)
    found = measure(Bundle.load(path, verify=False), threads, rounds)
    if as_json:
        click.echo(json.dumps({"machine": platform.platform(), "threads": threads, **found}))
        return
    speeds, ratios = found["tokens_per_second"], found["ratios"]
    assert isinstance(speeds, dict)
    assert isinstance(ratios, list)
    rows = [(name, f"{statistics.median(values):.1f}") for name, values in speeds.items()]
    rows.append(("ratio", f"{statistics.median(ratios):.2f}x"))
    rows.append(("same tokens", "no" if found["answers_differ"] else "yes"))
    print_table(f"{geometry}, {ANSWER} tokens after {PROMPT}", ("", "tokens/s"), rows)


if __name__ == "__main__":
    main()
