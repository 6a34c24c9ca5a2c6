"""Where the boxes of a drawn graph stand: layers, their order, and coordinates.

The classic steps of Sugiyama, Tagawa and Toda (1981): a box stands one layer below the lowest
box it reads from; a wire that passes layers gets a bend in each, shared by all readers of its
source; layers are put in the order of their neighbours' means, back and forth, and the order
with the fewest crossings is kept; then boxes move towards their neighbours as far as the boxes
beside them let them (least squares, by pooling).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GAP_X = 26.0
GAP_Y = 34.0
SWEEPS = 10
STEPS = 40_000
"""About how many moves of a box are spent on straight lines."""

BEND_WIDTH = 4.0


@dataclass(frozen=True)
class Extent:
    """The room of a box around its anchor, the middle of its upper edge.

    Attributes:
        left, right: to either side.
        height: below the anchor, with all that belongs to the box.
    """

    left: float
    right: float
    height: float


@dataclass(frozen=True)
class Wire:
    """From an output of one box to an input of another.

    Attributes:
        source, target: indices of boxes.
        tail, head: where it leaves and arrives, horizontally from the anchors.
        port: which output of the source; wires of one output share their bends.
    """

    source: int
    target: int
    tail: float = 0.0
    head: float = 0.0
    port: int = 0


@dataclass(frozen=True)
class Layout:
    """Coordinates, all positive.

    Attributes:
        anchors: of the boxes.
        bands: top and bottom of each layer.
        layers: the layer of each box.
        bends: horizontal places of a wire in the layers it passes, top down; one list a wire.
    """

    anchors: list[tuple[float, float]]
    bands: list[tuple[float, float]]
    layers: list[int]
    bends: list[list[float]]
    width: float
    height: float


@dataclass
class _Slot:
    """A box or a bend in a layer."""

    extent: Extent
    above: list[tuple[int, float]] = field(default_factory=list)
    below: list[tuple[int, float]] = field(default_factory=list)
    is_bend: bool = False
    x: float = 0.0


def assign_layers(count: int, wires: Sequence[Wire]) -> list[int]:
    """The layer of each box: below all it reads; sources stand close to their readers."""
    below: list[list[int]] = [[] for _ in range(count)]
    above: list[list[int]] = [[] for _ in range(count)]
    for wire in wires:
        below[wire.source].append(wire.target)
        above[wire.target].append(wire.source)
    order = _topological(below, above)
    layers = [0] * count
    for index in order:
        layers[index] = max((layers[other] + 1 for other in above[index]), default=0)
    for index in reversed(order):
        if below[index] and len(set(above[index])) < len(set(below[index])):
            layers[index] = min(layers[other] for other in below[index]) - 1
    lowest = min(layers, default=0)
    return [layer - lowest for layer in layers]


def _topological(below: list[list[int]], above: list[list[int]]) -> list[int]:
    waiting = [len(others) for others in above]
    ready = [index for index, number in enumerate(waiting) if number == 0]
    for index in ready:
        for other in below[index]:
            waiting[other] -= 1
            if waiting[other] == 0:
                ready.append(other)
    return ready


def lay_out(extents: Sequence[Extent], wires: Sequence[Wire]) -> Layout:
    """Place boxes in layers from top to bottom."""
    layers = assign_layers(len(extents), wires)
    slots = [_Slot(extent) for extent in extents]
    rows: list[list[int]] = [[] for _ in range(max(layers, default=0) + 1)]
    for index, layer in enumerate(layers):
        rows[layer].append(index)
    chains = _add_bends(slots, rows, layers, wires)
    rows = _ordered(slots, rows)
    _place(slots, rows)
    left = min((slot.x - slot.extent.left for slot in slots), default=0.0)
    for slot in slots:
        slot.x -= left
    bands = _bands(slots, rows)
    anchors = [(slots[i].x, bands[layers[i]][0]) for i in range(len(extents))]
    return Layout(
        anchors=anchors,
        bands=bands,
        layers=layers,
        bends=[[slots[index].x for index in chain] for chain in chains],
        width=max((slot.x + slot.extent.right for slot in slots), default=0.0),
        height=bands[-1][1],
    )


def _add_bends(
    slots: list[_Slot], rows: list[list[int]], layers: list[int], wires: Sequence[Wire]
) -> list[list[int]]:
    """Insert bends and link neighbours; the bends of each wire."""
    bends: dict[tuple[int, int, int], int] = {}
    chains = []
    for wire in wires:
        chain: list[int] = []
        previous, offset = wire.source, wire.tail
        for layer in range(layers[wire.source] + 1, layers[wire.target]):
            key = (wire.source, wire.port, layer)
            if key not in bends:
                bends[key] = len(slots)
                rows[layer].append(len(slots))
                slots.append(_Slot(Extent(BEND_WIDTH, BEND_WIDTH, 0.0), is_bend=True))
                _link(slots, previous, offset, bends[key], 0.0)
            previous, offset = bends[key], 0.0
            chain.append(previous)
        _link(slots, previous, offset, wire.target, wire.head)
        chains.append(chain)
    return chains


def _link(slots: list[_Slot], upper: int, tail: float, lower: int, head: float) -> None:
    """Each remembers the other, and how far its anchor should be from the other's."""
    slots[upper].below.append((lower, head - tail))
    slots[lower].above.append((upper, tail - head))


