"""Weights of a ViT from an ONNX graph, by the order of its nodes, checked by running the graph.

Exporters drop or invent names: in a typical file the weight of a linear layer is `onnx::MatMul_1966`, transposed, and
nothing but its place in the graph tells what it is. The place is enough. A ViT is one residual stream, so data flow
fixes the order of its layers up to the three projections of an attention, and those are told apart by what becomes of
them:

    query -> left side of the product that feeds the softmax
    key   -> right side of it
    value -> right side of the product with the softmax

`read_onnx_vit` therefore walks the graph and the timm ViT in step and names no tensor. Whether the outcome is right is
measured, not assumed: `run_onnx_stream` runs the file in onnxruntime, and `weight_import` compares.

An ONNX file is data: onnx and onnxruntime run no code from it, and no custom operator library is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from timm.layers.layer_scale import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlmslice.errors import VlmSliceError

if TYPE_CHECKING:
    import onnx

Kind = Literal["patch embedding", "norm", "linear", "scale"]
Role = Literal["query", "key", "value"]

# Operators that pass on what enters at their first input, perhaps scaled, reordered or cut.
_PASSES_FIRST_INPUT = {
    "Reshape",
    "Transpose",
    "Split",
    "Slice",
    "Gather",
    "Squeeze",
    "Unsqueeze",
    "Cast",
    "Identity",
}
_PASSES_ANY_INPUT = {"Add", "Mul", "Div"}


class OnnxImportError(VlmSliceError, ValueError):
    """An ONNX graph does not hold the ViT that it was said to hold."""


@dataclass(frozen=True)
class _Layer:
    """One layer with weights, as found in the graph.

    Attributes:
        kind: What it computes.
        weight: In torch's layout: `[out, in]` for a linear layer.
        bias: Or None.
        input: Name of the tensor that enters.
        output: Name of the tensor that leaves, bias included.
    """

    kind: Kind
    weight: np.ndarray
    bias: np.ndarray | None
    input: str
    output: str


@dataclass(frozen=True)
class OnnxVit:
    """A ViT found in an ONNX graph.

    Attributes:
        state_dict: Parameters under timm's names for the classic `VisionTransformer`.
        table_side: Side of the square position table.
        stream: Names of the residual stream in the graph: entry i is the input of block i, the last one the output of
            the last block.
        pos_embed_antialias: Whether the graph resizes its position table with antialiasing; None if it does not
            resize it.
    """

    state_dict: dict[str, torch.Tensor]
    table_side: int
    stream: tuple[str, ...]
    pos_embed_antialias: bool | None


def read_onnx_vit(path: Path, architecture: VisionTransformer) -> OnnxVit:
    """Reads the weights of a ViT out of an ONNX file.

    Args:
        path: The file; tensors stored beside it are found by onnx.
        architecture: The timm ViT that the graph is said to hold, for its layers and their shapes. Its weights are
            not used (it may live on the meta device).

    Raises:
        OnnxImportError: The graph's layers are not those of `architecture`; the message says where they part.
    """
    onnx = _import_onnx()
    graph = _Graph(onnx.load(str(path)).graph)
    layers = graph.layers()
    reader = _Reader(path, graph, layers)
    state = reader.read_tokens(architecture)
    stream = reader.read_layers(architecture, state)
    tensors = {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in state.items()}
    num_prefix = 0 if architecture.no_embed_class else architecture.num_prefix_tokens
    side = math.isqrt(tensors["pos_embed"].shape[1] - num_prefix)
    return OnnxVit(tensors, side, tuple(stream), graph.table_antialias())


def run_onnx_stream(path: Path, names: list[str], images: np.ndarray) -> list[np.ndarray]:
    """Runs an ONNX file on images and returns tensors from inside its graph.

    Args:
        path: The file.
        names: Tensors to return.
        images: `float32[N, 3, height, width]`, as the graph's only input takes it.
    """
    onnx = _import_onnx()
    import onnxruntime  # type: ignore[import-untyped]

    model = onnx.load(str(path))
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(names, {session.get_inputs()[0].name: images})


def onnx_image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) that the graph is fixed to, or None if it takes any."""
    model = _import_onnx().load(str(path), load_external_data=False)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    if len(dims) != 4 or not (dims[2].dim_value and dims[3].dim_value):
        return None
    return dims[2].dim_value, dims[3].dim_value


