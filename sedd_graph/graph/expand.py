"""From a loaded blueprint to a :class:`Graph`: names resolved, blocks and repeats expanded, every edge typed.

Every problem of the whole expansion is gathered and raised at once. A block is expanded once for each way it is used
(parameters and input types), so a thousand repeats cost what one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx

from sedd_graph.axes import DYNAMIC, AxisError, PortType, Size, parse_port_type, parse_size
from sedd_graph.blueprint.interpolate import InterpolationFault, resolve
from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.schema import Block, Blueprint, Node
from sedd_graph.contract import NODE_KINDS, Port
from sedd_graph.errors import BlueprintError, Problem, suggest
from sedd_graph.graph.claims import read_claim
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.model import Graph, Op, Ref, Region, Step
from sedd_graph.graph.unify import Binding, Mismatch
from sedd_graph.plugins import Registry

__all__ = ["expand", "read_axes"]

MAX_NODES, MAX_REPEAT, MAX_BLOCK_DEPTH = 100_000, 4096, 32

Path = tuple[str | int, ...]
Scope = Mapping[str, Size]


def read_axes(loaded: Loaded, problems: list[Problem]) -> dict[str, Size]:
    """The blueprint's ``axes`` as sizes over ``batch`` and ``length``; an axis may use those written before it."""
    axes: dict[str, Size] = {}
    assert isinstance(loaded.blueprint, Blueprint)
    for name, value in loaded.blueprint.axes.items():
        try:
            size = parse_size(value, [*axes, *DYNAMIC]).substitute(axes)
            if size.constant is not None and size.constant <= 0:
                raise AxisError(f"axis {name!r} is {size.constant}: a size is at least 1")
            axes[name] = size
        except AxisError as error:
            problems.append(loaded.problem(("axes", name), str(error)))
    return axes


def expand(loaded: Loaded, registry: Registry) -> Graph:
    """Expand ``loaded``. Raises :class:`BlueprintError` with every problem found."""
    blueprint = loaded.blueprint
    assert isinstance(blueprint, Blueprint)
    problems: list[Problem] = []
    axes = read_axes(loaded, problems)
    expander = _Expander(loaded, registry, axes, problems)
    inputs = {}
    for name, text in blueprint.inputs.items():
        found = expander.port_type(loaded, ("inputs", name), text, axes)
        if found is not None:
            inputs[name] = found
    if problems:
        raise BlueprintError(problems)
    root = expander.region(loaded, (), blueprint, loaded.params, inputs, axes, label=blueprint.name)
    if problems or root is None:
        raise BlueprintError(problems)
    return Graph(name=blueprint.name, root=root, axes=axes)


