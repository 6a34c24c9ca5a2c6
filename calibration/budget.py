"""Choose what each layer becomes, so that a graph is small or true enough.

Each layer takes one of its options, with bytes and a loss; losses are taken to add up
(:mod:`.sensitivity`). Least loss under so many bytes, or least bytes under so much loss, is a
multiple-choice knapsack. Both are one task with the roles of the two figures exchanged:

    least  sum of value(l, c_l)   with   sum of cost(l, c_l)  <=  limit

Of a layer's options those on the lower convex hull of (cost, value) count. Every layer starts
at its cheapest; the steps along all hulls are taken by value saved per cost, the best first,
where they still fit (Sinha & Zoltners 1979). Up to the first step that does not fit, the mix
is the best of its cost; and that step, taken in part, gives a bound that no mix can beat. What
room is left then goes to any single exchange that helps, those off the hull included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mvlm_export.engines.errors import InputError

from .layer_rounding import Candidate

_UNITS: dict[str, float] = {
    "b": 1,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_BUDGET = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What a graph may take; one of the two.

    Attributes:
        bytes: of all its stored weights, scales included.
        nats: sum of its layers' losses.
    """

    bytes: int | None = None
    nats: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``350MB``, ``1.2 GiB`` or ``0.01nats``.

        Raises:
            InputError: it is none of these, or not above zero.
        """
        found = _BUDGET.fullmatch(text)
        unit = found[2].lower() if found else ""
        if found is None or unit not in (*_UNITS, "nat", "nats"):
            raise InputError(
                f"The budget {text!r} is neither bytes nor nats. Write it like 350MB, 1.2GB, "
                "or 0.01nats."
            )
        number = float(found[1])
        if unit in ("nat", "nats"):
            if not number > 0:
                raise InputError(
                    f"The budget {text!r} leaves nothing to lose: only a float graph has no "
                    "loss. Give a number above 0."
                )
            return cls(nats=number)
        if number * _UNITS[unit] < 1:
            raise InputError(f"The budget {text!r} is less than a byte. Give more.")
        return cls(bytes=int(number * _UNITS[unit]))

    def __str__(self) -> str:
        if self.bytes is not None:
            return f"{self.bytes / 1e6:g} MB"
        return f"{self.nats:g} nats"


@dataclass(frozen=True)
class Option:
    """What a layer may become, with what that takes.

    Attributes:
        bytes: codes and scales, or floats.
        loss: in nats a row, or what the analysis measured.
    """

    candidate: Candidate
    bytes: int
    loss: float


@dataclass(frozen=True)
class Mix:
    """What every layer becomes.

    Attributes:
        options: one a layer, in their order.
        bytes: of all layers, and what is stored besides.
        loss: sum over layers.
        bound: what no mix within the budget can be below: a loss for a budget of bytes, bytes
            for a budget of loss.
    """

    options: tuple[Option, ...]
    bytes: int
    loss: float
    bound: float


Figure = Callable[[Option], float]


def choose_mix(layers: Sequence[Sequence[Option]], budget: Budget, fixed: int = 0) -> Mix:
    """The least loss under a budget of bytes, or the least bytes under one of loss.

    Args:
        layers: each layer's options, one at least.
        fixed: bytes that are stored whatever is chosen.

    Raises:
        InputError: no mix is within the budget; the message says what the least possible is.
    """
    if budget.bytes is not None:
        least = fixed + sum(min(option.bytes for option in options) for options in layers)
        if least > budget.bytes:
            raise InputError(
                f"The budget of {budget.bytes / 1e6:.3f} MB cannot be met: with every layer "
                f"as small as it gets, the graph takes {least / 1e6:.3f} MB. Give at least "
                f"{_round_up(least)}."
            )
        chosen, bound = _least(layers, _loss, _bytes, budget.bytes - fixed)
        return _mix(chosen, fixed, bound)
    assert budget.nats is not None
    lowest = sum(min(option.loss for option in options) for options in layers)
    if lowest > budget.nats:
        raise InputError(
            f"The budget of {budget.nats:g} nats cannot be met: the least possible is "
            f"{lowest:.3g} nats. Give at least that."
        )
    chosen, bound = _least(layers, _bytes, _loss, budget.nats)
    return _mix(chosen, fixed, bound + fixed)


def _bytes(option: Option) -> float:
    return option.bytes


def _loss(option: Option) -> float:
    return option.loss


def _mix(chosen: Sequence[Option], fixed: int, bound: float) -> Mix:
    size = fixed + sum(option.bytes for option in chosen)
    return Mix(tuple(chosen), size, sum(option.loss for option in chosen), bound)


def _round_up(size: int) -> str:
    """Bytes in MB with three decimals that are not less."""
    return f"{-(-size // 1000) / 1000:.3f}MB"


def _least(
    layers: Sequence[Sequence[Option]], value: Figure, cost: Figure, limit: float
) -> tuple[list[Option], float]:
    """Options of the least value within a cost, and the bound."""
    hulls = [_hull(options, value, cost) for options in layers]
    places = [0] * len(hulls)
    spent = sum(cost(hull[0]) for hull in hulls)
    steps = [
        (-_slope(hull[place], hull[place + 1], value, cost), index, place)
        for index, hull in enumerate(hulls)
        for place in range(len(hull) - 1)
    ]
    bound: float | None = None
    for slope, index, place in sorted(steps):
        if places[index] != place:  # an earlier step of this layer did not fit
            continue
        extra = cost(hulls[index][place + 1]) - cost(hulls[index][place])
        if spent + extra <= limit:
            spent += extra
            places[index] += 1
        elif bound is None:
            reached = sum(value(hull[at]) for hull, at in zip(hulls, places, strict=True))
            bound = reached + slope * (limit - spent)
    chosen = [hull[at] for hull, at in zip(hulls, places, strict=True)]
    if bound is None:
        bound = sum(value(option) for option in chosen)
    elif not math.isfinite(bound):  # a layer of infinite loss could not be mended
        bound = sum(value(hull[-1]) for hull in hulls)
    return _polish(layers, chosen, value, cost, limit), bound


def _slope(before: Option, after: Option, value: Figure, cost: Figure) -> float:
    """Value saved per cost."""
    return (value(before) - value(after)) / (cost(after) - cost(before))


def _hull(options: Sequence[Option], value: Figure, cost: Figure) -> list[Option]:
    """The lower convex hull, from the cheapest on; each step saves less per cost."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda item: (cost(item), value(item))):
        if hull and value(option) >= value(hull[-1]):
            continue
        while len(hull) > 1 and (
            _slope(hull[-2], hull[-1], value, cost) <= _slope(hull[-1], option, value, cost)
        ):
            hull.pop()
        hull.append(option)
    return hull


def _polish(
    layers: Sequence[Sequence[Option]],
    chosen: list[Option],
    value: Figure,
    cost: Figure,
    limit: float,
) -> list[Option]:
    """Exchange one layer's option at a time for as long as that saves value."""
    while True:
        room = max(limit - sum(cost(option) for option in chosen), 0)
        exchanges = [
            (value(option) - value(chosen[index]), index, option)
            for index, options in enumerate(layers)
            for option in options
            if cost(option) - cost(chosen[index]) <= room
            and value(option) < value(chosen[index])
        ]
        if not exchanges:
            return chosen
        _, index, option = min(exchanges, key=lambda item: item[0])
        chosen[index] = option
