"""Whether an exported file can be moved to another device after loading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def fixed_devices(module: torch.jit.ScriptModule) -> list[str]:
    """Places of a graph that stay where they are when the module is moved, as text: devices by name, tensors made on
    the default device, and tensors written into the graph. Parameters and buffers move; a single number may stay, and
    what only serves as an index: they go with any device.

    An empty list shows that no operator of the graph chooses a device for itself. It does not show that another
    device has all the operators, nor that it computes the same values: for that the file must run there.
    """
    graph = module.inlined_graph  # nodes do not outlive it
    found = [(node, text) for node in _nodes(graph) if (text := _fixed(node)) is not None]
    return sorted({f"{text}{_where(node)}" for node, text in found})


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _fixed(node: Any) -> str | None:
    if node.kind() == "prim::Constant":
        users = sorted({use.user.kind() for use in node.output().uses()})
        constant = _fixed_constant(node)
        return f"{constant} in {', '.join(users)}" if constant and users else None
    if node.kind() == "aten::device":
        return "a device by name in aten::device"
    return f"the default device in {node.kind()}" if _uses_default_device(node) else None


def _fixed_constant(node: Any) -> str | None:
    value = node.output().toIValue()
    if node.output().type().kind() == "DeviceObjType" and value is not None:
        return f"device {value}"
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        return f"a tensor of shape {tuple(value.shape)}"
    return None


def _uses_default_device(node: Any) -> bool:
    """Whether the operator makes a tensor (not a single number) without being told where, or after which other."""
    schema = node.schema()
    arguments = schema[schema.find("(") + 1 : schema.rfind(") ->")].split(", ")
    names = [argument.split("=")[0].split(" ")[-1] for argument in arguments if argument != "*"]
    if "device" not in names or any(argument.startswith("Tensor") for argument in arguments):
        return False
    if _is_index(node):
        return False
    single = node.kind() == "aten::scalar_tensor" or (node.kind() == "aten::tensor" and "[]" not in arguments[0])
    return not single and node.inputsAt(names.index("device")).type().kind() == "NoneType"


def _is_index(node: Any) -> bool:
    """Whether the node's value is used to index other tensors and for nothing else."""
    users = [use.user for use in node.output().uses()]
    return bool(users) and all(
        user.kind() == "aten::index" or (user.kind() == "prim::ListConstruct" and _is_index(user)) for user in users
    )


def _where(node: Any) -> str:
    lines = [line.strip() for line in str(node.sourceRange()).splitlines() if ".py" in line]
    return f" ({'/'.join(lines[0].split('/')[-2:])})" if lines else ""
