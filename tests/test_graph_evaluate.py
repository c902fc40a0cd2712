"""A graph evaluated in torch against the modules it came from, and what it says of itself."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ccn_deploy.errors import GraphError
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.layers import layer_outputs
from ccn_deploy.graph.reader import read_graph
from ccn_deploy.models import build_model
from tests.networks import DEFENSES, difficult_images, random_network

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def network(defense):
    """Return a network whose alphas are 1 and deltas float32's, so that lowering rounds none."""
    model = build_model("mnist-cnn", defense, classes=10, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for layer in model.modules():
        if hasattr(layer, "delta"):
            layer.delta = float(np.float32(layer.delta))
    return model.eval().requires_grad_(False)


def images_with_holes():
    """Noise around a hole of the mean, where whole patches are zero inside.

    Larger holes would make a pool's candidates equal, and rounding would choose among them.
    """
    images = np.random.default_rng(7).random((3, 1, 28, 28))
    images[:, :, 5:9, 12:15] = 0.5
    images[1, :, 20:23, 3:6] = 0.5
    return torch.from_numpy(images)


def logits_and_gradient(module, images):
    leaf = images.clone().requires_grad_()
    logits = module(leaf)
    weights = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
    return logits.detach(), gradient


@pytest.mark.parametrize("defense", DEFENSES)
def test_float64_is_the_module_to_rounding(defense) -> None:
    model = network(defense)
    graph = Graph(lower(model))
    images = torch.from_numpy(np.random.default_rng(7).random((3, 1, 28, 28)))
    logits, gradient = logits_and_gradient(model.double(), images)
    found, slope = logits_and_gradient(GraphModule(graph, torch.float64), images)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-10 * float(logits.abs().max()))
    torch.testing.assert_close(slope, gradient, rtol=0, atol=1e-10 * float(gradient.abs().max()))


def test_gradients_at_empty_patches_are_the_modules() -> None:
    """To the part in ten thousand that the module's floor under the norm is of its delta."""
    model = network("ccn")
    graph = Graph(lower(model))
    _, gradient = logits_and_gradient(model.double(), images_with_holes())
    _, slope = logits_and_gradient(GraphModule(graph, torch.float64), images_with_holes())
    assert (slope - gradient).abs().max() < 1.1e-4 * gradient.abs().max()


def test_an_empty_image_has_a_finite_gradient() -> None:
    module = GraphModule(Graph(lower(random_network("mnist-cnn", "ccn"))))
    images = torch.from_numpy(difficult_images((1, 28, 28)))
    logits, gradient = logits_and_gradient(module, images)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("defense", ["ccn", "sm"])
