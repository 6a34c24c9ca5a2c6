"""Write what was chosen for each layer as a recipe: one form for most, rules for others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import escape

from mvlm_export.engines.errors import InputError

from .layers import Layer
from .recipe import GraphRecipe, Rule
from .weight_grids import WeightFormat

Forms = Mapping[str, "WeightFormat | None"]
"""What each layer's weight is stored as, by the layer's name."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def mixed_graph_recipe(
    base: GraphRecipe, layers: Sequence[Layer], forms: Forms
) -> GraphRecipe:
    """A recipe that stores every layer as chosen.

    The form that most linear layers have is the graph's; as few rules as patterns allow name
    the others.

    Args:
        base: gives the method.
        layers: of the graph.
        forms: of its layers with weights; those that are not named stay in float.

    Raises:
        InputError: ``base`` has 8-bit activations, which go with 8-bit weights alone.
    """
    if base.activations or base.attention:
        raise InputError(
            "A mix of weights goes with float activations. Start from a recipe that quantizes "
            "the decoder's weights alone, such as int4."
        )
    weighted = [layer for layer in layers if layer.weight is not None]
    wanted = {layer.name: forms.get(layer.name) for layer in weighted}
    tables = [wanted[layer.name] for layer in weighted if layer.kind == "embedding"]
    others = [layer for layer in weighted if layer.kind != "embedding"]
    counts = Counter(wanted[layer.name] for layer in others)
    common = counts.most_common(1)[0][0] if counts else None
    recipe = replace(base, weights=common, embedding=tables[0] if tables else None, rules=())
    differing = {
        layer.name: wanted[layer.name]
        for layer in weighted
        if recipe.form_of(layer.name, layer.kind) != wanted[layer.name]
    }
    return replace(recipe, rules=_rules(differing, wanted))


def _rules(differing: Forms, wanted: Forms) -> tuple[Rule, ...]:
    """Rules that fit the differing layers, and no layer that is wanted otherwise."""
    left, rules = list(differing), []
    while left:
        patterns = [pattern for name in left for pattern in _patterns(name)]
        sound = [p for p in patterns if len({wanted[n] for n in _fitting(p, wanted)}) == 1]
        best = max(sound, key=lambda pattern: len(_fitting(pattern, left)))
        rules.append(Rule(best, wanted[_fitting(best, left)[0]]))
        left = [name for name in left if not fnmatchcase(name, best)]
    return tuple(rules)


def _patterns(name: str) -> list[str]:
    """The name itself; this kind of layer in every block; every layer of this block."""
    found = [escape(name)]
    number = _NUMBER.search(name)
    if number is not None:
        before, behind = escape(name[: number.start()]), escape(name[number.end() :])
        found += [f"{before}*{behind}", f"{before}{number[0]}.*"]
    return found


def _fitting(pattern: str, names: Sequence[str] | Forms) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]
