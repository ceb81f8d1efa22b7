"""Flattening of a region: all components, also those of nested blocks, and all values that they compute.

A value is a tensor: an input of the region or an output of a component. Values and components are identified by
indices. :attr:`Flat.refs` gives the name of each value, as a :class:`Ref` (dotted path of the component, output port).
Flattening takes time linear in the number of components.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.contract import Algebra, Rule, Signature
from sedd_graph.errors import EnvironmentFault
from sedd_graph.graph.model import Op, Ref, Region, Step

__all__ = ["Block", "Flat", "Node", "algebra_of", "flatten", "log_det_of", "numbers", "steady", "total"]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """Component of a flattened region.

    Attributes:
        path: Dotted path within the region.
        step: Step of the graph whose ``body`` is the component.
        op: The component and its Config.
        algebra: Algebraic properties that the component declares, such as inversion rules.
        inputs: For each connected input port, by name, the indices of the values that feed the port.
        outputs: For each output port, by name, the index of its value.
    """

    path: str
    step: Step
    op: Op
    algebra: Algebra
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, int]

    @property
    def needs(self) -> tuple[int, ...]:
        """Indices of the values that the component reads, without repetitions."""
        return tuple(dict.fromkeys(v for values in self.inputs.values() for v in values))

    @property
    def cost(self) -> float:
        """Cost of one evaluation to the solver: 0 for weighted sums and rearrangements of elements, otherwise 1."""
        return 0.0 if self.algebra.linear or self.algebra.moves else 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Nested block of a flattened region.

    Attributes:
        path: Dotted path within the region.
        step: Step of the graph whose ``body`` is the block.
        inputs: For each input of the block, by name, the index of the value that feeds it, as a tuple of one.
        outputs: For each output of the block, by name, the index of its value.
        members: Steps of the block in order: the index of a component, or a nested block.
        nodes: Indices of all components within the block, at any depth.
    """

    path: str
    step: Step
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, int]
    members: tuple[int | Block, ...]
    nodes: range

    @property
    def needs(self) -> tuple[int, ...]:
        """Indices of the values that are connected to the block's inputs, without repetitions."""
        return tuple(dict.fromkeys(v for values in self.inputs.values() for v in values))


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """Flattened region: all its components, also those of nested blocks, and all its values.

    A value is a tensor: an input of the region or an output of a component. Values and components are identified by
    indices; the lists below are ordered by these indices.

    Attributes:
        region: The region.
        refs: Name of each value: a :class:`Ref` of the dotted path of its component and the output port, or of an empty
            path and the name of a region input.
        types: Tensor type of each value.
        index: Index of each value by its :class:`Ref`. If :func:`flatten` merged equal components, the outputs of all
            of them have the same indices.
        producer: Index of the component that computes each value; -1 for an input of the region.
        users: Indices of the components that read each value.
        nodes: Components in topological order.
        members: Steps of the region in order: the index of a component, or a nested block.
        blocks: All nested blocks by dotted path.
        around: For each component, by index, the blocks that contain it, outermost first.
        inputs: Index of the value of each region input, by name.
        outputs: Index of the value of each region output, by name.
        rank: Place of each value in the alphabetical order of the references; breaks ties.
    """

    region: Region
    refs: list[Ref]
    types: list[PortType]
    index: Mapping[Ref, int]
    producer: list[int]
    users: list[list[int]]
    nodes: list[Node]
    members: tuple[int | Block, ...]
    blocks: Mapping[str, Block]
    around: list[list[Block]]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    rank: list[int]


def numbers(found: PortType) -> Size:
    """Return the number of elements of a tensor type, symbolic in batch and length."""
    size = Size.of(1)
    for dim in found.dims:
        size = size * dim.size
    return size


def total(types: list[PortType]) -> Size:
    """Return the total number of elements of several tensor types, symbolic in batch and length."""
    size = Size()
    for found in types:
        size = size + numbers(found)
    return size