def test_float32_is_near(defense) -> None:
    model = random_network("mnist-cnn", defense)
    graph = Graph(lower(model))
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    wanted, slope = logits_and_gradient(GraphModule(graph, torch.float64), images.double())
    found, gradient = logits_and_gradient(GraphModule(graph), images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    assert (gradient.double() - slope).norm() < 1e-4 * slope.norm()


def test_a_module_without_state() -> None:
    module = GraphModule(Graph(lower(random_network("mnist-cnn", "ccn"))))
    assert not list(module.parameters())
    assert not module.state_dict()
    assert {b.dtype for b in module.buffers()} == {torch.float32}


def test_values_are_those_of_forward() -> None:
    model = random_network("mnist-cnn", "ccn")
    module = GraphModule(Graph(lower(model)), torch.float64)
    images = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    everything = module.values(images)
    some = module.values(images, ["conv2.norm", "logits", "conv1.weight"])
    assert set(some) == {"conv2.norm", "logits", "conv1.weight"}
    for name, tensor in some.items():
        torch.testing.assert_close(tensor, everything[name], rtol=0, atol=0)
    torch.testing.assert_close(some["logits"], module(images), rtol=0, atol=0)
    layers = dict(model.named_layers())
    assert [n for n in layers if n in everything or n == "fc3"] == [
        *(n for n in layers if not n.startswith("drop")),
    ]


def test_values_of_a_tensor_that_is_not_there() -> None:
    module = GraphModule(Graph(lower(random_network("mnist-cnn", "sm"))))
    with pytest.raises(GraphError, match="'nothing'"):
        module.values(torch.rand(1, 1, 28, 28), ["nothing"])


def test_steps_can_be_run_again_on_more_images() -> None:
    graph = Graph(lower(random_network("mnist-cnn", "ccn")))
    module = GraphModule(graph, torch.float64)
    images = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    seen = []
    for node, inputs, outputs in module.steps(images):
        seen.append(node.name)
        batch = [
            torch.cat([t, t]) if name in graph.floats else t
            for name, t in zip(node.inputs, inputs, strict=True)
        ]
        (again,) = module.apply(node, batch)
        torch.testing.assert_close(again, torch.cat([outputs[0], outputs[0]]))
    assert seen == [node.name for node in graph.nodes]


def test_a_folded_node_is_among_the_steps() -> None:
    graph = read_graph(reshaping().SerializeToString())
    module = GraphModule(graph, torch.float64)
    found = {node.name: outputs for node, _, outputs in module.steps(torch.rand(2, 3, 4, 4))}
    assert set(found) == {node.name for node in graph.nodes}
    torch.testing.assert_close(found["turned"][0], torch.eye(3, dtype=torch.float64).T * 2)


def reshaping(last=True):
    """Return a graph with shape arithmetic: channels join the batch, and leave it again."""

    def ints(name, *values):
        return numpy_helper.from_array(np.array(values, dtype=np.int64), name)

    weight = 2 * np.eye(3, dtype=np.float32)
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "one"], ["channels"], name="channels"),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], name="batch"),
        helper.make_node("Reshape", ["images", "joined"], ["planes"], name="planes"),
        helper.make_node("ReduceMean", ["planes", "axes"], ["means"], name="means", keepdims=0),
        helper.make_node("Concat", ["batch", "channels"], ["back"], name="back", axis=0),
        helper.make_node("Reshape", ["means", "back"], ["rows"], name="rows"),
        helper.make_node("Transpose", ["weight"], ["turned"], name="turned"),
        helper.make_node("MatMul", ["rows", "turned"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "reshaping",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            ints("zero", 0),
            ints("one", 1),
            ints("axes", 1),
            ints("joined", -1, 16),
            numpy_helper.from_array(weight, "weight"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_sizes_stay_on_the_cpu_when_images_do_not() -> None:
    """On torch's device without data, which refuses what is on another one."""
    model = reshaping()
    constant = numpy_helper.from_array(np.ones(1, dtype=np.float32))
    model.graph.node[-1].output[0] = "product"
    model.graph.node.extend(
        [
            helper.make_node("ConstantOfShape", ["back"], ["ones"], value=constant),
            helper.make_node("Add", ["product", "ones"], ["logits"], name="logits"),
        ]
    )
    module = GraphModule(read_graph(model.SerializeToString())).to("meta")
    logits = module(torch.empty(5, 3, 4, 4, device="meta"))
    assert logits.device.type == "meta"
    assert logits.shape == (5, 3)


def test_shapes_are_symbolic_in_the_batch() -> None:
    graph = read_graph(reshaping().SerializeToString())
    assert graph.shapes["images"] == ("batch", 3, 4, 4)
    assert graph.shapes["planes"] == ("3*batch", 16)
    assert graph.shapes["rows"] == ("batch", 3)
    assert graph.shapes["turned"] == (3, 3)
    assert graph.input_shape == (3, 4, 4)
    assert graph.classes == 3


def test_fixed_are_sizes_that_no_batch_changes() -> None:
    graph = read_graph(reshaping().SerializeToString())
    assert graph.fixed["channels"].tolist() == [3]
    assert graph.fixed["joined"].tolist() == [-1, 16]
    assert not {"shape", "batch", "back", "weight"} & set(graph.fixed)


def test_floats_are_what_images_reach() -> None:
    graph = read_graph(reshaping().SerializeToString())
    assert graph.floats == {"images", "planes", "means", "rows", "logits"}


def test_shapes_of_a_lowered_network() -> None:
    graph = Graph(lower(random_network("mnist-cnn", "ccn")))
    assert graph.shapes["conv1"] == ("batch", 32, 26, 26)
    assert graph.shapes["conv1.norm"] == ("batch", 1, 26, 26)
    assert graph.shapes["logits"] == ("batch", 10)
    assert graph.classes == 10


def test_a_fixed_batch_runs_but_has_no_symbolic_shapes() -> None:
    model = reshaping()
    del model.graph.initializer[3]
    values = np.array([3, 16], dtype=np.int64)  # the batch of 1 is baked in
    model.graph.initializer.append(numpy_helper.from_array(values, "joined"))
    graph = Graph(model)
    assert GraphModule(graph)(torch.rand(1, 3, 4, 4)).shape == (1, 3)
    with pytest.raises(GraphError, match="Node 'planes'"):
        graph.shapes  # noqa: B018


def test_an_input_of_no_fixed_size_is_refused() -> None:
    model = reshaping()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(GraphError, match=r"'images'.*height"):
        Graph(model).input_shape  # noqa: B018
    with pytest.raises(GraphError, match="'images' has no fixed size"):
        Graph(model).shapes  # noqa: B018


def test_an_output_that_is_no_logits_is_refused() -> None:
    model = reshaping()
    model.graph.output[0].name = "planes"
    with pytest.raises(GraphError, match=r"'planes' has shape \['3\*batch', 16\]"):
        Graph(model).classes  # noqa: B018


def test_names_of_nodes_are_unique() -> None:
    names = ["", "a", "a", "n4"]
    nodes = [
        helper.make_node("Neg", [f"n{i}" if i else "images"], [f"n{i + 1}"], name=name)
        for i, name in enumerate(names)
    ]
    graph = helper.make_graph(
        nodes,
        "names",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("n4", TensorProto.FLOAT, [1])],
    )
    found = [node.name for node in Graph(helper.make_model(graph)).nodes]
    assert found == ["n1", "n2", "n3", "n4"]
    nodes[3].name = "n1"
    graph.node[3].name = "n1"
    found = [node.name for node in Graph(helper.make_model(graph)).nodes]
    assert found == ["n1 (Neg)", "n2", "n3", "n1"]


def test_layers_are_those_of_the_module() -> None:
    model = random_network("mnist-cnn", "ccn")
    found = layer_outputs(Graph(lower(model)))
    wanted = [n for n, layer in model.named_layers() if type(layer).__name__ != "Dropout"]
    assert list(found) == [n for n in wanted if n != "flatten"]
    assert list(found.items())[-1] == ("fc3", "logits")


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "resnet50", "inception_v1"])
def test_networks_of_the_onnx_wheel(name) -> None:
    # In float64: their weights are all alike, and only rounding can tell one class from another.
    graph = read_graph((LIGHT / f"light_{name}.onnx").read_bytes(), name)
    wanted = onnx.TensorProto.FromString((LIGHT / f"light_{name}_output_0.pb").read_bytes())
    with torch.inference_mode():
        found = GraphModule(graph, torch.float64)(torch.rand(1, *graph.input_shape))
    np.testing.assert_allclose(found.numpy(), numpy_helper.to_array(wanted), rtol=1e-4)


