"""Recipes: which layers get which integers, by which method. Few, named, frozen, and JSON.

A recipe says for each graph what its linear layers are stored as, whether activations are
integers too, and which layers differ. Names of layers are the checkpoint's, with ``*``; the
first rule that fits counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from mvlm_export.engines.errors import InputError

from .layers import LayerKind
from .observers import OBSERVERS
from .weight_grids import WeightFormat

Method = Literal["rtn", "awq", "gptq", "awq+gptq"]
"""How weights of few bits are put on their grids."""

Dtype = Literal["float32", "float16"]

CacheDtype = Literal["int8"]
"""What the KV cache may be stored as, other than the graph's floats."""

PRODUCT = "product"
"""Ranges of what linear layers read are those by which their product loses least; what else
is quantized reaches to its largest value. See :mod:`.product_clip`."""

RANGES = (*OBSERVERS, PRODUCT)

GRAPHS = ("vision_encoder", "projector", "decoder")
TYPE = "mvlm-recipe"
VERSION = 1

INT8 = WeightFormat(8)
INT4 = WeightFormat(4, 128)


@dataclass(frozen=True)
class Rule:
    """Layers that are stored otherwise.

    Attributes:
        layers: pattern of names, ``model.layers.0.*``.
        form: what they are stored as; None for float.
    """

    layers: str
    form: WeightFormat | None


@dataclass(frozen=True)
class GraphRecipe:
    """How one graph is quantized.

    Attributes:
        weights: of linear layers and convolutions; None leaves them in float. Convolutions
            stay in float where these are 4-bit.
        method: how these weights are rounded.
        activations: 8-bit inputs of these layers.
        attention: 8-bit operands of attention's two products.
        embedding: of the token table; None leaves it in float.
        smooth: choose scales of channels before 8-bit activations (SmoothQuant).
        observer: how far activations reach; one of ``RANGES``.
        rules: exceptions, first match first.
        kv_cache_dtype: of keys and values in the decoder's cache; None for the graph's own.

    Raises:
        InputError: settings that do not go together.
    """

    weights: WeightFormat | None = None
    method: Method = "rtn"
    activations: bool = False
    attention: bool = False
    embedding: WeightFormat | None = None
    smooth: bool = False
    observer: str = "mse"
    rules: tuple[Rule, ...] = ()
    kv_cache_dtype: CacheDtype | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(
                f"There is no method {self.method!r}. Choose one of "
                f"{', '.join(get_args(Method))}."
            )
        if self.activations and (self.weights is None or self.weights.bits != 8):
            raise InputError(
                "8-bit activations need 8-bit weights: products of 8 by 4 bits have no kernel."
            )
        if self.smooth and not self.activations:
            raise InputError(
                "smooth serves 8-bit activations; set activations, or leave it out."
            )
        if self.smooth and "awq" in self.method:
            raise InputError(
                "smooth and awq both choose scales of channels; leave one of them out."
            )
        if self.embedding is not None and not self.embedding.symmetric:
            raise InputError("The token table takes no offsets. Make it symmetric.")
        if self.kv_cache_dtype not in (None, *get_args(CacheDtype)):
            raise InputError(
                f"There is no kv_cache_dtype {self.kv_cache_dtype!r}. Choose one of "
                f"{', '.join(get_args(CacheDtype))}, or leave it out for the graph's own."
            )
        if self.observer not in RANGES:
            raise InputError(
                f"There is no observer {self.observer!r}. Choose one of {', '.join(RANGES)}."
            )

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.has_float_layers and self.kv_cache_dtype is None

    @property
    def has_float_layers(self) -> bool:
        """Whether no layer is quantized; the KV cache may be."""
        forms = [self.weights, self.embedding, *(rule.form for rule in self.rules)]
        return not self.attention and all(form is None for form in forms)

    @property
    def needs_data(self) -> bool:
        """Whether samples must be run."""
        return self.rounds_by_data or self.kv_cache_dtype is not None

    @property
    def rounds_by_data(self) -> bool:
        """Whether what becomes of a layer depends on samples."""
        by_rows = self.activations or self.attention or self.method != "rtn"
        return by_rows and not self.has_float_layers

    def form_of(self, name: str, kind: LayerKind) -> WeightFormat | None:
        """What a layer is stored as."""
        for rule in self.rules:
            if fnmatchcase(name, rule.layers):
                return rule.form
        if kind == "attention":
            return None
        if kind == "conv" and self.weights is not None and self.weights.bits != 8:
            return None
        return self.embedding if kind == "embedding" else self.weights


