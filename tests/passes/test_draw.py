"""Pictures: valid XML, everything in it, boxes apart, and refusals."""

import xml.etree.ElementTree as ET
from collections import Counter
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.deferred import DeferredValues
from mvlm_export.passes.draw import MOST_NODES, draw_difference, draw_graph
from mvlm_export.passes.projector.fold_peg_skip import FoldPegSkip
from mvlm_export.passes.svg_layout import GAP_X, Extent, Wire, assign_layers, lay_out, spread
from mvlm_export.passes.svg_scene import HUB, build_scene, nodes_around
from mvlm_export.passes.svg_text import (
    CONVERSION,
    ELEMENTWISE,
    MOVEMENT,
    OTHER,
    PRODUCT,
    attribute_lines,
    constant_lines,
    kind_of,
    shorten,
)
from tests.passes.graphs import nano_graph, parse_graph

SVG = "{http://www.w3.org/2000/svg}"
CHAIN = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,4] x) => (float[B,2] y) {
  a = Relu(x)
  b = Add(a, x)
  y = MatMul(b, w)
}
"""


def chain():
    return parse_graph(CHAIN, w=np.zeros((4, 2), np.float32))


def texts(picture):
    return [item.text for item in ET.fromstring(picture).iter(f"{SVG}text")]


def test_a_cycle_cannot_be_drawn_but_a_part_of_it_can():
    graph = chain()
    relu, add, _ = graph.nodes
    relu.name, add.name = "first", "second"
    relu.inputs = [add.outputs[0]]
    with pytest.raises(PassError, match=r"make a cycle, .*(Relu first → Add|Add second → Re)"):
        draw_graph(graph)
    assert "Relu" in texts(draw_graph(graph, None, "first", 0))


def test_attributes_and_dtypes_of_no_use_are_drawn_all_the_same():
    graph = chain()
    graph.nodes[0].attrs |= {"strides": 2, "pads": 0, "kernel_shape": 3}
    graph.nodes[0].outputs[0].dtype = 0
    graph.nodes[1].outputs[0].dtype = 99
    shown = " ".join(texts(draw_graph(graph)))
    assert "kernel 3" in shown
    assert "[B, 4] dtype 99" in shown


def test_everything_is_in_the_picture():
    shown = texts(draw_graph(chain(), "A chain"))
    assert shown[:2] == ["A chain", "3 nodes, opset 20"]
    assert Counter(shown) >= Counter(
        ["x", "y", "Relu", "Add", "MatMul", "w", "float32 [4, 2]", "[B, 2]", "float32"]
    )
    assert shown.count("[B, 4]") == 3
    assert {"products", "activation", "element by element"} <= set(shown)
    assert "comparison and logic" not in shown


def test_the_projector_of_the_nano_model():
    graph = nano_graph("projector")
    shown = texts(draw_graph(graph))
    assert "kernel 3×3, pads 1 1 1 1" in shown
    assert "group 256" in shown
    assert shown.count("perm 0 2 1") == 2
    assert "int64 [-1, 256, 8, 8]" in shown
    assert all(node.name in shown for node in graph.nodes)


def test_a_whole_decoder_is_valid_xml_without_scripts():
    root = ET.fromstring(draw_graph(nano_graph("decoder")))
    allowed = {f"{SVG}{tag}" for tag in ("svg", "g", "rect", "text", "path", "title")}
    assert {item.tag for item in root.iter()} == allowed
    assert not any(
        key.startswith("on") or "href" in key for i in root.iter() for key in i.attrib
    )


def test_nothing_lies_outside_the_picture():
    root = ET.fromstring(draw_graph(nano_graph("decoder"), around="model.layers.1.*"))
    width = float(root.get("width"))
    for box in root.iter(f"{SVG}rect"):
        left = float(box.get("x", 0))
        assert 0 <= left <= left + float(box.get("width")) <= width


def test_names_are_escaped():
    graph = chain()
    graph.nodes[0].name = '</text><script>"&\x00'
    graph.name = "<b>&"
    picture = draw_graph(graph)
    assert "<script" not in picture
    assert '</text><script>"&\N{REPLACEMENT CHARACTER}' in texts(picture)
    assert texts(picture)[0] == "<b>&"


def test_weights_are_not_loaded():
    def read():
        raise AssertionError("a weight was read")

    graph = chain()
    graph.tensors()["w"].values = DeferredValues((4, 2), np.float32, read)
    assert "float32 [4, 2]" in texts(draw_graph(graph))


def test_too_many_nodes_are_refused():
    graph = chain()
    tensor = graph.outputs[0]
    for index in range(MOST_NODES):
        output = gs.Variable(f"r{index}", np.float32, ["B", 2])
        graph.nodes.append(gs.Node("Relu", f"n{index}", {}, [tensor], [output]))
        tensor = output
    with pytest.raises(PassError, match=r"403 nodes.*--around"):
        draw_graph(graph)
    assert "n200" in texts(draw_graph(graph, around="n200"))
    with pytest.raises(PassError, match="smaller --depth"):
        draw_graph(graph, around="n200", depth=1000)


def names_around(graph, name, depth=None):
    return [node.op for node in nodes_around(graph, name, depth)]


@pytest.mark.parametrize(
    ("name", "depth", "expected"),
    [
        ("y", 0, ["MatMul"]),
        ("w", 0, ["MatMul"]),
        ("a", 0, ["Relu", "Add"]),
        ("x", 0, ["Relu", "Add"]),
        ("y", 1, ["Add", "MatMul"]),
        ("y", None, ["Relu", "Add", "MatMul"]),
    ],
)
def test_around_a_tensor(name, depth, expected):
    assert names_around(chain(), name, depth) == expected


def test_around_a_node():
    graph = nano_graph("projector")
    assert names_around(graph, "node_conv2d", 1) == ["AveragePool", "Conv", "Add"]


def test_a_pattern_takes_all_between():
    graph = nano_graph("decoder")
    layer = nodes_around(graph, "model.layers.1.*")
    counts = Counter(node.op for node in layer)
    assert (counts["Softmax"], counts["Sigmoid"], counts["MatMul"]) == (1, 1, 9)
    assert len(layer) < len(graph.nodes) / 4


def test_what_leads_out_of_a_part_is_shown():
    graph = chain()
    scene = build_scene(graph, [graph.nodes[1]])
    outside = [box.title for box in scene.boxes if box.outside]
    assert outside == ["a", "b"]
    assert [box.title for box in scene.boxes if box.kind is None and not box.outside] == ["x"]


def test_a_hub_does_not_lead_to_all_its_readers():
    graph = chain()
    for index in range(HUB):
        output = gs.Variable(f"r{index}", np.float32)
        graph.nodes.append(gs.Node("Neg", f"n{index}", {}, [graph.tensors()["a"]], [output]))
    assert "Neg" not in names_around(graph, "y")


@pytest.mark.parametrize(
    ("name", "hint"), [("node_conv2e", "Close names: node_conv2d"), ("zzz*", "no node or")]
)
def test_an_unknown_name_is_refused(name, hint):
    with pytest.raises(PassError, match="no node or tensor") as caught:
        draw_graph(nano_graph("projector"), around=name)
    assert hint in str(caught.value)


def test_a_difference_marks_what_only_one_has():
    before = nano_graph("projector")
    after = before.copy()
    FoldPegSkip().apply(after)
    root = ET.fromstring(draw_difference(before, after, ("old", "new")))
    shown = [item.text for item in root.iter(f"{SVG}text")]
    assert "12 nodes, opset 20, 1 only here" in shown
    assert "11 nodes, opset 20, 0 only here" in shown
    assert "peg.peg.0.weight.with_skip" in shown
    thick = [box for box in root.iter(f"{SVG}rect") if box.get("stroke-width") == "3.6"]
    assert len(thick) == 1


def edges(count):
    return st.lists(
        st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(
            lambda edge: edge[0] < edge[1]
        ),
        max_size=3 * count,
    )


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), edges(n))))
def test_layout_of_any_graph(case):
    """Wires lead down, boxes of a layer stand apart, bends are one a layer passed."""
    count, pairs = case
    extents = [Extent(20 + 3 * i, 30.0, 10.0 + i) for i in range(count)]
    wires = [Wire(a, b) for a, b in pairs]
    layout = lay_out(extents, wires)
    for wire, bends in zip(wires, layout.bends, strict=True):
        passed = layout.layers[wire.target] - layout.layers[wire.source] - 1
        assert passed == len(bends) >= 0
    for layer in range(max(layout.layers) + 1):
        row = sorted(
            (layout.anchors[i][0], i) for i in range(count) if layout.layers[i] == layer
        )
        for (x, one), (other_x, other) in pairwise(row):
            gap = (other_x - extents[other].left) - (x + extents[one].right)
            assert gap >= GAP_X - 1e-6
    for (_, bottom), (top, _) in pairwise(layout.bands):
        assert top > bottom
    for i, (x, _) in enumerate(layout.anchors):
        assert x - extents[i].left >= -1e-6
        assert x + extents[i].right <= layout.width + 1e-6


def test_a_source_stands_close_to_its_reader():
    assert assign_layers(4, [Wire(0, 1), Wire(1, 2), Wire(3, 2)]) == [0, 1, 2, 1]


def test_two_crossed_rows_are_uncrossed():
    wires = [Wire(0, 5), Wire(1, 4), Wire(2, 3)]
    layout = lay_out([Extent(10, 10, 10)] * 6, wires)
    for wire in wires:
        source, target = layout.anchors[wire.source], layout.anchors[wire.target]
        assert abs(source[0] - target[0]) < 1e-6


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(0.1, 9)), min_size=1, max_size=8),
    st.floats(0, 9),
)
def test_spread_is_the_nearest_that_fits(cases, gap):
    """Least squares: no single step to either side that still fits makes it better."""
    wishes, weights = zip(*cases, strict=True)
    places = spread(wishes, weights, [gap] * (len(cases) - 1))
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))

    def cost(values):
        return sum(w * (v - x) ** 2 for v, x, w in zip(values, wishes, weights, strict=True))

    for start in range(len(places)):
        for stop in range(start + 1, len(places) + 1):
            for step in (-1e-3, 1e-3):
                moved = [p + step * (start <= i < stop) for i, p in enumerate(places)]
                if all(b - a >= gap - 1e-9 for a, b in pairwise(moved)):
                    assert cost(moved) >= cost(places) - 1e-9


def last_curves(picture):
    """(from x, to x, to y) of the last curve of each wire."""
    paths = [path.get("d") for path in ET.fromstring(picture).iter(f"{SVG}path")]
    curves = [d.rpartition("C")[2].split() for d in paths if "C" in d]
    return [(float(c[0]), float(c[4]), float(c[5])) for c in curves]


@pytest.mark.parametrize("operands", ["a, x", "x, a"])
def test_operands_of_an_add_do_not_cross(operands):
    graph = parse_graph(CHAIN.replace("a, x", operands), w=np.zeros((4, 2), np.float32))
    curves = last_curves(draw_graph(graph))
    heights = Counter(y for _, _, y in curves)
    (height,) = [y for y, count in heights.items() if count == 2]
    (start, end, _), (other_start, other_end, _) = [c for c in curves if c[2] == height]
    assert (start < other_start) == (end < other_end)


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("MatMulNBits", PRODUCT),
        ("Add", ELEMENTWISE),
        ("Transpose", MOVEMENT),
        ("DequantizeLinear", CONVERSION),
        ("Mystery", OTHER),
    ],
)
def test_kinds(op, kind):
    assert kind_of(gs.Node(op)) is kind


@pytest.mark.parametrize(
    ("attrs", "lines"),
    [
        ({"perm": [0, 2, 1]}, ["perm 0 2 1"]),
        ({"group": 1, "strides": [1, 1], "pads": [0, 0]}, []),
        ({"to": 10}, ["to float16"]),
        ({"axis": -1, "epsilon": 1e-5}, ["axis -1, epsilon 1e-05"]),
        ({"num_heads": 16, "kv_num_heads": 4}, ["heads 16, kv heads 4"]),
        ({"secret": 3}, []),
    ],
)
def test_attributes(attrs, lines):
    assert attribute_lines(gs.Node("N", attrs=attrs)) == lines


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        (np.float32(1e-6), ("float32 1e-06",)),
        (np.array([-1, 256]), ("int64 [-1, 256]",)),
        (np.zeros((2, 2), np.float16), ("c", "float16 [2, 2]")),
        (np.zeros(7, np.int8), ("c", "int8 [7]")),
    ],
)
def test_constants(values, lines):
    assert constant_lines(gs.Constant("c", np.asarray(values))) == lines


@given(st.text(min_size=1, max_size=60), st.integers(5, 40))
def test_shortened_names_fit(text, length):
    short = shorten(text, length)
    assert len(short) <= length
    assert short == text or "…" in short


def test_operands_of_an_add_arrive_in_the_order_they_come_in():
    """Sub fixes the order of the two, and Add names them the other way round."""
    graph = parse_graph("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B,4] x) => (float[B,4] y, float[B,4] z) {
      a = Relu(x)  b = Neg(x)  y = Sub(a, b)  z = Add(b, a)
    }
    """)
    curves = last_curves(draw_graph(graph))
    heights = Counter(y for _, _, y in curves)
    height = max(heights, key=heights.__getitem__)
    arriving = sorted((end, start) for start, end, y in curves if y == height)
    starts = [start for _, start in arriving]
    assert len(starts) == 4
    assert starts[0] < starts[1]
    assert starts[2] < starts[3]