class Small(torch.nn.Module):
    """What current exporters write of batch norms, attention, layer norms and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.norm = torch.nn.BatchNorm2d(8)
        self.key = torch.nn.Linear(8, 24)
        self.after = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, images):
        x = torch.nn.functional.gelu(self.norm(self.stem(images)))
        x = x + torch.nn.functional.adaptive_avg_pool2d(x, 1)
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = self.key(tokens).unsqueeze(1).chunk(3, dim=-1)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        return self.head(self.after(tokens + mixed).mean(1))


@pytest.mark.filterwarnings("ignore")
def test_a_torch_export_is_the_module() -> None:
    torch.manual_seed(0)
    module = Small().eval().requires_grad_(False)
    program = torch.onnx.export(
        module,
        (torch.rand(2, 3, 16, 16),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    graph = read_graph(program.model_proto.SerializeToString())
    assert graph.input_shape == (3, 16, 16)
    assert graph.classes == 5
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    wanted, slope = logits_and_gradient(module.double(), images)
    logits, gradient = logits_and_gradient(GraphModule(graph, torch.float64), images)
    # The exporter folds the batch norm's weights in float32.
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-6)


def test_every_size_of_batch_gives_what_single_images_give() -> None:
    module = GraphModule(read_graph(reshaping().SerializeToString()), torch.float64)
    images = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    whole = module(images)
    for at, size in itertools.product(range(3), (1, 2)):
        torch.testing.assert_close(module(images[at : at + size]), whole[at : at + size])
