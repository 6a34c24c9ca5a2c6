"""Graphs as SVG pictures: layered, coloured by kind of operator, in one plain file.

The picture needs no program to be made and no script to be looked at; names that are cut short
stand in full in tooltips.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from .svg_layout import Extent, Layout, Wire, lay_out
from .svg_scene import Box, Pill, Scene, build_scene, default_depth, nodes_around
from .svg_text import Kind, clean, text_width

MOST_NODES = 400
"""Larger pictures cannot be read."""

_FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_TITLE, _SMALL, _LABEL = 13.0, 10.0, 10.0
_ROW, _PAD, _PILL_ROW, _PILL_GAP = 13.0, 10.0, 12.0, 5.0
_LABEL_HEIGHT, _PILL_REACH, _MARGIN, _HEADER = 18.0, 16.0, 28.0, 66.0
_PANEL_GAP, _NARROWEST = 60.0, 360.0


@dataclass(frozen=True)
class _Shape:
    """Sizes of a box and of the pills beside it."""

    width: float
    height: float
    pill_width: float
    pill_heights: tuple[float, ...]
    tall: float

    @property
    def extent(self) -> Extent:
        reach = _PILL_REACH + self.pill_width if self.pill_heights else 0.0
        return Extent(self.width / 2, self.width / 2 + reach, self.tall)


def _measure(box: Box) -> _Shape:
    small = [text_width(line, _SMALL) for line in box.lines]
    labels = max((text_width(label, _LABEL) for label in box.labels), default=0.0) + 8
    wide = max([text_width(box.title, _TITLE) * 1.08, *small]) + 2 * _PAD
    width = max(wide, labels * len(box.labels), 84.0)
    height = 24.0 + _ROW * len(box.lines) if box.lines else 26.0
    pills = tuple(_PILL_ROW * len(pill.lines) + 6 for pill in box.pills)
    lines = [text_width(line, _SMALL) for pill in box.pills for line in pill.lines]
    stack = sum(pills) + _PILL_GAP * (len(pills) - 1) if pills else 0.0
    tall = max(height + (_LABEL_HEIGHT if box.labels else 0.0), stack)
    return _Shape(width, height, max(lines, default=0.0) + 16, pills, tall)


def _port(width: float, index: int, count: int) -> float:
    """Where wire ``index`` of ``count`` meets a box, from its middle."""
    return 0.0 if count < 2 else width * 0.86 * ((index + 0.5) / count - 0.5)


@dataclass(frozen=True)
class _Panel:
    """One drawn graph."""

    title: str
    subtitle: str
    scene: Scene
    shapes: tuple[_Shape, ...]
    wires: tuple[Wire, ...]
    layout: Layout

    @classmethod
    def of(cls, title: str, subtitle: str, scene: Scene) -> _Panel:
        shapes = tuple(_measure(box) for box in scene.boxes)
        wires = []
        for item in scene.connections:
            source, target = scene.boxes[item.source], scene.boxes[item.target]
            tail = _port(shapes[item.source].width, item.port, len(source.labels))
            head = _port(shapes[item.target].width, item.slot, target.inputs)
            wires.append(Wire(item.source, item.target, tail, head, item.port))
        layout = lay_out([shape.extent for shape in shapes], wires)
        return cls(title, subtitle, scene, shapes, _untangled(scene, wires, layout), layout)

    @property
    def width(self) -> float:
        named = text_width(self.title, 20), text_width(self.subtitle, 12)
        return max(self.layout.width, *named)


def _untangled(scene: Scene, wires: Sequence[Wire], layout: Layout) -> tuple[Wire, ...]:
    """Wires into a box that takes them in any order arrive in the order they come from."""
    arriving: dict[int, list[tuple[float, int]]] = {}
    for index, (wire, bends) in enumerate(zip(wires, layout.bends, strict=True)):
        if scene.boxes[wire.target].any_order:
            origin = bends[-1] if bends else layout.anchors[wire.source][0] + wire.tail
            arriving.setdefault(wire.target, []).append((origin, index))
    result = list(wires)
    for group in arriving.values():
        heads = sorted(wires[index].head for _, index in group)
        for (_, index), head in zip(sorted(group), heads, strict=True):
            result[index] = replace(wires[index], head=head)
    return tuple(result)


def draw_graph(
    graph: gs.Graph,
    title: str | None = None,
    around: str | None = None,
    depth: int | None = None,
) -> str:
    """A graph, or a part of it, as an SVG document.

    Args:
        title: above the picture; the graph's name if None.
        around, depth: draw a part; see :func:`.svg_scene.nodes_around`.

    Raises:
        PassError: the picture would be too large, or nothing is named ``around``.
    """
    nodes = _selected(graph, around, depth)
    panel = _Panel.of(
        title or graph.name or "graph",
        _subtitle(graph, nodes, around, depth),
        build_scene(graph, nodes),
    )
    return _document([panel])


def draw_difference(
    before: gs.Graph,
    after: gs.Graph,
    titles: tuple[str, str],
    around: str | None = None,
    depth: int | None = None,
) -> str:
    """Two graphs side by side, nodes that only one of them has with a thick border.

    Nodes are the same if operator and name are.

    Raises:
        PassError: as :func:`draw_graph`.
    """
    panels = []
    for graph, other, title in zip((before, after), (after, before), titles, strict=True):
        nodes = _selected(graph, around, depth)
        shared = {(node.op, node.name) for node in other.nodes}
        marked = {id(node) for node in nodes if (node.op, node.name) not in shared}
        subtitle = f"{_subtitle(graph, nodes, around, depth)}, {len(marked)} only here"
        panels.append(_Panel.of(title, subtitle, build_scene(graph, nodes, marked)))
    return _document(panels)


def _selected(graph: gs.Graph, around: str | None, depth: int | None) -> list[gs.Node]:
    nodes = list(graph.nodes) if around is None else nodes_around(graph, around, depth)
    if len(nodes) > MOST_NODES:
        cure = (
            "Draw a part of it: --around NODE_OR_TENSOR, with --depth for how far, or a "
            "pattern: --around 'model.layers.0.*'."
            if around is None
            else "Take a smaller --depth, or a narrower name."
        )
        raise PassError(
            f"{graph.name or 'The graph'} has {len(nodes)} nodes to draw, and a picture of "
            f"more than {MOST_NODES} cannot be read. {cure}"
        )
    return nodes


def _subtitle(
    graph: gs.Graph, nodes: Collection[gs.Node], around: str | None, depth: int | None
) -> str:
    if around is None:
        return f"{len(nodes)} nodes, opset {graph.opset}"
    return f"{len(nodes)} of {len(graph.nodes)} nodes, {_steps(around, depth)}{around}"


def _steps(around: str, depth: int | None) -> str:
    steps = default_depth(around) if depth is None else depth
    return f"{steps} step{'s' if steps > 1 else ''} around " if steps else ""


def _document(panels: Sequence[_Panel]) -> str:
    widths = [panel.width for panel in panels]
    width = max(sum(widths) + _PANEL_GAP * (len(panels) - 1), _NARROWEST) + 2 * _MARGIN
    bottom = _HEADER + max(panel.layout.height for panel in panels) + _MARGIN
    legend, height = _legend(_kinds(panels), bottom, width)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    left = _MARGIN
    for panel in panels:
        lines.append(
            f'<text x="{left:.1f}" y="32" font-size="20" font-weight="bold" '
            f'fill="#0f172a">{clean(panel.title)}</text>'
        )
        lines.append(
            f'<text x="{left:.1f}" y="50" font-size="12" fill="#64748b">'
            f"{clean(panel.subtitle)}</text>"
        )
        room = max(panel.width, width - 2 * _MARGIN if len(panels) == 1 else 0.0)
        shift = left + (room - panel.layout.width) / 2
        lines.append(f'<g transform="translate({shift:.1f} {_HEADER:.1f})">')
        lines += _draw_panel(panel)
        lines.append("</g>")
        left += panel.width + _PANEL_GAP
    lines += [*legend, "</svg>"]
    return "\n".join(lines) + "\n"


def _kinds(panels: Sequence[_Panel]) -> list[Kind]:
    found = [box.kind for panel in panels for box in panel.scene.boxes if box.kind]
    return list(dict.fromkeys(found))


def _legend(kinds: Sequence[Kind], y: float, width: float) -> tuple[list[str], float]:
    """The kinds of operators in rows from ``y`` on, and where the picture ends."""
    lines, x = [], _MARGIN
    for kind in kinds:
        reach = text_width(kind.title, 11) + 42
        if x > _MARGIN and x + reach > width - _MARGIN / 2:
            x, y = _MARGIN, y + 20
        lines.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="16" height="12" rx="3" '
            f'fill="{kind.fill}" stroke="{kind.stroke}"/>'
            f'<text x="{x + 22:.1f}" y="{y + 10:.1f}" font-size="11" fill="#334155">'
            f"{clean(kind.title)}</text>"
        )
        x += reach
    return lines, y + 12 + _MARGIN


def _draw_panel(panel: _Panel) -> Iterator[str]:
    layout = panel.layout
    for wire, bends in zip(panel.wires, layout.bends, strict=True):
        yield _draw_wire(panel, wire, bends)
    for box, shape, (x, y) in zip(
        panel.scene.boxes, panel.shapes, layout.anchors, strict=True
    ):
        yield "<g>"
        yield f"<title>{clean(box.tooltip)}</title>"
        yield from _draw_box(box, shape, x, y)
        yield from _draw_labels(box, shape, x, y + shape.height)
        yield "</g>"
        yield from _draw_pills(box.pills, shape, x, y)


def _draw_wire(panel: _Panel, wire: Wire, bends: Sequence[float]) -> str:
    """Straight down through layers, curved between them, with an arrow at its end."""
    layout = panel.layout
    (x, top), (end, bottom) = layout.anchors[wire.source], layout.anchors[wire.target]
    layer = layout.layers[wire.source]
    x, end = x + wire.tail, end + wire.head
    y = layout.bands[layer][1]
    path = [f"M{x:.1f} {top + panel.shapes[wire.source].height:.1f}V{y:.1f}"]
    for offset, place in enumerate((*bends, end), 1):
        upper, lower = layout.bands[layer + offset]
        last = offset > len(bends)
        upper = bottom - 6 if last else upper
        middle = (y + upper) / 2
        path.append(f"C{x:.1f} {middle:.1f} {place:.1f} {middle:.1f} {place:.1f} {upper:.1f}")
        if not last:
            path.append(f"V{lower:.1f}")
        x, y = place, lower
    arrow = f"M{end - 4:.1f} {bottom - 7:.1f}h8L{end:.1f} {bottom:.1f}Z"
    return (
        f'<path d="{"".join(path)}" fill="none" stroke="#94a3b8" stroke-width="1.4"/>'
        f'<path d="{arrow}" fill="#94a3b8"/>'
    )


def _draw_box(box: Box, shape: _Shape, x: float, y: float) -> Iterator[str]:
    fill, stroke, ink, radius = "#1e293b", "#1e293b", "#ffffff", shape.height / 2
    dashes = ""
    if box.kind is not None:
        fill, stroke, ink, radius = box.kind.fill, box.kind.stroke, "#0f172a", 7.0
    elif box.outside:
        fill, stroke, ink, dashes = "#ffffff", "#94a3b8", "#475569", ' stroke-dasharray="4 3"'
    border = 3.6 if box.marked else 1.3
    yield (
        f'<rect x="{x - shape.width / 2:.1f}" y="{y:.1f}" width="{shape.width:.1f}" '
        f'height="{shape.height:.1f}" rx="{radius:.1f}" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="{border}"{dashes}/>'
    )
    weight = ' font-weight="bold"' if box.kind is not None else ""
    yield _text(x, y + 17, box.title, _TITLE if box.kind else 12, ink, weight)
    muted = "#475569" if box.kind is not None else "#cbd5e1"
    for row, line in enumerate(box.lines):
        yield _text(x, y + 18 + _ROW * (row + 0.85), line, _SMALL, muted)


def _draw_labels(box: Box, shape: _Shape, x: float, y: float) -> Iterator[str]:
    """Shapes of what leaves, on its wire."""
    for port, label in enumerate(box.labels):
        place = x + _port(shape.width, port, len(box.labels))
        width = text_width(label, _LABEL) + 6
        yield (
            f'<rect x="{place - width / 2:.1f}" y="{y + 3:.1f}" width="{width:.1f}" '
            'height="14" fill="#ffffff" fill-opacity="0.9"/>'
        )
        yield _text(place, y + 13.5, label, _LABEL, "#334155")


def _draw_pills(pills: Sequence[Pill], shape: _Shape, x: float, y: float) -> Iterator[str]:
    left, side = x + shape.width / 2 + _PILL_REACH, x + shape.width / 2
    stack = sum(shape.pill_heights) + _PILL_GAP * (len(pills) - 1)
    top = y + max((shape.height - stack) / 2, 0.0)
    for pill, height in zip(pills, shape.pill_heights, strict=True):
        middle = top + height / 2
        end = min(max(middle, y + 5), y + shape.height - 5)
        yield "<g>"
        yield f"<title>{clean(pill.tooltip)}</title>"
        yield (
            f'<path d="M{left:.1f} {middle:.1f}L{side:.1f} {end:.1f}" stroke="#c8a24a" '
            'stroke-width="1.2"/>'
        )
        yield (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{shape.pill_width:.1f}" '
            f'height="{height:.1f}" rx="9" fill="#fffbeb" stroke="#d6b25e"/>'
        )
        for row, line in enumerate(pill.lines):
            place = left + shape.pill_width / 2
            yield _text(place, top + 12 + _PILL_ROW * row, line, _SMALL, "#713f12")
        yield "</g>"
        top += height + _PILL_GAP


def _text(x: float, y: float, text: str, size: float, ink: str, extra: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{ink}" '
        f'text-anchor="middle"{extra}>{clean(text)}</text>'
    )