def steady(flat: Flat, given: Iterable[int]) -> frozenset[int]:
    """Return the indices of the values that depend on no input of a region except the conditioning inputs ``given``.

    Args:
        flat: The flattened region.
        given: Indices of the conditioning inputs.
    """
    found = set(given)
    for node in flat.nodes:
        if found.issuperset(node.needs):
            found.update(node.outputs.values())
    return frozenset(found)


def log_det_of(flat: Flat, node: Node, rule: Rule) -> str | None:
    """Return the name of a component's method that computes the log-determinant of an inversion rule.

    Args:
        flat: The flattened region.
        node: The component.
        rule: An inversion rule of the component. All inputs that it recovers (``rule.targets``) are connected.

    Returns:
        The name of the method; ``"zero"`` if the log-determinant is declared zero, or if all recovered inputs are
        integers or booleans; None if the component declares none for this rule.
    """
    if all(flat.types[node.inputs[name][0]].kind != "float" for name in rule.targets):
        return "zero"
    return node.algebra.log_det.get(rule.target)


def flatten(region: Region) -> Flat:
    """Return the flattened form of a region.

    Components with the same op, Config and inputs in the same region (or nested block) are merged into one, the first
    by dotted path, if they only rearrange elements or compute weighted sums: their outputs are the same values.

    Args:
        region: The region.

    Raises:
        EnvironmentFault: A component declares inconsistent algebraic properties.
    """
    refs: list[Ref] = []
    types: list[PortType] = []
    producer: list[int] = []
    nodes: list[Node] = []
    blocks: dict[str, Block] = {}
    algebras: dict[int, Algebra] = {}
    same: dict[tuple[str, str, tuple[tuple[str, tuple[int, ...]], ...]], list[int]] = {}
    aliases: dict[Ref, int] = {}

    def value(ref: Ref, found: PortType, made_by: int) -> int:
        refs.append(ref)
        types.append(found)
        producer.append(made_by)
        return len(refs) - 1

    def lay(inner: Region, prefix: str, fed: Mapping[str, int]) -> tuple[dict[str, int], tuple[int | Block, ...]]:
        known = {("", name): index for name, index in fed.items()}
        members: list[int | Block] = []
        for step in inner.steps:
            path = f"{prefix}{step.name}"
            inputs = {port: tuple(known[r.step, r.port] for r in refs_) for port, refs_ in step.inputs.items()}
            if isinstance(step.body, Region):
                start, inputs = len(nodes), {port: inputs[port] for port in step.body.inputs}
                outputs, below = lay(step.body, f"{path}.", {port: values[0] for port, values in inputs.items()})
                blocks[path] = Block(path, step, inputs, outputs, below, range(start, len(nodes)))
                members.append(blocks[path])
            else:
                op, index = step.body, len(nodes)
                if id(op) not in algebras:
                    algebras[id(op)] = algebra_of(path, step, op, {p: types[v[0]] for p, v in inputs.items()})
                algebra = algebras[id(op)]
                alike = same.setdefault((prefix, op.contract.op, tuple(inputs.items())), [])
                first = next((n for n in alike if nodes[n].op.config == op.config), None)
                if first is not None and (algebra.moves or algebra.linear.keys() >= step.outputs.keys()):
                    outputs = dict(nodes[first].outputs)
                    aliases.update({Ref(path, port): v for port, v in outputs.items()})
                    if path < nodes[first].path:  # the first by name stands for all, whatever the order of steps
                        aliases.update({Ref(nodes[first].path, port): v for port, v in outputs.items()})
                        nodes[first] = Node(path, step, op, algebra, inputs, outputs)
                        for port, v in outputs.items():
                            refs[v] = Ref(path, port)
                else:
                    outputs = {port: value(Ref(path, port), found, index) for port, found in step.outputs.items()}
                    nodes.append(Node(path, step, op, algebra, inputs, outputs))
                    alike.append(index)
                    members.append(index)
            known.update({(step.name, port): index for port, index in outputs.items()})
        return {name: known[ref.step, ref.port] for name, ref in inner.outputs.items()}, tuple(members)

    inputs = {name: value(Ref("", name), found, -1) for name, found in region.inputs.items()}
    outputs, members = lay(region, "", inputs)
    users: list[list[int]] = [[] for _ in refs]
    for position, node in enumerate(nodes):
        for v in node.needs:
            users[v].append(position)
    rank = [0] * len(refs)
    for place, v in enumerate(sorted(range(len(refs)), key=lambda v: (refs[v].step, refs[v].port))):
        rank[v] = place
    around: list[list[Block]] = [[] for _ in nodes]
    for block in reversed(blocks.values()):  # a block comes after those within it
        for position in block.nodes:
            around[position].append(block)
    index = {ref: v for v, ref in enumerate(refs)} | aliases
    return Flat(region, refs, types, index, producer, users, nodes, members, blocks, around, inputs, outputs, rank)