def _ordered(slots: list[_Slot], rows: list[list[int]]) -> list[list[int]]:
    """Rows in an order with few crossings."""
    best, fewest = rows, _crossings(slots, rows)
    current = [list(row) for row in rows]
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        indices = range(1, len(rows)) if downwards else range(len(rows) - 2, -1, -1)
        for index in indices:
            neighbour = current[index - 1 if downwards else index + 1]
            current[index] = _by_mean(slots, current[index], neighbour, downwards)
        crossings = _crossings(slots, current)
        if crossings < fewest:
            best, fewest = [list(row) for row in current], crossings
    return best


def _by_mean(
    slots: list[_Slot], row: list[int], neighbour: list[int], downwards: bool
) -> list[int]:
    """A row sorted by the mean place of what it is wired to in the row next to it."""
    places = {index: place for place, index in enumerate(neighbour)}
    scale = max(len(neighbour), 1) / max(len(row), 1)
    means = {}
    for place, index in enumerate(row):
        links = slots[index].above if downwards else slots[index].below
        # The offset (ports) decides between wires of one box.
        values = [places[other] + offset * 1e-4 for other, offset in links]
        means[index] = sum(values) / len(values) if values else place * scale
    return sorted(row, key=means.__getitem__)


def _crossings(slots: list[_Slot], rows: list[list[int]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        places = {index: place for place, index in enumerate(lower)}
        seen: list[float] = []
        for index in upper:
            # The offset (ports) tells wires into one box apart.
            targets = sorted(places[other] + off * 1e-4 for other, off in slots[index].below)
            total += sum(len(seen) - bisect_right(seen, place) for place in targets)
            for place in targets:
                insort(seen, place)
    return total


def _place(slots: list[_Slot], rows: list[list[int]]) -> None:
    for row in rows:
        x = 0.0
        for index in row:
            slots[index].x = x + slots[index].extent.left
            x = slots[index].x + slots[index].extent.right + GAP_X
    settling = min(max(STEPS // max(len(slots), 1), 2 * SWEEPS), 20 * SWEEPS)
    for sweep in range(2 * SWEEPS + settling):
        downwards = sweep % 2 == 0
        for row in rows if downwards else reversed(rows):
            _pull(slots, row, downwards, both=sweep >= 2 * SWEEPS)


def _pull(slots: list[_Slot], row: list[int], downwards: bool, both: bool) -> None:
    """Move a row towards its neighbours above or below, or both."""
    wishes, weights = [], []
    for index in row:
        slot = slots[index]
        links = [*slot.above, *slot.below] if both else slot.above if downwards else slot.below
        pulls = [
            (slots[other].x + offset, 40.0 if slot.is_bend and slots[other].is_bend else 1.0)
            for other, offset in links
        ]
        weight = sum(strength for _, strength in pulls)
        wish = sum(x * strength for x, strength in pulls) / weight if pulls else slot.x
        wishes.append(wish)
        weights.append(weight or 0.05)
    gaps = [slots[a].extent.right + slots[b].extent.left + GAP_X for a, b in pairwise(row)]
    for index, x in zip(row, spread(wishes, weights, gaps), strict=True):
        slots[index].x = x


def spread(
    wishes: Sequence[float], weights: Sequence[float], gaps: Sequence[float]
) -> list[float]:
    """The places nearest to ``wishes`` (least squares) that keep ``gaps`` between them.

    Less the sum of the gaps before it, each place must not be smaller than the one before:
    isotonic regression, solved by pooling adjacent violators.
    """
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[list[float]] = []  # mean, weight, members
    for wish, weight, offset in zip(wishes, weights, offsets, strict=False):
        pools.append([wish - offset, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, mass, members = pools.pop()
            first = pools[-1]
            first[0] = (first[0] * first[1] + mean * mass) / (first[1] + mass)
            first[1] += mass
            first[2] += members
    means = (mean for mean, _, members in pools for _ in range(int(members)))
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


def _bands(slots: list[_Slot], rows: Iterable[list[int]]) -> list[tuple[float, float]]:
    """Top and bottom of each row; wider gaps where wires run far sideways."""
    bands, top = [], 0.0
    for row in rows:
        height = max((slots[index].extent.height for index in row), default=0.0)
        bands.append((top, top + height))
        reach = max(
            (
                abs(slots[index].x - slots[other].x - offset)
                for index in row
                for other, offset in slots[index].below
            ),
            default=0.0,
        )
        top += height + min(GAP_Y + 0.06 * reach, 2.5 * GAP_Y)
    return bands
