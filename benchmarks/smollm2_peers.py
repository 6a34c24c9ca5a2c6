"""ONNX Runtime's weight-only quantizers on the same float decoder, method by method.

Each quantizes the same products of the same file; ONNX Runtime then runs them with float32
inputs. Weights that another tool has rounded (a safetensors file by LLaMA's parameter names)
are put into the same graph and scored on the same windows.

    python benchmarks/smollm2_peers.py --assets DIR --work DIR --group-size 128
    python benchmarks/smollm2_peers.py --assets DIR --work DIR --rounded NAME=FILE.safetensors
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import onnx
from decoder_scores import FloatArray, Ids, Score, decoder_feeds, score_logits, window_logits
from onnx_sessions import open_session
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from ort_weight_only import FeedReader, quantize_weights
from safetensors.torch import load_file
from smollm2 import calibration_ids, evaluation_ids, open_model, write_decoder

from mvlm_export.engines.errors import InputError
from mvlm_export.exporter.cli.console import human_bytes, print_table

GROUP_SIZES = (128, 64, 32)
FLOAT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class Job:
    """What a method is given.

    Attributes:
        group_size: rows that share a scale.
        calibration: ids [n, 512], for methods that need some.
        feeds: makes a decoder's inputs out of ids [S].
    """

    group_size: int
    calibration: Ids
    feeds: Callable[[Ids], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One of ONNX Runtime's methods.

    Attributes:
        config: makes its settings.
        symmetric: no zero points.
    """

    name: str
    config: Callable[[Job, bool], nbits.WeightOnlyQuantConfig]
    symmetric: bool


def _plain(job: Job, symmetric: bool) -> nbits.WeightOnlyQuantConfig:
    return nbits.DefaultWeightOnlyQuantConfig(job.group_size, is_symmetric=symmetric)


def _gptq(job: Job, symmetric: bool) -> nbits.WeightOnlyQuantConfig:
    # Its groups take their range where a block begins, so blocks are as long as groups.
    return nbits.GPTQWeightOnlyQuantConfig(
        FeedReader(job.feeds(ids) for ids in job.calibration), block_size=job.group_size
    )


METHODS = (
    Method("round to nearest", _plain, symmetric=True),
    Method("round to nearest", _plain, symmetric=False),
    Method("k-quant", lambda j, s: nbits.KQuantWeightOnlyQuantConfig(), symmetric=False),
    Method("HQQ", lambda j, s: nbits.HQQWeightOnlyQuantConfig(j.group_size), symmetric=False),
    Method("GPTQ", _gptq, symmetric=True),
    Method("GPTQ", _gptq, symmetric=False),
)


def quantize(path: Path, method: Method, job: Job, output: Path, head: bool) -> Path:
    """Quantize a float decoder; ``output``.

    Args:
        output: in a folder of its own, which is emptied first.
        head: quantize the product that gives logits too.
    """
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir(parents=True)
    excluded = [] if head else head_nodes(path)
    config = method.config(job, method.symmetric)
    model = quantize_weights(path, config, job.group_size, method.symmetric, excluded)
    model.save_model_to_file(str(output), use_external_data_format=True)
    return output