def algebra_of(path: str, step: Step, op: Op, fed: Mapping[str, PortType]) -> Algebra:
    """Return the algebraic properties that a component declares, verified against its ports.

    Args:
        path: Dotted path of the component, for error messages.
        step: Step of the graph whose ``body`` is the component.
        op: The component and its Config.
        fed: Tensor types of the connected inputs by port.

    Raises:
        EnvironmentFault: The component raises an error, or its declaration contradicts its ports.
    """
    signature = Signature(
        tuple(dataclasses.replace(p, type=fed.get(p.name, p.type)) for p in op.signature.inputs),
        tuple(dataclasses.replace(p, type=step.outputs[p.name]) for p in op.signature.outputs),
    )
    contract = op.contract

    def fault(text: str) -> EnvironmentFault:
        return EnvironmentFault(f"{path}: op {contract.name!r} ({contract.distribution}): {text}")

    try:
        found = contract.algebra(op.config, signature)
    except Exception as error:  # third-party code may raise anything
        raise fault(f"its algebra cannot be read: {type(error).__name__}: {error}") from None
    for problem in _problems(found, signature):
        raise fault(problem)
    return found


def _problems(found: Algebra, signature: Signature) -> Iterator[str]:
    """Yield a message for each inconsistency of an algebra with the ports."""
    ins, outs = {p.name: p for p in signature.inputs}, {p.name for p in signature.outputs}
    kinds = {p.name: p.type.kind for p in (*signature.inputs, *signature.outputs)}
    for rule in found.rules:
        what = f"its rule {rule.method!r}"
        for name in rule.targets:
            if name not in ins:
                yield f"{what} gives {name!r}, which is no input; inputs: {', '.join(ins)}"
            elif ins[name].variadic:
                yield f"{what} gives the variadic port {name!r}: declare a linear relation, or name the ports"
        for name in rule.given:
            if name not in ins and name not in outs:
                yield f"{what} is given {name!r}, which is no port; ports: {', '.join([*ins, *sorted(outs)])}"
        if set(rule.targets) & set(rule.given) or not rule.targets:
            yield f"{what} gives {', '.join(rule.targets) or 'nothing'} and is given {', '.join(rule.given)}"
        if rule.onto and any(kinds.get(name) == "float" for name in (*rule.targets, *rule.given)):
            yield f"{what} is declared onto, which is for integers, and reads or gives real numbers"
        if not rule.cost >= 0:
            yield f"{what} costs {rule.cost}: a cost is at least 0"
    for out, terms in found.linear.items():
        for name, factor in terms.items():
            if out not in outs or name not in ins or not isinstance(factor, Fraction | int):
                yield f"the linear relation of {out!r} cannot use {factor!r} times {name!r}"
    for (source, out), bound in found.lipschitz.items():
        if out not in outs or source not in ins or not 0 <= bound < float("inf"):
            yield f"{bound!r} is no Lipschitz bound from {source!r} to {out!r}"
    for (source, out), bound in found.rounding.items():
        if (source, out) not in found.lipschitz or not 0 <= bound < float("inf"):
            yield f"{bound!r} is no rounding bound from {source!r} to {out!r}, which also needs a Lipschitz bound"
    for name, count in found.integers.items():
        if name not in ins or kinds[name] != "int" or count < 1:
            yield f"{name!r} is no integer input with {count} values"
