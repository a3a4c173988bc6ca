"""Which nodes of a step belong to its recurrence, and which can be done for many steps at once.

Rule: a node leaves the loop only if all that it reads and makes are rows, one a session, or constant; whether it then
treats each row alone is not known here but proven before the model serves (`proof`). It knows ONNX, not ONNX Runtime.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto

from service.manifest import Manifest, Tensor


class Parts(NamedTuple):
    """The step's nodes by where they go, and the names that mean the same everywhere: weights and constants."""

    constant: set[str]
    fixed: list[NodeProto]
    before: list[NodeProto]
    loop: list[NodeProto]
    after: list[NodeProto]


def split(step: GraphProto, manifest: Manifest, rows: set[str]) -> Parts:
    """Sorts the nodes. One leaves the loop only if all that it reads and makes are `rows`, or constant."""
    constant = {weight.name for weight in step.initializer} | {value.name for value in manifest.constants}
    early = {manifest.input.name} & rows
    parts = Parts(constant, [], [], [], [])
    rest = []
    for node in step.node:
        reads, makes = read([node]), made([node])
        if _has_graph(node) or not reads <= constant | early:
            rest.append(node)
        elif reads <= constant:
            parts.fixed.append(node)
            constant |= makes
        elif makes <= rows:
            parts.before.append(node)
            early |= makes
        else:
            rest.append(node)
    needed = {pair.output for pair in manifest.state}
    for node in reversed(rest):
        reads, makes = read([node]), made([node])
        if needed & makes or _has_graph(node) or not (reads - constant) | makes <= rows:
            parts.loop.insert(0, node)
            needed |= reads
        else:
            parts.after.insert(0, node)
    return parts


def rows_of(values: Mapping[str, ValueInfoProto], x: Tensor) -> set[str]:
    """Names of the values [B, ...]: the batch of `x` first, all other sizes known; none if `x` itself is not so."""
    shapes = {name: value.type.tensor_type.shape.dim for name, value in values.items()}
    batch = shapes[x.name][x.batch_axis].dim_param
    if x.batch_axis or not batch:
        return set()
    return {
        name
        for name, shape in shapes.items()
        if shape and shape[0].dim_param == batch and all(size.HasField("dim_value") for size in shape[1:])
    }


def made(nodes: Iterable[NodeProto]) -> set[str]:
    """What nodes make."""
    return {name for node in nodes for name in node.output if name}


def read(nodes: Iterable[NodeProto]) -> set[str]:
    """What nodes read, those in their subgraphs included."""
    names = {name for node in nodes for name in node.input if name}
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                names |= read(attribute.g.node)
    return names


def _has_graph(node: NodeProto) -> bool:
    return any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute)