def head_nodes(path: Path) -> list[str]:
    """Names of the products that give logits.

    Raises:
        InputError: there are none.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    found = [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and "lm_head" in node.input[1]
    ]
    if not found:
        raise InputError(f"{path} has no product by lm_head.")
    return found


def quantized_bytes(path: Path) -> int:
    """Bytes of 4-bit weights, zero points and scales, scales counted as float16."""
    graph = onnx.load(str(path), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    return sum(
        _stored_bytes(tensors[name])
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for name in node.input[1:]
        if name
    )


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    count = 1
    for axis in tensor.dims:
        count *= axis
    return 2 * count if tensor.data_type in FLOAT_TYPES else count


@dataclass(frozen=True)
class Row:
    """One method's result.

    Attributes:
        bytes: of the quantized weights; None where they came as floats.
        seconds: it took to quantize.
    """

    name: str
    bytes: int | None
    seconds: float
    score: Score


@dataclass
class Bench:
    """The float decoder, its logits on the evaluation windows, and what is scored on them."""

    assets: Path
    work: Path
    threads: int | None
    head: bool

    def __post_init__(self) -> None:
        self.windows = evaluation_ids(self.assets)
        self.path = write_decoder(self.assets, self.work / "shipped")
        self.session = open_session(self.path, self.threads)
        self.wanted = list(window_logits(self.session, self.windows))

    def rows(self, methods: Sequence[Method], group_size: int) -> Iterator[Row]:
        """Score methods at one group size."""
        yield Row("float32", None, 0.0, score_logits(self.wanted, self.windows, self.wanted))
        job = Job(
            group_size,
            calibration_ids(self.assets),
            lambda ids: decoder_feeds(self.session, ids),
        )
        for method in methods:
            started = time.perf_counter()
            output = self.work / "quantized" / "model.onnx"
            quantize(self.path, method, job, output, self.head)
            seconds = time.perf_counter() - started
            name = f"{method.name}, {'sym' if method.symmetric else 'asym'}, {group_size}"
            yield Row(name, quantized_bytes(output), seconds, self.score(output))

    def rounded(self, name: str, file: Path) -> Row:
        """Score weights that another tool has rounded; what the file lacks is as it was."""
        original, weights = open_model(self.assets), load_file(file)

        def read(parameter: str) -> Any:  # noqa: ANN401
            found = weights.get(parameter)
            return original.read(parameter) if found is None else found.float()

        path = write_decoder(self.assets, self.work / "rounded", read)
        return Row(name, None, 0.0, self.score(path))

    def score(self, path: Path) -> Score:
        logits: Iterator[FloatArray] = window_logits(path, self.windows, self.threads)
        return score_logits(logits, self.windows, self.wanted)


@click.command()
@click.option("--assets", type=click.Path(path_type=Path), required=True, help="Downloads.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Graphs, 3 GB.")
@click.option("--group-size", type=click.Choice([str(g) for g in GROUP_SIZES]), default="128")
@click.option("--method", "only", multiple=True, help="Names to run. Default: all.")
@click.option("--rounded", multiple=True, metavar="NAME=FILE", help="Score these instead.")
@click.option("--head", is_flag=True, help="Quantize lm_head too.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    assets: Path,
    work: Path,
    group_size: str,
    only: tuple[str, ...],
    rounded: tuple[str, ...],
    head: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Quantize the decoder by each method, and score it on the evaluation windows."""
    bench, rows = Bench(assets, work, threads, head), []
    if rounded:
        pairs = [item.partition("=") for item in rounded]
        found = (bench.rounded(name, Path(file)) for name, _, file in pairs)
    else:
        methods = [m for m in METHODS if not only or m.name in only]
        found = bench.rows(methods, int(group_size))
    for row in found:
        click.echo("  ".join(_cells(row)), err=True)
        rows.append(row)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print_rows(rows, head)


def print_rows(rows: Sequence[Row], head: bool) -> None:
    """The table."""
    print_table(
        f"SmolLM2-135M-Instruct in 4 bits, lm_head {'too' if head else 'in float32'}",
        ("method", "weights", "perplexity", "divergence", "same token", "s"),
        [_cells(row) for row in rows],
    )


def _cells(row: Row) -> tuple[str, ...]:
    gap = row.score.distance
    return (
        row.name,
        "" if row.bytes is None else human_bytes(row.bytes),
        f"{row.score.perplexity:.3f}",
        "" if gap is None else f"{gap.divergence:.4f}",
        "" if gap is None else f"{gap.agreement:.2%}",
        f"{row.seconds:.0f}",
    )


if __name__ == "__main__":
    main()