def _import_onnx() -> Any:
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise OnnxImportError(
            f"an ONNX file needs {' and '.join(missing)}, which are not installed; pip install onnx onnxruntime, or "
            "give the vision encoder as a .safetensors file"
        )
    import onnx

    return onnx


class _Graph:
    """An ONNX graph with its constants resolved and its edges both ways."""

    def __init__(self, graph: onnx.GraphProto):
        from onnx import numpy_helper

        self.nodes = list(graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)
            attributes = {attribute.name: attribute for attribute in node.attribute}
            if node.op_type == "Constant" and "value" in attributes:
                self.constants[node.output[0]] = numpy_helper.to_array(attributes["value"].t)
            elif node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
            elif node.op_type == "Transpose" and node.input[0] in self.constants:
                axes = list(attributes["perm"].ints) if "perm" in attributes else None
                self.constants[node.output[0]] = self.constants[node.input[0]].transpose(axes)

    def layers(self) -> list[_Layer]:
        """All layers with weights, in the order of the graph (which ONNX demands to be one of data flow)."""
        found = (self._layer(node) for node in self.nodes)
        return [layer for layer in found if layer is not None]

    def tokens(self, width: int) -> list[np.ndarray]:
        """All constants of shape `[1, n, width]` before the first attention, the shortest first."""
        found: dict[int, np.ndarray] = {}
        for node in self._before_attention():
            if node.op_type == "Identity":
                continue
            for name in node.input:
                value = self.constants.get(name)
                if value is not None and value.ndim == 3 and value.shape[::2] == (1, width):
                    found.setdefault(id(value), value)
        return sorted(found.values(), key=lambda value: value.shape[1])

    def table_antialias(self) -> bool | None:
        """Whether the first `Resize` before the first attention antialiases; None if there is none."""
        for node in self._before_attention():
            if node.op_type == "Resize":
                return any(a.name == "antialias" and a.i for a in node.attribute)
        return None

    def _before_attention(self) -> Iterator[onnx.NodeProto]:
        return itertools.takewhile(lambda node: node.op_type != "Softmax", self.nodes)

    def role(self, layer: _Layer) -> Role | None:
        """What the output of a linear layer is in an attention; None if it does not enter one."""
        front, seen = [layer.output], set()
        while front:
            name = front.pop()
            for node in self.consumers[name]:
                if node.op_type == "MatMul" and not any(n in self.constants for n in node.input):
                    feeds_softmax = self._feeds_softmax(node.output[0])
                    if feeds_softmax:
                        return "query" if node.input[0] == name else "key"
                    return "value"
                if node.output[0] not in seen and self._passes(node, name):
                    seen.add(node.output[0])
                    front.extend(node.output)
        return None

    def _feeds_softmax(self, name: str) -> bool:
        while True:
            consumers = [node for node in self.consumers[name] if node.op_type != "Shape"]
            if any(node.op_type == "Softmax" for node in consumers):
                return True
            if len(consumers) != 1 or not self._passes(consumers[0], name):
                return False
            name = consumers[0].output[0]

    def _passes(self, node: onnx.NodeProto, name: str) -> bool:
        if node.op_type in _PASSES_ANY_INPUT:
            return True
        return node.op_type in _PASSES_FIRST_INPUT and node.input[0] == name

    def _layer(self, node: onnx.NodeProto) -> _Layer | None:
        constants = [self.constants.get(name) for name in node.input]
        weight = constants[1] if len(constants) > 1 else None
        bias = constants[2] if len(constants) > 2 else None
        if node.op_type == "Conv" and weight is not None and weight.ndim == 4:
            return _Layer("patch embedding", weight, bias, node.input[0], node.output[0])
        if node.op_type == "LayerNormalization" and weight is not None:
            return _Layer("norm", weight, bias, node.input[0], node.output[0])
        if node.op_type == "Gemm" and weight is not None:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            return _Layer("linear", weight if transposed else weight.T, bias, node.input[0], node.output[0])
        if node.op_type == "MatMul" and weight is not None and weight.ndim == 2:
            bias, output = self._added_vector(node.output[0])
            return _Layer("linear", weight.T, bias, node.input[0], output)
        if node.op_type == "Mul":
            for vector, other in zip(constants, reversed(node.input), strict=True):
                if vector is not None and vector.ndim == 1 and vector.size > 1:
                    bias, output = self._added_vector(node.output[0])
                    if bias is None:
                        return _Layer("scale", vector, None, other, output)
                    return _Layer("norm", vector, bias, self._before_norm(other), output)
        return None

    def _added_vector(self, name: str) -> tuple[np.ndarray | None, str]:
        """The constant vector that is added to a tensor, and the name of the sum (the tensor itself if none is)."""
        for node in self.consumers[name]:
            if node.op_type == "Add":
                for other in node.input:
                    if other in self.constants and self.constants[other].ndim == 1:
                        return self.constants[other], node.output[0]
        return None, name

    def _before_norm(self, name: str) -> str:
        """The input of a layer norm that is spelled out as mean, difference, variance and quotient."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Div", "Mul", "Cast"):
            node = self.producers.get(node.input[0])
        return node.input[0] if node is not None and node.op_type == "Sub" else name


class _Reader:
    """Walks the layers of a graph and those of a timm ViT in step."""

    def __init__(self, path: Path, graph: _Graph, layers: list[_Layer]):
        self.path, self.graph = path, graph
        first = next((i for i, layer in enumerate(layers) if layer.kind == "patch embedding"), None)
        if first is None:
            raise OnnxImportError(
                f"{path.name}: no convolution in the graph; expected the patch embedding of a ViT"
            )
        self.layers, self.position = layers, first

    def read_tokens(self, vit: VisionTransformer) -> dict[str, np.ndarray]:
        """Class token, registers and position table, told apart by their lengths.

        A class token and the class's own position are both `[1, 1, width]`. They are only ever added, so it does not
        matter which is which. An exporter may split the table; its class position, the shorter part, comes first.
        """
        tokens = self.graph.tokens(vit.embed_dim)
        state: dict[str, np.ndarray] = {}
        for name, parameter in (("cls_token", vit.cls_token), ("reg_token", vit.reg_token)):
            if parameter is None:
                continue
            length = parameter.shape[1]
            index = next((i for i, token in enumerate(tokens) if token.shape[1] == length), None)
            if index is None:
                raise OnnxImportError(
                    f"{self.path.name}: no constant of shape {(1, length, vit.embed_dim)} in the graph, expected as "
                    f"{name}; give the architecture that was exported"
                )
            state[name] = tokens.pop(index)
        table = np.concatenate(tokens, axis=1) if tokens else np.zeros((1, 0, vit.embed_dim))
        num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        num_places = table.shape[1] - num_prefix
        if num_places < 1 or math.isqrt(num_places) ** 2 != num_places:
            raise OnnxImportError(
                f"{self.path.name}: position constants of lengths {[t.shape[1] for t in tokens]} in the graph, "
                f"expected {num_prefix} + a square number together; only square learned tables are read"
            )
        return state | {"pos_embed": table}

    def read_layers(self, vit: VisionTransformer, state: dict[str, np.ndarray]) -> list[str]:
        """Fills `state` and returns the names of the residual stream."""
        self._take("patch embedding", "patch_embed.proj", vit.patch_embed.proj, state)
        if not isinstance(vit.norm_pre, nn.Identity):
            self._take("norm", "norm_pre", vit.norm_pre, state)
        stream = []
        block: Any  # torch types submodules as Tensor | Module
        for index, block in enumerate(vit.blocks):
            prefix = f"blocks.{index}."
            stream.append(self._take("norm", prefix + "norm1", block.norm1, state).input)
            self._take_qkv(prefix + "attn.qkv", block.attn.qkv, state)
            self._take("linear", prefix + "attn.proj", block.attn.proj, state)
            self._take_scale(prefix + "ls1.gamma", block.ls1, state)
            self._take("norm", prefix + "norm2", block.norm2, state)
            for name, module in block.mlp.named_modules():
                if isinstance(module, nn.Linear):
                    self._take("linear", f"{prefix}mlp.{name}", module, state)
            self._take_scale(prefix + "ls2.gamma", block.ls2, state)
        if isinstance(vit.norm, nn.Identity):
            raise OnnxImportError(
                f"{self.path.name}: {type(vit).__name__} without a final norm is not read from ONNX; choose an "
                "architecture that pools by class token or attention"
            )
        return [*stream, self._take("norm", "norm", vit.norm, state).input]

    def _next(self, kind: Kind, name: str) -> _Layer:
        if self.position == len(self.layers):
            raise OnnxImportError(
                f"{self.path.name}: the graph ends where {name} is expected; give the architecture that was exported"
            )
        layer = self.layers[self.position]
        self.position += 1
        if layer.kind != kind:
            raise self._mismatch(layer, name, f"a {kind}")
        return layer

    def _take(self, kind: Kind, name: str, module: Any, state: dict[str, np.ndarray]) -> _Layer:
        layer = self._next(kind, name)
        if layer.weight.shape != tuple(module.weight.shape) or (layer.bias is None) != (module.bias is None):
            expected = f"a {kind} of shape {tuple(module.weight.shape)}"
            raise self._mismatch(layer, name, expected + (" with bias" if module.bias is not None else ""))
        self._store(name, layer.weight, layer.bias, state)
        return layer

    def _take_scale(self, name: str, module: nn.Module, state: dict[str, np.ndarray]) -> None:
        if isinstance(module, LayerScale):
            state[name] = self._next("scale", name).weight

    def _take_qkv(self, name: str, module: nn.Linear, state: dict[str, np.ndarray]) -> None:
        """One fused projection, or three in any order."""
        if self.layers[self.position].weight.shape == tuple(module.weight.shape):
            self._take("linear", name, module, state)
            return
        by_role: dict[Role, _Layer] = {}
        for _ in range(3):
            layer = self._next("linear", name)
            role = self.graph.role(layer)
            if (
                role is None
                or role in by_role
                or layer.weight.shape != (module.in_features, module.in_features)
            ):
                expected = (
                    f"the {' or '.join(sorted({'query', 'key', 'value'} - set(by_role)))} of an attention"
                )
                raise self._mismatch(layer, name, f"{expected}, shape {(module.in_features,) * 2}")
            by_role[role] = layer
        parts = [by_role[role] for role in ("query", "key", "value")]
        weight = np.concatenate([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        if len(biases) != (0 if module.bias is None else 3):
            with_bias = "without biases" if module.bias is None else "all with a bias"
            raise self._mismatch(parts[0], name, f"query, key and value {with_bias}")
        self._store(name, weight, np.concatenate(biases) if biases else None, state)

    def _store(
        self, name: str, weight: np.ndarray, bias: np.ndarray | None, state: dict[str, np.ndarray]
    ) -> None:
        state[name + ".weight"] = weight
        if bias is not None:
            state[name + ".bias"] = bias

    def _mismatch(self, layer: _Layer, name: str, expected: str) -> OnnxImportError:
        with_bias = "" if layer.bias is None else " with bias"
        return OnnxImportError(
            f"{self.path.name}: {layer.output!r} is a {layer.kind} of shape {layer.weight.shape}{with_bias}, expected "
            f"{expected} as {name}; give the architecture that was exported"
        )
