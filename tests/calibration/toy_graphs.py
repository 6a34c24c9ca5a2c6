"""Small graphs with every kind of layer, and feeds for them."""

import numpy as np
import onnx_graphsurgeon as gs

from tests.passes.graphs import parse_graph

VOCABULARY = 40
WIDTH = 64


def toy_decoder(seed=0):
    """A table, two residual blocks of two products, a head: six layers, rows on their own."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return rng.normal(size=shape, scale=shape[0] ** -0.5).astype(np.float32)

    graph = parse_graph(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        toy (int64[S] ids, float[1] shift) => (float[S,40] logits, float[S,64] last) {
            h0 = Gather <axis=0> (embed, ids)
            a0 = Sigmoid(h0)
            b0 = MatMul(a0, up0)
            c0 = Add(b0, shift)
            d0 = Sigmoid(c0)
            e0 = MatMul(d0, down0)
            h1 = Add(h0, e0)
            a1 = Sigmoid(h1)
            b1 = MatMul(a1, up1)
            c1 = Add(b1, shift)
            d1 = Sigmoid(c1)
            e1 = MatMul(d1, down1)
            last = Add(h1, e1)
            logits = MatMul(last, head)
        }
        """,
        embed=rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        up0=weight(WIDTH, 128),
        down0=weight(128, WIDTH),
        up1=weight(WIDTH, 128),
        down1=weight(128, WIDTH),
        head=weight(WIDTH, VOCABULARY),
    )
    names = {
        "embed": "model.embed_tokens.weight",
        "up0": "model.layers.0.up.weight",
        "down0": "model.layers.0.down.weight",
        "up1": "model.layers.1.up.weight",
        "down1": "model.layers.1.down.weight",
        "head": "lm_head.weight",
    }
    for tensor in graph.tensors().values():
        tensor.name = names.get(tensor.name, tensor.name)
    for index, node in enumerate(graph.nodes):
        node.name = f"node_{index}"
    return graph


def toy_feeds(count=3, seed=1):
    """``count`` samples of several lengths."""
    rng = np.random.default_rng(seed)
    return [
        {
            "ids": rng.integers(0, VOCABULARY, 5 + 3 * index),
            "shift": np.full(1, 0.1, np.float32),
        }
        for index in range(count)
    ]


def toy_normed(seed=0):
    """A table with a loud channel, RMSNorm, and a head: a place for scales before the head."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    table[:, 7] *= 20
    graph = parse_graph(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        toy (int64[S] ids) => (float[S,40] logits) {
            h = Gather <axis=0> (embed, ids)
            square = Mul(h, h)
            mean = ReduceMean <keepdims=1> (square, last)
            added = Add(mean, epsilon)
            root = Sqrt(added)
            inverse = Reciprocal(root)
            x = Mul(h, inverse)
            logits = MatMul(x, head)
        }
        """,
        embed=table,
        last=np.array([-1]),
        epsilon=np.array(1e-6, np.float32),
        head=rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32),
    )
    graph.tensors()["head"].name = "lm_head.weight"
    for index, node in enumerate(graph.nodes):
        node.name = f"node_{index}"
    return graph


def toy_encoder(seed=0):
    """A convolution, three products and one attention over [1, 4, 8]."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return rng.normal(size=shape, scale=0.4).astype(np.float32)

    graph = parse_graph(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        toy (float[1,3,8,8] pixels) => (float[1,4,8] features) {
            p = Conv <kernel_shape=[4,4], strides=[4,4]> (pixels, patch, bias)
            f = Reshape(p, flat)
            x = Transpose <perm=[0,2,1]> (f)
            q = MatMul(x, query)
            k = MatMul(x, key)
            kt = Transpose <perm=[0,2,1]> (k)
            s = MatMul(q, kt)
            w = Softmax <axis=-1> (s)
            v = MatMul(x, value)
            y = MatMul(w, v)
            features = Add(x, y)
        }
        """,
        patch=weight(8, 3, 4, 4),
        bias=weight(8),
        flat=np.array([1, 8, 4]),
        query=weight(8, 8),
        key=weight(8, 8),
        value=weight(8, 8),
    )
    for index, node in enumerate(graph.nodes):
        node.name = f"node_{index}"
    return graph


def toy_pictures(count=3, seed=1):
    """``count`` samples for :func:`toy_encoder`."""
    rng = np.random.default_rng(seed)
    shape = (1, 3, 8, 8)
    return [{"pixels": rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def constant_of(graph, name):
    """A constant by its name."""
    found = graph.tensors()[name]
    assert isinstance(found, gs.Constant)
    return found