class _Expander:
    def __init__(self, loaded: Loaded, registry: Registry, axes: Scope, problems: list[Problem]) -> None:
        self.registry, self.root_axes, self.problems = registry, axes, problems
        self.done: dict[Any, Region | None] = {}
        self.active: list[str] = []

    def port_type(self, loaded: Loaded, at: Path, text: str, scope: Scope) -> PortType | None:
        try:
            declared = parse_port_type(text, scope)
            if any(d.variadic for d in declared.dims):
                raise AxisError(f"port type {text!r}: a starred axis cannot stand in a blueprint")
            return PortType(declared.kind, tuple(type(d)(d.size.substitute(scope)) for d in declared.dims))
        except AxisError as error:
            self.problems.append(loaded.problem(at, str(error)))
            return None

    # -- one region -------------------------------------------------------------------------------------------------

    def region(
        self,
        loaded: Loaded,
        base: Path,
        body: Blueprint | Block,
        params: Mapping[str, Any],
        inputs: Mapping[str, PortType],
        scope: Scope,
        *,
        label: str,
    ) -> Region | None:
        before = len(self.problems)
        nodes: dict[str, Node] = {}
        for name, node in body.nodes.items():
            at = (*base, "nodes", name)
            if name in body.inputs:
                self.problems.append(loaded.problem(at, f"node {name!r} has the name of an input"))
            resolved = self._interpolate(loaded, at, node, params)
            if resolved is not None:
                nodes[name] = resolved
        if len(self.problems) > before:
            return None
        wires = {name: self._wires(loaded, (*base, "nodes", name), node, body) for name, node in nodes.items()}
        order = self._order(loaded, base, wires)
        if len(self.problems) > before or order is None:
            return None
        types: dict[str, Mapping[str, PortType] | None] = {"": dict(inputs)}
        steps: list[Step] = []
        for name in order:
            step = self._step(loaded, (*base, "nodes", name), name, nodes[name], wires[name], types, params, scope)
            types[name] = step.outputs if step else None
            if step:
                steps.append(step)
        outputs: dict[str, Ref] = {}
        for name, text in body.outputs.items():
            ref = self._ref(loaded, (*base, "outputs", name), text, types, body)
            if ref is not None:
                outputs[name] = ref
        if len(self.problems) > before:
            return None
        claim = read_claim(loaded, base, body, self.problems)
        if len(self.problems) > before:
            return None
        region = Region(label, inputs, outputs, tuple(steps), description=body.description, claim=claim)
        self._unused(loaded, base, region)
        if region.size > MAX_NODES:
            self.problems.append(loaded.problem(base, f"expands to more than {MAX_NODES} components"))
        return None if len(self.problems) > before else region

    def _interpolate(self, loaded: Loaded, at: Path, node: Node, params: Mapping[str, Any]) -> Node | None:
        try:
            data = resolve({"out": node.out, "with": node.with_, "repeat": node.repeat}, params)
        except InterpolationFault as fault:
            self.problems += [loaded.problem((*at, *p), m) for p, m in fault.faults]
            return None
        return node.model_copy(update={"out": data["out"], "with_": data["with"], "repeat": data["repeat"]})

    def _wires(
        self, loaded: Loaded, at: Path, node: Node, body: Blueprint | Block
    ) -> list[tuple[str | int, Path, str]]:
        """The node's edges as (port name or position, path in the file, reference text)."""
        at = (*at, "in")
        wires: list[tuple[str | int, Path, str]] = []
        if isinstance(node.in_, str):
            wires.append((0, at, node.in_))
        elif isinstance(node.in_, list):
            wires += [(i, (*at, i), text) for i, text in enumerate(node.in_)]
        elif isinstance(node.in_, dict):
            for port, refs in node.in_.items():
                if isinstance(refs, list):
                    wires += [(port, (*at, port, i), text) for i, text in enumerate(refs)]
                else:
                    wires.append((port, (*at, port), refs))
        known = [*body.inputs, *body.nodes]
        for _, where, text in wires:
            source = text.split(".")[0]
            if source not in known:
                message = f"nothing here is called {source!r}{suggest(source, known)}; known: {', '.join(known)}"
                self.problems.append(loaded.problem(where, message))
        return wires

    def _order(
        self, loaded: Loaded, base: Path, wires: Mapping[str, list[tuple[str | int, Path, str]]]
    ) -> list[str] | None:
        """The nodes in an order that can be run, as near to the written one as it can be."""
        graph = nx.DiGraph()
        graph.add_nodes_from(wires)
        for name, edges in wires.items():
            graph.add_edges_from((text.split(".")[0], name) for _, _, text in edges if text.split(".")[0] in wires)
        try:
            rank = {name: i for i, name in enumerate(wires)}
            return list(nx.lexicographical_topological_sort(graph, key=lambda n: rank[n]))
        except nx.NetworkXUnfeasible:
            circle = [edge[0] for edge in nx.find_cycle(graph)]
            chain = " -> ".join([*circle, circle[0]])
            self.problems.append(
                loaded.problem((*base, "nodes", circle[0]), f"nodes feed each other in a circle: {chain}")
            )
            return None

    def _ref(
        self, loaded: Loaded, at: Path, text: str, types: Mapping[str, Mapping[str, PortType] | None], body: Any = None
    ) -> Ref | None:
        source, _, port = text.partition(".")
        if source in types[""]:  # type: ignore[operator]
            if port:
                self.problems.append(loaded.problem(at, f"{source!r} is an input and has no ports"))
                return None
            return Ref("", source)
        if source not in types:
            known = [*types[""], *(n for n in types if n)]  # type: ignore[misc]
            self.problems.append(
                loaded.problem(
                    at, f"nothing here is called {source!r}{suggest(source, known)}; known: {', '.join(known)}"
                )
            )
            return None
        ports = types[source]
        if ports is None:
            return None  # that node has problems of its own
        if not port:
            if len(ports) > 1 and "out" not in ports:
                options = ", ".join(f"{source}.{p}" for p in ports)
                self.problems.append(loaded.problem(at, f"{source!r} has several outputs: say which of {options}"))
                return None
            port = "out" if "out" in ports else next(iter(ports))
        if port not in ports:
            self.problems.append(
                loaded.problem(
                    at, f"{source!r} has no output {port!r}{suggest(port, ports)}; outputs: {', '.join(ports)}"
                )
            )
            return None
        return Ref(source, port)

    # -- one node ---------------------------------------------------------------------------------------------------

    def _step(
        self,
        loaded: Loaded,
        at: Path,
        name: str,
        node: Node,
        wires: list[tuple[str | int, Path, str]],
        types: Mapping[str, Mapping[str, PortType] | None],
        params: Mapping[str, Any],
        scope: Scope,
    ) -> Step | None:
        before = len(self.problems)
        edges: list[tuple[str | int, Path, Ref, PortType]] = []
        broken = False
        for key, where, text in wires:
            ref = self._ref(loaded, where, text, types)
            if ref is None:
                broken = True
                continue
            ports = types[ref.step]
            assert ports is not None
            edges.append((key, where, ref, ports[ref.port]))
        make = self._op if node.op is not None else self._block
        if broken:
            return None
        made = make(loaded, at, name, node, edges, scope)
        if made is None or len(self.problems) > before:
            return None
        body, inputs, outputs = made
        if node.save is not None:
            for index, port in enumerate(node.save.ports):
                if port not in outputs:
                    message = f"{name!r} has no output {port!r}{suggest(port, outputs)}; outputs: {', '.join(outputs)}"
                    self.problems.append(loaded.problem((*at, "save", "ports", index), message))
        return Step(name, body, inputs, outputs, node.save, loaded.position(at))

    def _assign(
        self,
        loaded: Loaded,
        at: Path,
        ports: tuple[Port, ...],
        edges: list[tuple[str | int, Path, Ref, PortType]],
        what: str,
    ) -> dict[str, list[tuple[Path, Ref, PortType]]] | None:
        """Which edges go into which port; every misfit is a problem."""
        before = len(self.problems)
        by_name = {p.name: p for p in ports}
        variadic = next((p for p in ports if p.variadic), None)
        taken: dict[str, list[tuple[Path, Ref, PortType]]] = {}
        names = ", ".join(p.name + ("?" if p.optional else "*" if p.variadic else "") for p in ports) or "none"
        for key, where, ref, actual in edges:
            if isinstance(key, int):
                port = ports[key] if key < len(ports) and not ports[key].variadic else variadic
                if port is None:
                    self.problems.append(
                        loaded.problem(where, f"{what} takes {len(ports)} input(s) ({names}), not {key + 1}")
                    )
                    continue
            else:
                port = by_name.get(key)
                if port is None:
                    self.problems.append(
                        loaded.problem(where, f"{what} has no input {key!r}{suggest(key, by_name)}; inputs: {names}")
                    )
                    continue
            slot = taken.setdefault(port.name, [])
            if slot and not port.variadic:
                self.problems.append(
                    loaded.problem(where, f"input {port.name!r} of {what} takes one value, not several")
                )
                continue
            slot.append((where, ref, actual))
        for port in ports:
            if not port.optional and port.name not in taken:
                self.problems.append(
                    loaded.problem(at, f"{what} needs its input {port.name!r} ({port.type}); inputs: {names}")
                )
        return taken if len(self.problems) == before else None

    def _op(self, loaded: Loaded, at: Path, name: str, node: Node, edges: list[Any], scope: Scope) -> Any:
        assert node.op is not None

        def refuse(message: str) -> None:
            self.problems.append(loaded.problem((*at, "op"), message))

        contract = find_contract(self.registry, node.op, NODE_KINDS, refuse)
        if contract is None:
            return None
        config = configure(
            contract,
            node.with_,
            scope,
            base=(*at, "with"),
            locate=loaded.position,
            report=self.problems.append,
            refuse=lambda path, message: self.problems.append(loaded.problem(path, message)),
        )
        if config is None:
            return None
        counts: dict[str, int] = {}
        for key, *_ in edges:
            counts[str(key)] = counts.get(str(key), 0) + 1
        try:
            # Ports may depend on how many edges a variadic port gets: a list or a single value goes there whole.
            arity = {"*": len(edges), **counts}
            signature = contract.signature(config, arity)
        except (ValueError, TypeError, AxisError) as error:
            self.problems.append(loaded.problem((*at, "with") if node.with_ else at, f"{node.op}: {error}"))
            return None
        taken = self._assign(loaded, at, signature.inputs, edges, f"op {contract.name!r}")
        if taken is None:
            return None
        symbols = {s for p in (*signature.inputs, *signature.outputs) for s in p.type.symbols}
        binding = Binding(
            {k: Size.of(v) for k, v in config.model_dump().items() if k in symbols and isinstance(v, int)}
        )
        outputs: dict[str, PortType] = {}
        try:
            for port in signature.inputs:
                for where, _, actual in taken.get(port.name, ()):
                    at_fault: Path = where
                    binding.unify(port, actual, label=f"input {port.name!r} of op {contract.name!r}")
            at_fault = (*at, "out")
            for port, text in self._declared(loaded, at, node, signature.outputs):
                declared = self.port_type(loaded, at_fault, text, scope)
                if declared is None:
                    return None
                binding.unify(port, declared, label=f"output {port.name!r} of op {contract.name!r}")
            at_fault = at
            for port in signature.outputs:
                outputs[port.name] = binding.result(port)
        except Mismatch as error:
            self.problems.append(loaded.problem(at_fault, str(error)))
            return None
        except AxisError as error:
            self.problems.append(loaded.problem(at, f"op {contract.name!r}: {error}"))
            return None
        inputs = {port: tuple(ref for _, ref, _ in refs) for port, refs in taken.items()}
        return Op(contract, config, signature, binding.axes, node.with_), inputs, outputs

    def _declared(self, loaded: Loaded, at: Path, node: Node, ports: tuple[Port, ...]) -> list[tuple[Port, str]]:
        """What ``out:`` declares, port by port; a single type is that of the first output."""
        if node.out is None:
            return []
        if isinstance(node.out, str):
            return [(ports[0], node.out)]
        by_name, found = {p.name: p for p in ports}, []
        for name, text in node.out.items():
            if name in by_name:
                found.append((by_name[name], text))
            else:
                message = f"no output {name!r}{suggest(name, by_name)}; outputs: {', '.join(by_name)}"
                self.problems.append(loaded.problem((*at, "out", name), message))
        return found

    # -- one use of a block -----------------------------------------------------------------------------------------

    def _block(self, loaded: Loaded, at: Path, name: str, node: Node, edges: list[Any], scope: Scope) -> Any:
        assert node.block is not None
        found = self._find_block(loaded, (*at, "block"), node.block)
        if found is None:
            return None
        home, block_name, block = found
        repeat = self._repeat(loaded, at, node, scope)
        params = self._params(loaded, at, node, block)
        what = f"block {node.block!r}"
        known = set(self.root_axes) | {s for t in block.inputs.values() for s in _axis_names(t)}
        ports = []
        for port_name, text in block.inputs.items():
            try:
                ports.append(Port(port_name, parse_port_type(text, known)))
            except AxisError as error:
                self.problems.append(home.problem(("blocks", block_name, "inputs", port_name), str(error)))
                return None
        taken = self._assign(loaded, at, tuple(ports), edges, what)
        if repeat is None or params is None or taken is None:
            return None
        binding = Binding()
        try:
            for port in ports:
                where, _, actual = taken[port.name][0]
                binding.unify(port, actual, label=f"input {port.name!r} of {what}")
        except Mismatch as error:
            self.problems.append(loaded.problem(where, str(error)))
            return None
        types = {p.name: taken[p.name][0][2] for p in ports}
        region = self._expanded(home, block_name, block, params, types, {**self.root_axes, **binding.axes}, loaded, at)
        if region is None:
            return None
        if not self._declared_fits(loaded, at, node, region, scope):
            return None
        inputs = {port: (refs[0][1],) for port, refs in taken.items()}
        if node.repeat is None:
            return region, inputs, region.output_types
        chain = self._chain(loaded, at, region, repeat, what)
        return None if chain is None else (chain, inputs, region.output_types)

    def _declared_fits(self, loaded: Loaded, at: Path, node: Node, region: Region, scope: Scope) -> bool:
        ports = tuple(Port(n, t) for n, t in region.output_types.items())
        for port, text in self._declared(loaded, at, node, ports):
            declared = self.port_type(loaded, (*at, "out"), text, scope)
            if declared is not None and declared != port.type:
                self.problems.append(
                    loaded.problem((*at, "out"), f"output {port.name!r} is {port.type}, not {declared}")
                )
                return False
        return True

    def _find_block(self, loaded: Loaded, at: Path, text: str) -> tuple[Loaded, str, Block] | None:
        alias, dot, name = text.rpartition(".")
        home = loaded.libraries.get(alias) if dot else loaded
        if home is None:
            known = ", ".join(loaded.libraries) or "none"
            self.problems.append(
                loaded.problem(at, f"no alias {alias!r}{suggest(alias, loaded.libraries)} under 'use'; known: {known}")
            )
            return None
        if name not in home.blueprint.blocks:
            blocks = list(home.blueprint.blocks)
            known = ", ".join(blocks) or "none"
            self.problems.append(loaded.problem(at, f"unknown block {text!r}{suggest(name, blocks)}; known: {known}"))
            return None
        return home, name, home.blueprint.blocks[name]

    def _repeat(self, loaded: Loaded, at: Path, node: Node, scope: Scope) -> int | None:
        if node.repeat is None:
            return 1
        try:
            count = parse_size(node.repeat, scope).substitute(scope).constant
            if count is None or not 1 <= count <= MAX_REPEAT:
                raise AxisError(f"repeat is {count}: it must be from 1 to {MAX_REPEAT}")
            return count
        except AxisError as error:
            self.problems.append(loaded.problem((*at, "repeat"), str(error)))
            return None

    def _params(self, loaded: Loaded, at: Path, node: Node, block: Block) -> dict[str, Any] | None:
        good = True
        for key, value in node.with_.items():
            if key not in block.params:
                known = ", ".join(block.params) or "none"
                message = f"block {node.block!r} has no parameter {key!r}{suggest(key, block.params)}; known: {known}"
                self.problems.append(loaded.problem((*at, "with", key), message))
                good = False
            elif not isinstance(value, bool | int | float | str):
                self.problems.append(
                    loaded.problem((*at, "with", key), "a block's parameter is a number, a string, or true or false")
                )
                good = False
        params = {**block.params, **node.with_}
        for key, value in params.items():
            if value is None:
                self.problems.append(loaded.problem(at, f"block {node.block!r} needs its parameter {key!r}"))
                good = False
        return params if good else None

    def _expanded(
        self,
        home: Loaded,
        name: str,
        block: Block,
        params: Mapping[str, Any],
        types: Mapping[str, PortType],
        scope: Scope,
        loaded: Loaded,
        at: Path,
    ) -> Region | None:
        key = (home.file, name, tuple(params.items()), tuple(map(type, params.values())), tuple(types.items()))
        if key in self.done:
            return self.done[key]
        label = f"{home.file}:{name}"
        if label in self.active:
            chain = " -> ".join(x.rsplit(":", 1)[1] for x in [*self.active[self.active.index(label) :], label])
            self.problems.append(loaded.problem((*at, "block"), f"blocks contain each other in a circle: {chain}"))
            return None
        if len(self.active) >= MAX_BLOCK_DEPTH:
            self.problems.append(loaded.problem((*at, "block"), f"blocks nested deeper than {MAX_BLOCK_DEPTH}"))
            return None
        self.active.append(label)
        self.done[key] = self.region(home, ("blocks", name), block, params, types, scope, label=name)
        self.active.pop()
        return self.done[key]

    def _chain(self, loaded: Loaded, at: Path, region: Region, repeat: int, what: str) -> Region | None:
        """``repeat`` uses of one region in a row: outputs replace the inputs of the same name."""
        before = len(self.problems)
        for name, made in region.output_types.items():
            if name not in region.inputs:
                message = (
                    f"{what} is repeated, but its output {name!r} is none of its inputs: {', '.join(region.inputs)}"
                )
                self.problems.append(loaded.problem((*at, "repeat"), message))
            elif made != region.inputs[name]:
                message = f"{what} is repeated, but {name!r} goes in as {region.inputs[name]} and comes out as {made}"
                self.problems.append(loaded.problem((*at, "repeat"), message))
        if region.size * repeat > MAX_NODES:
            self.problems.append(loaded.problem((*at, "repeat"), f"expands to more than {MAX_NODES} components"))
        if len(self.problems) > before:
            return None
        steps, place = [], loaded.position(at)
        for index in range(repeat):
            inputs = {
                name: (Ref(str(index - 1), name) if index and name in region.outputs else Ref("", name),)
                for name in region.inputs
            }
            steps.append(Step(str(index), region, inputs, region.output_types, None, place))
        outputs = {name: Ref(str(repeat - 1), name) for name in region.outputs}
        return Region(region.label, region.inputs, outputs, tuple(steps), repeat=repeat, description=region.description)

    def _unused(self, loaded: Loaded, base: Path, region: Region) -> None:
        """A node or an input that reaches no output and is not saved is a mistake."""
        graph = region.digraph
        wanted = {r.step or ("input", r.port) for r in region.outputs.values()} | {
            s.name for s in region.steps if _saves(s)
        }
        useful = set(wanted).union(*(nx.ancestors(graph, w) for w in wanted if w in graph)) if wanted else set()
        for step in region.steps:
            if step.name not in useful:
                self.problems.append(loaded.problem((*base, "nodes", step.name), f"node {step.name!r} feeds no output"))
        for name in region.inputs:
            if ("input", name) not in useful:
                self.problems.append(loaded.problem((*base, "inputs", name), f"input {name!r} is never read"))


def _saves(step: Step) -> bool:
    return step.save is not None or (isinstance(step.body, Region) and any(_saves(s) for s in step.body.steps))


def _axis_names(text: str) -> set[str]:
    try:
        return set(parse_port_type(text).symbols)
    except AxisError:
        return set()
