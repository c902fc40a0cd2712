# ruff: noqa: E501 -- one case a line reads best
"""Small graphs, one or more for every rule of the gradient graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import numpy_helper
from onnx.parser import parse_model

from ccn_deploy.graph.graph import Graph


@dataclass(frozen=True)
class Case:
    """A graph whose tensor ``y`` becomes the logits.

    Attributes:
        name: Of the case; its first word is the op that it is for.
        shape: Of one image.
        body: Nodes from ``images`` to ``y``, as ONNX's text form has them.
        constants: By name: an array, or a shape to draw from a normal distribution.
        positive: Whether the images stay away from 0.
        opset: Version of the operator set.
    """

    name: str
    shape: tuple[int, ...]
    body: str
    constants: Mapping[str, object] = field(default_factory=dict)
    positive: bool = False
    opset: int = 20

    @property
    def op(self) -> str:
        """The op that the case is for."""
        return self.name.split()[0]

    def graph(self, seed: int = 0) -> Graph:
        """Return the graph with its random constants drawn."""
        pixels = ",".join(str(size) for size in self.shape)
        model = parse_model(
            f'<ir_version: 9, opset_import: ["" : {self.opset}]>'
            f"small (float[batch,{pixels}] images) => (float[batch,classes] logits) "
            f"{{ {self.body} logits = Flatten<axis = 1>(y) }}"
        )
        generator = np.random.default_rng(seed)
        for name, value in self.constants.items():
            if isinstance(value, tuple):
                value = generator.standard_normal(value).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return Graph(model)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def scalar(value: float) -> np.ndarray:
    return np.float32(value)


IMAGE = (3, 6, 5)


def function(op: str, attributes: str = "", positive: bool = False, opset: int = 20) -> Case:
    """A function of one number, on values around 0 (or on positive ones)."""
    shift = "x = Identity(images)" if positive else "x = Sub(images, half)"
    given = f"<{attributes}>" if attributes else ""
    name = f"{op} {attributes}".strip()
    constants = {} if positive else {"half": scalar(0.5)}
    body = f"{shift} a = Mul(x, four) y = {op}{given}(a)"
    return Case(name, IMAGE, body, {**constants, "four": scalar(4)}, positive, opset)


FUNCTIONS = [
    function("Relu"),
    function("LeakyRelu", "alpha = 0.2"),
    function("LeakyRelu"),
    function("ThresholdedRelu", "alpha = 0.3"),
    function("Elu", "alpha = 0.7"),
    function("Selu"),
    function("Celu", "alpha = 0.6"),
    function("Sigmoid"),
    function("HardSigmoid", "alpha = 0.3, beta = 0.4"),
    function("HardSwish"),
    function("Tanh"),
    function("Softplus"),
    function("Softsign"),
    function("Mish"),
    function("Gelu"),
    function("Gelu", 'approximate = "tanh"'),
    function("Erf"),
    function("Exp"),
    function("Log", positive=True),
    function("Sqrt", positive=True),
    function("Reciprocal", positive=True),
    function("Abs"),
    function("Neg"),
    function("Sin"),
    function("Cos"),
    function("Atan"),
    function("Swish", "alpha = 1.3", opset=24),
    function("Sinh"),
    function("Cosh"),
    function("Identity"),
    function("Cast", "to = 1"),
    Case("Dropout", IMAGE, "y = Dropout(images)"),
    Case("PRelu", IMAGE, "x = Sub(images, half) y = PRelu(x, s)", {"half": scalar(0.5), "s": (3, 1, 1)}),
    Case("Clip both", IMAGE, "y = Clip(images, low, high)", {"low": scalar(0.2), "high": scalar(0.7)}),
    Case("Clip low", IMAGE, "y = Clip(images, low)", {"low": scalar(0.4)}),
    Case("Clip high", IMAGE, "y = Clip(images, , high)", {"high": scalar(0.4)}),
    Case("Clip none", IMAGE, "y = Clip(images)"),
]  # fmt: skip

ARITHMETIC = [
    Case("Add broadcast", IMAGE, "r = ReduceMean(images, a) y = Add(r, images)", {"a": ints(2)}),
    Case("Add rank", IMAGE, "a = Add(images, w) y = Transpose<perm = [1, 0, 2, 3, 4]>(a)", {"w": (4, 1, 3, 6, 5)}),
    Case("Add self", IMAGE, "y = Add(images, images)"),
    Case("Sum", IMAGE, "r = ReduceMean(images, a) y = Sum(r, images, w)", {"a": ints(1), "w": (6, 1)}),
    Case("Mean", IMAGE, "r = ReduceMean(images, a) y = Mean(r, images, w)", {"a": ints(1), "w": (6, 1)}),
    Case("Sub left", IMAGE, "y = Sub(w, images)", {"w": (3, 1, 1)}),
    Case("Sub broadcast", IMAGE, "r = ReduceMean(images, a) y = Sub(images, r)", {"a": ints(1)}),
    Case("Mul broadcast", IMAGE, "r = ReduceMean(images, a) y = Mul(images, r)", {"a": ints(2, 3)}),
    Case("Mul self", IMAGE, "y = Mul(images, images)"),
    Case("Mul two", IMAGE, "b = Sin(images) y = Mul(images, b)"),
    Case("Mul scalar", IMAGE, "y = Mul(w, images)", {"w": scalar(3)}),
    Case("Div constant", IMAGE, "y = Div(images, w)", {"w": np.float32([[[2]], [[3]], [[5]]])}),
    Case("Div by", IMAGE, "y = Div(w, images)", {"w": (3, 1, 1)}, positive=True),
    Case("Div broadcast", IMAGE, "r = ReduceMean(images, a) y = Div(images, r)", {"a": ints(1)}, positive=True),
    Case("Div two", IMAGE, "b = Exp(images) y = Div(images, b)"),
    Case("Pow 2", IMAGE, "y = Pow(images, p)", {"p": scalar(2)}),
    Case("Pow 1", IMAGE, "y = Pow(images, p)", {"p": scalar(1)}),
    Case("Pow half", IMAGE, "y = Pow(images, p)", {"p": scalar(0.5)}, positive=True),
    Case("Pow minus half", IMAGE, "y = Pow(images, p)", {"p": scalar(-0.5)}, positive=True),
    Case("Pow tensor", IMAGE, "y = Pow(images, p)", {"p": np.float32([[[3]], [[1.5]], [[-1]]])}, positive=True),
    Case("Pow exponent", IMAGE, "y = Pow(b, images)", {"b": np.float32([[[3]], [[1.5]], [[2]]])}),
    Case("Pow both", IMAGE, "b = Exp(images) y = Pow(b, images)"),
    Case("Where", IMAGE, "c = Greater(images, h) b = Sin(images) y = Where(c, images, b)", {"h": scalar(0.5)}),
    Case("Where broadcast", IMAGE, "r = ReduceMean(images, a) y = Where(c, r, images)",
         {"a": ints(1), "c": np.array([True, False, True, False, True])}),
    Case("Max", IMAGE, "r = ReduceMean(images, a) y = Max(images, r)", {"a": ints(1)}),
    Case("Max three", IMAGE, "b = Sin(images) y = Max(h, images, b)", {"h": scalar(0.5)}),
    Case("Max one", IMAGE, "y = Max(images)"),
    Case("Min", IMAGE, "y = Min(images, h)", {"h": scalar(0.5)}),
]  # fmt: skip

PRODUCTS = [
    Case("MatMul weight", (4, 5), "y = MatMul(images, w)", {"w": (5, 3)}),
    Case("MatMul left", (4, 5), "y = MatMul(w, images)", {"w": (3, 4)}),
    Case("MatMul attention", (4, 5), "t = Transpose<perm = [0, 2, 1]>(images) y = MatMul(images, t)"),
    Case("MatMul heads", (4, 6),
         "r = Reshape(images, s) q = Transpose<perm = [0, 2, 1, 3]>(r) k = Transpose<perm = [0, 2, 3, 1]>(r)"
         " m = MatMul(q, k) p = Softmax<axis = -1>(m) y = MatMul(p, q)", {"s": ints(0, 4, 2, 3)}),
    Case("MatMul batch broadcast", (2, 4, 5), "r = ReduceMean(images, a) t = Transpose<perm = [0, 1, 3, 2]>(r)"
         " y = MatMul(images, t)", {"a": ints(1)}),
    Case("MatMul missing axis", (2, 4, 5), "a = MatMul(images, w) y = Transpose<perm = [1, 0, 2, 3, 4]>(a)",
         {"w": (3, 1, 2, 5, 2)}),
    Case("MatMul vector right", (4, 5), "y = MatMul(images, w)", {"w": (5,)}),
    Case("MatMul vector left", (4, 5), "y = MatMul(w, images)", {"w": (4,)}),
    Case("Gemm", (5,), "y = Gemm(images, w, b)", {"w": (5, 3), "b": (3,)}),
    Case("Gemm turned", (5,), "y = Gemm<transB = 1, alpha = 2.0>(images, w)", {"w": (3, 5)}),
    Case("Gemm added", (5,), "s = Sin(m) y = Gemm<transB = 1, beta = 3.0>(images, w, s) ", {"w": (5, 5), "m": (5,)}),
    Case("Gemm bias", (5,), "y = Gemm<beta = 3.0>(images, w, images) ", {"w": (5, 5)}),
    Case("Einsum", (4, 5), 'y = Einsum<equation = "bij,jk->bik">(images, w)', {"w": (5, 3)}),
    Case("Einsum attention", (4, 5), 'y = Einsum<equation = "bij, bkj -> bik">(images, images)'),
    Case("Einsum turned", (4, 5), 'y = Einsum<equation = "bij->bji">(images)'),
]  # fmt: skip


def conv(name: str, attributes: str, weight: tuple[int, ...], shape: tuple[int, ...]) -> Case:
    body = f"y = Conv<{attributes}>(images, w, b)"
    return Case(f"Conv {name}", shape, body, {"w": weight, "b": (weight[0],)})


def conv_transpose(name: str, attributes: str, weight: tuple[int, ...]) -> Case:
    body = f"y = ConvTranspose<{attributes}>(images, w)"
    return Case(f"ConvTranspose {name}", (4, 5, 6), body, {"w": weight})


CONVOLUTIONS = [
    conv("narrow", "kernel_shape = [3, 2]", (5, 3, 3, 2), IMAGE),
    conv("wide", "kernel_shape = [3, 2]", (5, 9, 3, 2), (9, 6, 5)),
    conv("wide padded", "kernel_shape = [3, 3], pads = [1, 1, 1, 1]", (5, 9, 3, 3), (9, 6, 5)),
    conv("wide asymmetric", "kernel_shape = [3, 3], pads = [0, 2, 1, 1]", (5, 9, 3, 3), (9, 6, 5)),
    conv("over-padded", "kernel_shape = [2, 2], pads = [3, 2, 0, 3]", (5, 9, 2, 2), (9, 6, 5)),
    conv("wide dilated", "kernel_shape = [2, 3], dilations = [3, 2], pads = [1, 2, 2, 2]", (5, 9, 2, 3), (9, 6, 5)),
    conv("stride", "kernel_shape = [3, 3], strides = [2, 3], pads = [1, 0, 1, 0]", (5, 3, 3, 3), (3, 8, 7)),
    conv("stride with remainder", "kernel_shape = [2, 2], strides = [3, 2]", (5, 3, 2, 2), (3, 7, 7)),
    conv("stride dilated", "kernel_shape = [2, 2], strides = [2, 2], dilations = [2, 2], pads = [0, 1, 2, 0]",
         (5, 3, 2, 2), (3, 8, 7)),
    conv("point stride", "kernel_shape = [1, 1], strides = [2, 2]", (5, 9, 1, 1), (9, 6, 5)),
    conv("groups", "kernel_shape = [3, 3], group = 2, pads = [1, 1, 1, 1]", (6, 5, 3, 3), (10, 6, 5)),
    conv("depthwise", "kernel_shape = [3, 3], group = 8, pads = [1, 1, 1, 1]", (8, 1, 3, 3), (8, 6, 5)),
    conv("depthwise stride", "kernel_shape = [3, 3], group = 8, strides = [2, 2], pads = [1, 1, 1, 1]",
         (8, 1, 3, 3), (8, 6, 5)),
    conv("depth multiplier", "kernel_shape = [3, 3], group = 4", (12, 1, 3, 3), (4, 6, 5)),
    conv("same upper", 'auto_pad = "SAME_UPPER", strides = [2, 2], kernel_shape = [3, 2]', (5, 3, 3, 2), IMAGE),
    conv("same lower", 'auto_pad = "SAME_LOWER", kernel_shape = [2, 4]', (5, 9, 2, 4), (9, 6, 5)),
    conv("valid", 'auto_pad = "VALID", kernel_shape = [3, 2]', (5, 3, 3, 2), IMAGE),
    conv("line", "kernel_shape = [3], strides = [2], pads = [1, 0]", (5, 3, 3), (3, 8)),
    conv("space", "kernel_shape = [2, 2, 3], pads = [0, 1, 1, 0, 0, 1]", (5, 9, 2, 2, 3), (9, 3, 4, 5)),
    Case("Conv computed kernel", IMAGE, "k = Sin(w) y = Conv<kernel_shape = [3, 3]>(images, k)", {"w": (9, 3, 3, 3)}),
    conv_transpose("plain", "kernel_shape = [3, 3]", (4, 2, 3, 3)),
    conv_transpose("stride", "kernel_shape = [3, 2], strides = [2, 3], pads = [1, 0, 0, 1]", (4, 2, 3, 2)),
    conv_transpose("output padding", "kernel_shape = [3, 3], strides = [2, 2], output_padding = [1, 0]",
                   (4, 2, 3, 3)),
    conv_transpose("groups", "kernel_shape = [3, 3], group = 2, dilations = [2, 1]", (4, 3, 3, 3)),
]  # fmt: skip


def pool(
    name: str, attributes: str, shape: tuple[int, ...] = (2, 7, 8), op: str = "MaxPool"
) -> Case:
    return Case(f"{op} {name}", shape, f"y = {op}<{attributes}>(images)")


WINDOWS = {
    "tiled": "kernel_shape = [2, 2], strides = [2, 2]",
    "tiled with border": "kernel_shape = [2, 3], strides = [2, 3]",
    "overlap": "kernel_shape = [3, 3], strides = [2, 2]",
    "stem": "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]",
    "default stride": "kernel_shape = [2, 3]",
    "asymmetric": "kernel_shape = [3, 2], strides = [2, 1], pads = [0, 1, 2, 0]",
    "ceil": "kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1",
    "ceil tiled": "kernel_shape = [2, 3], strides = [2, 3], ceil_mode = 1",
    "ceil padded": "kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1, pads = [1, 1, 1, 1]",
    "gaps": "kernel_shape = [2, 2], strides = [3, 3]",
    "dilated": "kernel_shape = [2, 2], dilations = [2, 3]",
    "same": 'kernel_shape = [2, 3], auto_pad = "SAME_UPPER", strides = [2, 2]',
}

POOLS = [
    *(pool(name, attributes) for name, attributes in WINDOWS.items()),
    pool("tiles exactly", WINDOWS["tiled"], (2, 6, 8)),
    pool("line", "kernel_shape = [3], strides = [2]", (2, 9)),
    pool("space", "kernel_shape = [2, 2, 2], strides = [2, 1, 2]", (2, 4, 3, 4)),
    *(
        pool(name, attributes, op="AveragePool")
        for name, attributes in WINDOWS.items()
        if "dilations" not in attributes
    ),
    pool("counting the padding", f"{WINDOWS['stem']}, count_include_pad = 1", op="AveragePool"),
    Case("GlobalAveragePool", IMAGE, "y = GlobalAveragePool(images)"),
    Case("GlobalMaxPool", IMAGE, "y = GlobalMaxPool(images)"),
]  # fmt: skip


def reduction(op: str, positive: bool = False) -> list[Case]:
    return [
        Case(f"{op} kept", IMAGE, f"y = {op}<keepdims = 1>(images, a)", {"a": ints(1, -1)}, positive),
        Case(f"{op} dropped", IMAGE, f"y = {op}<keepdims = 0>(images, a)", {"a": ints(2)}, positive),
    ]  # fmt: skip


REDUCTIONS = [
    *(
        case
        for op in ("Sum", "Mean", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Max", "Min")
        for case in reduction(f"Reduce{op}", positive=True)
    ),
    Case("ReduceMean attribute", IMAGE, "y = ReduceMean<axes = [2, 3]>(images)", opset=13),
    Case("Softmax", IMAGE, "y = Softmax<axis = 1>(images)"),
    Case("Softmax last", IMAGE, "a = Mul(images, s) y = Softmax(a)", {"s": scalar(5)}),
    Case("Softmax old", IMAGE, "y = Softmax<axis = 1>(images)", opset=11),
    Case("LogSoftmax", IMAGE, "y = LogSoftmax<axis = -2>(images)"),
    Case("CumSum", IMAGE, "y = CumSum(images, a)", {"a": np.int64(2)}),
    Case("CumSum reverse", IMAGE, "y = CumSum<exclusive = 1, reverse = 1>(images, a)", {"a": np.int64(-1)}),
]  # fmt: skip

STATISTICS = {"g": (4,), "b": (4,), "m": (4,), "v": np.float32([0.5, 1, 2, 0.1])}
FOUR = (4, 5, 3)

NORMS = [
    Case("BatchNormalization", FOUR, "y = BatchNormalization(images, g, b, m, v)", STATISTICS),
    Case("LayerNormalization", IMAGE, "y = LayerNormalization(images, g, b)", {"g": (5,), "b": (5,)}),
    Case("LayerNormalization axis", IMAGE, "y = LayerNormalization<axis = 2>(images, g)", {"g": (6, 5)}),
    Case("RMSNormalization", IMAGE, "y = RMSNormalization(images, g)", {"g": (5,)}, opset=23),
    Case("InstanceNormalization", FOUR, "y = InstanceNormalization(images, g, b)", {"g": (4,), "b": (4,)}),
    Case("GroupNormalization", FOUR, "y = GroupNormalization<num_groups = 2>(images, g, b)",
         {"g": (4,), "b": (4,)}, opset=21),
    Case("GroupNormalization old", FOUR, "y = GroupNormalization<num_groups = 2>(images, g, b)",
         {"g": (2,), "b": (2,)}, opset=18),
    Case("MeanVarianceNormalization", FOUR, "y = MeanVarianceNormalization<axes = [1, 3]>(images)"),
    Case("LpNormalization", FOUR, "y = LpNormalization<axis = 1>(images)", positive=True),
    Case("LpNormalization 1", FOUR, "y = LpNormalization<axis = 2, p = 1>(images)", positive=True),
    Case("LRN", (7, 3, 4), "y = LRN<size = 3, alpha = 0.5, beta = 0.6, bias = 1.2>(images)"),
]  # fmt: skip

MOVES = [
    Case("Reshape", IMAGE, "y = Reshape(images, s)", {"s": ints(0, -1, 2)}),
    Case("Reshape batch", IMAGE, "r = Reshape(images, s) n = Softmax<axis = -1>(r) y = Reshape(n, b)",
         {"s": ints(-1, 5), "b": ints(-1, 18, 5)}),
    Case("Flatten", IMAGE, "f = Flatten<axis = 2>(images) y = Reshape(f, b)", {"b": ints(-1, 90)}),
    Case("Squeeze", (3, 1, 5), "y = Squeeze(images, a)", {"a": ints(2)}),
    Case("Unsqueeze", IMAGE, "y = Unsqueeze(images, a)", {"a": ints(1, -1)}),
    Case("Transpose", IMAGE, "y = Transpose<perm = [0, 3, 1, 2]>(images)"),
    Case("Transpose batch", IMAGE, "t = Transpose<perm = [2, 0, 3, 1]>(images) s = Sin(t)"
         " y = Transpose<perm = [1, 0, 2, 3]>(s)"),
    Case("Concat", IMAGE, "b = Sin(images) c = Floor(b) y = Concat<axis = -1>(images, c, b)"),
    Case("Concat constant", IMAGE, "f = Shape<start = 0, end = 1>(images) s = Concat<axis = 0>(f, r) e = Expand(w, s)"
         " y = Concat<axis = 1>(e, images)", {"w": (1, 2, 6, 5), "r": ints(2, 6, 5)}),
    Case("Split", IMAGE, "a, b, c = Split<axis = 2>(images, s) d = Sin(c) y = Concat<axis = 2>(d, a)",
         {"s": ints(1, 2, 3)}),
    Case("Expand", (3, 1, 5), "y = Expand(images, s)", {"s": ints(1, 1, 4, 1)}),
    Case("Expand rank", (3, 1, 5), "e = Expand(images, s) t = Transpose<perm = [1, 0, 2, 3, 4]>(e) y = Sin(t)",
         {"s": ints(2, 1, 1, 4, 1)}),
    Case("Tile", IMAGE, "y = Tile(images, r)", {"r": ints(1, 2, 1, 3)}),
    Case("DepthToSpace", (8, 2, 3), "y = DepthToSpace<blocksize = 2>(images)"),
    Case("DepthToSpace CRD", (8, 2, 3), 'y = DepthToSpace<blocksize = 2, mode = "CRD">(images)'),
    Case("SpaceToDepth", (2, 4, 6), "y = SpaceToDepth<blocksize = 2>(images)"),
    Case("Pad", IMAGE, "y = Pad(images, p)", {"p": ints(0, 0, 1, 2, 0, 0, 0, 3)}),
    Case("Pad crop", IMAGE, "y = Pad(images, p)", {"p": ints(0, 0, -1, 2, 0, 0, 1, -1)}),
    Case("Pad reflect", IMAGE, 'y = Pad<mode = "reflect">(images, p)', {"p": ints(0, 0, 2, 1, 0, 0, 1, 3)}),
    Case("Pad edge", IMAGE, 'y = Pad<mode = "edge">(images, p)', {"p": ints(0, 1, 2, 1, 0, 0, 1, 3)}),
    Case("Trilu", IMAGE, "y = Trilu<upper = 0>(images, k)", {"k": np.int64(1)}),
]  # fmt: skip


def resize(
    name: str, attributes: str, scales: tuple[float, ...], shape: tuple[int, ...] = IMAGE
) -> Case:
    body = f"y = Resize<{attributes}>(images, , s)"
    return Case(f"Resize {name}", shape, body, {"s": np.array(scales, dtype=np.float32)})


PICKS = [
    Case("Gather one", IMAGE, "y = Gather<axis = 2>(images, i)", {"i": np.int64(-2)}),
    Case("Gather range", IMAGE, "y = Gather<axis = 2>(images, i)", {"i": ints(1, 2, 3)}),
    Case("Gather order", IMAGE, "y = Gather<axis = 1>(images, i)", {"i": ints(2, 0, 1)}),
    Case("Gather some", IMAGE, "y = Gather<axis = 3>(images, i)", {"i": ints(4, 0, 2)}),
    Case("Gather again", IMAGE, "y = Gather<axis = 1>(images, i)", {"i": ints(0, 0, 2, 0)}),
    Case("Gather matrix", IMAGE, "y = Gather<axis = 2>(images, i)", {"i": ints(0, 3, 3, 5).reshape(2, 2)}),
    Case("Gather batch of results", IMAGE, "s = Sin(images) n = Shape<start = 0, end = 1>(s) m = Squeeze(n)"
         " i = Range(z, m, o) y = Gather<axis = 0>(s, i)", {"z": np.int64(0), "o": np.int64(1)}),
    Case("Gather batch", IMAGE, "n = Shape<start = 0, end = 1>(images) m = Squeeze(n) i = Range(z, m, o)"
         " y = Gather<axis = 0>(images, i)", {"z": np.int64(0), "o": np.int64(1)}),
    Case("Slice", IMAGE, "y = Slice(images, s, e, a)", {"s": ints(1, -3), "e": ints(5, -1), "a": ints(2, 3)}),
    Case("Slice step", IMAGE, "y = Slice(images, s, e, a, t)",
         {"s": ints(1, 0), "e": ints(9, 9), "a": ints(2, 3), "t": ints(2, 3)}),
    Case("Slice reverse", IMAGE, "y = Slice(images, s, e, a, t)",
         {"s": ints(-1), "e": ints(-100), "a": ints(3), "t": ints(-1)}),
    Case("Slice old", IMAGE, "y = Slice<starts = [0, 1], ends = [9223372036854775807, 3], axes = [0, 1]>(images)", opset=9),
    resize("twice", 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"', (1, 1, 2, 3)),
    resize("nearest odd", 'mode = "nearest"', (1, 1, 1.5, 2)),
    resize("linear", 'mode = "linear"', (1, 1, 2, 2)),
    resize("linear corners", 'mode = "linear", coordinate_transformation_mode = "align_corners"', (1, 1, 1.5, 2)),
    resize("linear down", 'mode = "linear"', (1, 1, 0.5, 0.6)),
    resize("cubic", 'mode = "cubic", cubic_coeff_a = -0.5', (1, 1, 2, 1.6)),
    resize("line", 'mode = "linear"', (1, 1, 2), (3, 6)),
    Case("Resize sizes", IMAGE, 'n = Shape<start = 0, end = 2>(images) z = Concat<axis = 0>(n, s)'
         ' y = Resize<mode = "linear">(images, , , z)', {"s": ints(9, 4)}),
]  # fmt: skip

CASES = [
    *FUNCTIONS,
    *ARITHMETIC,
    *PRODUCTS,
    *CONVOLUTIONS,
    *POOLS,
    *REDUCTIONS,
    *NORMS,
    *MOVES,
    *PICKS,
]