@dataclass(frozen=True)
class Recipe:
    """A whole model's recipe; see :data:`RECIPES` for those with names.

    Attributes:
        name: kept in the manifest.
        dtype: of what is not quantized, ``float32`` or ``float16``; None for the target's.

    Raises:
        InputError: another dtype.
    """

    name: str
    vision_encoder: GraphRecipe = field(default_factory=GraphRecipe)
    projector: GraphRecipe = field(default_factory=GraphRecipe)
    decoder: GraphRecipe = field(default_factory=GraphRecipe)
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise InputError(
                f"There is no dtype {self.dtype!r}. Choose one of "
                f"{', '.join(get_args(Dtype))}, or leave it out."
            )
        for graph in ("vision_encoder", "projector"):
            if self.graph(graph).kv_cache_dtype is not None:
                raise InputError(
                    f"{graph}.kv_cache_dtype means nothing: the decoder alone has a cache."
                )

    def graph(self, name: str) -> GraphRecipe:
        """The recipe of one graph, by its name."""
        found: GraphRecipe = getattr(self, name)
        return found

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return all(self.graph(name).is_float for name in GRAPHS)

    @property
    def has_float_layers(self) -> bool:
        """Whether no layer is quantized; the KV cache may be."""
        return all(self.graph(name).has_float_layers for name in GRAPHS)

    @property
    def needs_data(self) -> bool:
        """Whether samples must be run."""
        return any(self.graph(name).needs_data for name in GRAPHS)

    def with_kv_cache(self, dtype: CacheDtype) -> Recipe:
        """This recipe with another KV cache, which its name tells (``int4-kv8``)."""
        if self.decoder.kv_cache_dtype == dtype:
            return self
        decoder = replace(self.decoder, kv_cache_dtype=dtype)
        return replace(self, name=f"{self.name}-{_SUFFIXES[dtype]}", decoder=decoder)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with type and version."""
        return {"_type": TYPE, "_version": VERSION, **asdict(self)}


_SUFFIXES: Mapping[CacheDtype, str] = {"int8": "kv8"}

_W8A8 = GraphRecipe(INT8, activations=True)
_SMOOTH = replace(_W8A8, smooth=True, observer=PRODUCT)
_INT8 = Recipe("int8", vision_encoder=_SMOOTH, projector=_W8A8, decoder=_SMOOTH)
_INT4 = Recipe(
    "int4",
    decoder=GraphRecipe(
        INT4, "awq+gptq", embedding=INT8, rules=(Rule("lm_head", WeightFormat(4, 32)),)
    ),
)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", dtype="float32"),
        Recipe("fp16", dtype="float16"),
        _INT8,
        _INT4,
        replace(_INT8, name="int8-int4", decoder=_INT4.decoder),
    )
}
"""Recipes by name; docs/quantization.md says what each gives and costs."""


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or from a JSON file.

    Raises:
        InputError: there is neither.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return read_recipe(path)
    raise InputError(
        f"There is no recipe {name!r}. Choose one of {', '.join(RECIPES)}, or give a .json "
        "file that `mvlm sensitivity` wrote."
    )


def read_recipe(path: Path) -> Recipe:
    """A recipe from a file that :meth:`Recipe.to_json` wrote.

    Raises:
        InputError: it cannot be read, or is no recipe of this version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The recipe {path} cannot be read ({error}). Give a JSON file."
        ) from error
    if not isinstance(values, dict) or values.get("_type") != TYPE:
        raise InputError(f'{path} is no recipe: it needs "_type": "{TYPE}".')
    if values.get("_version") != VERSION:
        raise InputError(
            f"The recipe {path} has version {values.get('_version')}, and this program reads "
            f"{VERSION}. Make it again with `mvlm sensitivity`."
        )
    try:
        return _parse(values)
    except InputError as error:
        raise InputError(f"The recipe {path} cannot be used: {error}") from error


def _parse(values: Mapping[str, Any]) -> Recipe:
    plain = {key: values[key] for key in values if key not in ("_type", "_version")}
    given = _checked(Recipe, plain, "The recipe")
    graphs = {name: _parse_graph(name, given[name]) for name in GRAPHS if name in given}
    return Recipe(**{**given, **graphs})


def _parse_graph(name: str, values: object) -> GraphRecipe:
    given = _checked(GraphRecipe, values, name)
    for key in ("weights", "embedding"):
        if key in given:
            given[key] = _parse_format(f"{name}.{key}", given[key])
    rules = given.pop("rules", [])
    if not isinstance(rules, list):
        raise InputError(f"{name}.rules is no list.")
    return GraphRecipe(**given, rules=tuple(_parse_rule(f"{name}.rules", r) for r in rules))


def _parse_rule(where: str, values: object) -> Rule:
    given = _checked(Rule, values, where)
    return Rule(given["layers"], _parse_format(f"{where}.form", given["form"]))


def _parse_format(where: str, values: object) -> WeightFormat | None:
    return None if values is None else WeightFormat(**_checked(WeightFormat, values, where))


_TYPES: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "dtype": (str, type(None)),
    "method": (str,),
    "activations": (bool,),
    "attention": (bool,),
    "smooth": (bool,),
    "observer": (str,),
    "layers": (str,),
    "bits": (int,),
    "group_size": (int, type(None)),
    "kv_cache_dtype": (str, type(None)),
    "symmetric": (bool,),
}
"""What JSON gives for plain fields."""


def _checked(kind: Any, values: object, where: str) -> dict[str, Any]:  # noqa: ANN401
    """The fields of a record: known ones alone, of their types, and all that are needed."""
    if not isinstance(values, dict):
        raise InputError(f"{where} is {values!r} where an object is needed.")
    known = {item.name: item for item in fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(
            f"{where} has {', '.join(unknown)}, which means nothing here; known are "
            f"{', '.join(known)}."
        )
    needed = {n for n, i in known.items() if i.default is i.default_factory is MISSING}
    missing = sorted(needed - set(values))
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}.")
    for name, value in values.items():
        if name in _TYPES and type(value) not in _TYPES[name]:
            types = " or ".join(_JSON_NAMES[given] for given in _TYPES[name])
            raise InputError(f"{where} has {value!r} for {name}, where {types} is needed.")
    return dict(values)


_JSON_NAMES: Mapping[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    type(None): "null",
}
