"""What a bundle says about itself: the records of ``manifest.json``, checked when read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import PureWindowsPath
from typing import Any, cast

from .errors import BundleError
from .kv_cache import KV_FORMS, KvForm, cache_names

SCHEMA_VERSION = 1
GRAPHS = ("vision_encoder", "projector", "decoder")
"""The graphs of every bundle."""

NEXT_TOKEN = "next_token"
"""Output that a decoder may have beside the others: the likeliest next id, int64 [1], or one
behind each of the last rows."""

LAST_ROWS = "R"
"""Axis of logits that are those of the last rows alone: R = min(S, logits_rows)."""

GRAPH_DTYPES = ("float32", "float16")
CACHE_DTYPES = (*GRAPH_DTYPES, "int8")
_PIXEL_DTYPES = (*GRAPH_DTYPES, "uint8")
_TENSOR_DTYPES = (*GRAPH_DTYPES, "int64", "int32", "int8", "uint8", "bool")
_LARGEST = 2**31 - 1
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; an axis is a number or the name of a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph of the bundle.

    Attributes:
        file: path of ``model.onnx`` inside the bundle; its data file lies beside it.
        dtype: ``float32`` or ``float16``, of weights, cache and image tensors.
        may_saturate: whether sums of 8-bit products may saturate on an x86 CPU without VNNI.
    """

    file: str
    dtype: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    may_saturate: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """What the runtime must know of the model.

    Attributes:
        max_positions: longest sequence, prompt and answer together.
        image_tokens: decoder rows that one image takes.
        stop_ids: token ids that end an answer.
        template: name of the prompt template in ``engines.prompt``.
        image_processor: ``ImageProcessorConfig`` as a JSON object.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    image_tokens: int
    stop_ids: tuple[int, ...]
    template: str
    image_processor: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The whole of ``manifest.json``.

    Attributes:
        kv_form: ``append``: the decoder returns the new cache rows alone, sequence-major;
            ``fixed``: it writes them into the whole cache, head-major, at ``past_length``.
        logits_rows: most rows of logits that the decoder gives, where their axis is
            ``LAST_ROWS``.
        cache_scales: what a code of an int8 cache is worth, for each of its tensors: key 0,
            value 0, key 1, ...; empty where the cache holds floats.
        files: sha256 of every file the bundle was made with, by path inside it.
        tools: versions of the packages that made the bundle.
        source: where the weights came from: checkpoint ``path`` and ``fingerprint``.
    """

    model: ModelSpec
    target: str
    recipe: str
    graphs: Mapping[str, GraphSpec]
    kv_form: KvForm = "append"
    jetpack: int | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    logits_rows: int = 1
    cache_scales: tuple[float, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def pixel_dtype(self) -> str:
        """``uint8`` if the vision encoder takes raw pixels, else that of normalised ones."""
        return self.graphs["vision_encoder"].inputs[0].dtype

    @property
    def cache_dtype(self) -> str:
        """Element type of the decoder's cache."""
        names = cache_names("past_key_values", 1)
        inputs = self.graphs["decoder"].inputs
        return next(tensor.dtype for tensor in inputs if tensor.name in names)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads back unchanged."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read a manifest.

        Raises:
            BundleError: another schema version, or a field is missing, unknown or wrong; the
                message names it.
        """
        version = data.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise BundleError(
                f"The bundle's manifest has schema version {version!r}; this package reads "
                f"version {SCHEMA_VERSION}. Compile the bundle again with this version, or "
                "install the version that wrote it."
            )
        top = _Record(data, "", cls)
        model = _read_model(_Record(top["model"], "model", ModelSpec))
        kv_form = top.choice("kv_form", KV_FORMS) if "kv_form" in top.data else "append"
        graphs = _read_graphs(top, model.num_layers, cast("KvForm", kv_form))
        readers: dict[str, Callable[[str], Any]] = {
            "kv_form": lambda _: kv_form,
            "jetpack": lambda key: None if top[key] is None else top.size(key),
            "tools": top.texts,
            "checks": top.mapping,
            "files": lambda key: _read_files(top, key),
            "source": top.texts,
            "logits_rows": top.size,
            "cache_scales": lambda key: _read_scales(top, key),
        }
        optional = {key: read(key) for key, read in readers.items() if key in top.data}
        manifest = cls(model, top.text("target"), top.text("recipe"), graphs, **optional)
        wanted = 2 * model.num_layers if manifest.cache_dtype == "int8" else 0
        if len(manifest.cache_scales) != wanted:
            found = list(manifest.cache_scales)
            raise _damaged("cache_scales", found, f"a list of {wanted} scales")
        for name, graph in graphs.items():
            if manifest.files and graph.file not in manifest.files:
                raise _damaged(f"graphs.{name}.file", graph.file, "a path that 'files' lists")
        return manifest


def graph_tensors(
    name: str, num_layers: int, kv_form: KvForm = "append"
) -> tuple[list[str], list[str]]:
    """Names of the inputs and outputs that a graph of ``GRAPHS`` has, in the graph's order.

    A decoder may have ``NEXT_TOKEN`` as a further output.
    """
    if name == "vision_encoder":
        return ["pixel_values"], ["image_features"]
    if name == "projector":
        return ["image_features"], ["image_embeds"]
    past, present = (cache_names(p, num_layers) for p in ("past_key_values", "present"))
    length = ["past_length"] if kv_form == "fixed" else []
    return ["input_ids", "image_embeds", *length, *past], ["logits", *present]


def _damaged(place: str, value: object, wanted: str) -> BundleError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return BundleError(
        f"The bundle's manifest is damaged: {place} is {shown}, but {wanted} is needed there. "
        "Copy the bundle again, or compile it again."
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


class _Record:
    """A JSON object with the fields of a dataclass, which are read with checks.

    Raises:
        BundleError: it is no object, or a field is missing or unknown.
    """

    def __init__(self, data: object, place: str, kind: type) -> None:
        self.place = place
        if not isinstance(data, Mapping):
            raise _damaged(place, data, "an object")
        self.data: Mapping[str, Any] = data
        known = {
            item.name: item.default is MISSING and item.default_factory is MISSING
            for item in fields(kind)
        }
        wrong = [("lacks", key) for key in known if known[key] and key not in data]
        wrong += [("has the unknown field", str(key)) for key in data if key not in known]
        if wrong:
            what, key = wrong[0]
            raise BundleError(
                f"The bundle's manifest is damaged: it {what} {self.path_of(key)!r}. Copy the "
                "bundle again, or compile it again with this version."
            )

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        return self.data[key]

    def path_of(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def bad(self, key: str, wanted: str) -> BundleError:
        return _damaged(self.path_of(key), self[key], wanted)

    def text(self, key: str) -> str:
        """A string that is not empty."""
        value = self[key]
        if not isinstance(value, str) or not value:
            raise self.bad(key, "a text")
        return value

    def size(self, key: str) -> int:
        """A whole number from 1 on that fits 32 bits."""
        value = self[key]
        if not _is_size(value):
            raise self.bad(key, f"a whole number of 1 to {_LARGEST}")
        return int(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        if self[key] not in allowed:
            raise self.bad(key, f"one of {', '.join(allowed)}")
        return str(self[key])

    def items(self, key: str) -> list[Any]:
        """A list, or the tuple that ``to_json`` makes of one."""
        value = self[key]
        if not isinstance(value, (list, tuple)):
            raise self.bad(key, "a list")
        return list(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self[key]
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.bad(key, "an object")
        return dict(value)

    def texts(self, key: str) -> dict[str, str]:
        """An object of texts."""
        found = self.mapping(key)
        for name, value in found.items():
            if not isinstance(value, str):
                raise _damaged(f"{self.path_of(key)}.{name}", value, "a text")
        return found


def _read_model(model: _Record) -> ModelSpec:
    heads, kv_heads = model.size("num_attention_heads"), model.size("num_key_value_heads")
    if heads % kv_heads:
        raise model.bad("num_key_value_heads", f"a divisor of the {heads} attention heads")
    vocab_size, stop_ids = model.size("vocab_size"), model.items("stop_ids")
    if not stop_ids or not all(type(i) is int and 0 <= i < vocab_size for i in stop_ids):
        raise model.bad("stop_ids", f"a list of ids of 0 to {vocab_size - 1}")
    return ModelSpec(
        name=model.text("name"),
        vocab_size=vocab_size,
        hidden_size=model.size("hidden_size"),
        num_layers=model.size("num_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=model.size("head_dim"),
        max_positions=model.size("max_positions"),
        image_tokens=model.size("image_tokens"),
        stop_ids=tuple(stop_ids),
        template=model.text("template"),
        image_processor=model.mapping("image_processor"),
    )


def _read_graphs(top: _Record, num_layers: int, kv_form: KvForm) -> dict[str, GraphSpec]:
    found = top.mapping("graphs")
    if set(found) != set(GRAPHS):
        raise _damaged("graphs", sorted(found), f"each of {', '.join(GRAPHS)}")
    return {
        name: _read_graph(name, found[name], graph_tensors(name, num_layers, kv_form))
        for name in found
    }


def _read_graph(name: str, data: object, tensors: tuple[list[str], list[str]]) -> GraphSpec:
    graph = _Record(data, f"graphs.{name}", GraphSpec)
    if not _is_inside(graph.text("file")):
        raise graph.bad("file", "a path inside the bundle")
    inputs, outputs = _read_tensors(graph, "inputs"), _read_tensors(graph, "outputs")
    _check_names(graph, "inputs", inputs, tensors[0])
    optional = {NEXT_TOKEN} if name == "decoder" else set()
    given = tuple(tensor for tensor in outputs if tensor.name not in optional)
    if len(outputs) - len(given) > 1:
        raise graph.bad("outputs", f"{NEXT_TOKEN} once at most")
    _check_names(graph, "outputs", given, tensors[1])
    _check_dtypes(graph, (*inputs, *outputs))
    dtype = graph.choice("dtype", GRAPH_DTYPES)
    may_saturate = graph.data.get("may_saturate", True)
    if not isinstance(may_saturate, bool):
        raise graph.bad("may_saturate", "true or false")
    return GraphSpec(graph.text("file"), dtype, inputs, outputs, may_saturate)


def _check_names(
    graph: _Record, key: str, tensors: tuple[TensorSpec, ...], wanted: list[str]
) -> None:
    names = [tensor.name for tensor in tensors]
    if sorted(names) != sorted(wanted):
        other = sorted(set(names) ^ set(wanted)) or names
        raise BundleError(
            f"The bundle's manifest is damaged: {graph.path_of(key)} are not those of the "
            f"model (different: {', '.join(other[:4])}). Copy the bundle again, or "
            "compile it again."
        )


def _check_dtypes(graph: _Record, tensors: tuple[TensorSpec, ...]) -> None:
    """Types that the runtime chooses by: of pixels and of the cache."""
    for tensor in tensors:
        allowed: tuple[str, ...] = ()
        if tensor.name == "pixel_values":
            allowed = _PIXEL_DTYPES
        elif tensor.name.startswith(("past_key_values.", "present.")):
            allowed = CACHE_DTYPES
        if allowed and tensor.dtype not in allowed:
            place = f"{graph.place}.{tensor.name}.dtype"
            raise _damaged(place, tensor.dtype, f"one of {', '.join(allowed)}")


def _read_tensors(graph: _Record, key: str) -> tuple[TensorSpec, ...]:
    tensors = []
    for index, data in enumerate(graph.items(key)):
        tensor = _Record(data, f"{graph.path_of(key)}.{index}", TensorSpec)
        shape = tensor.items("shape")
        if not all(_is_size(axis) or (isinstance(axis, str) and axis) for axis in shape):
            raise tensor.bad("shape", "a list of sizes and names of dynamic axes")
        dtype = tensor.choice("dtype", _TENSOR_DTYPES)
        tensors.append(TensorSpec(tensor.text("name"), dtype, tuple(shape)))
    return tuple(tensors)


def _read_scales(top: _Record, key: str) -> tuple[float, ...]:
    scales = top.items(key)
    if not all(isinstance(scale, float) and 0 < scale < math.inf for scale in scales):
        raise top.bad(key, "a list of positive numbers")
    return tuple(scales)


def _read_files(top: _Record, key: str) -> dict[str, str]:
    files = top.texts(key)
    for path, digest in files.items():
        if not _is_inside(path):
            raise _damaged(key, path, "a path inside the bundle")
        if not _DIGEST.fullmatch(digest):
            raise _damaged(f"{key}.{path}", digest, "a sha256 of 64 hexadecimal digits")
    return files


def _is_inside(path: str) -> bool:
    """Whether a path, as written in a manifest, stays below the bundle's folder everywhere."""
    if "\\" in path or "\0" in path or PureWindowsPath(path).drive:
        return False
    return not {"", ".", ".."} & set(path.split("/"))
