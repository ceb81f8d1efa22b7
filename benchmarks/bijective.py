"""Time and accuracy of bijective layers compared with FrEIA, normflows and memcnn: the same layers with the same weights.

    pip install --no-deps FrEIA==0.2 normflows==1.7.3 memcnn==1.5.2
    python benchmarks/bijective.py [--rounds N]

Only this benchmark needs those three libraries. Each of our layers is a block of a blueprint, with the derived inverse and
log-determinant. First, in float64, outputs, log-determinants and inverses are compared with a tolerance of 1e-6. Then, in
float32 and eager (as the libraries run), two measurements with interleaved timing: forward with log-determinant followed by
the inverse, without gradients; and a training step (forward, log-determinant, backward). Last, a stack of token blocks under
reversible execution: time, and the error of its gradients relative to stored activations, without and with dropout, for
weights and for the conditioning. Appends to benchmarks/results/bijective.jsonl and writes benchmarks/results/bijective.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, append_record
from interleaved import interleave, quartiles, retain_freed_memory
from torch import Tensor, nn

import sedd_graph
from sedd_graph.component.registry import discover
from sedd_graph.engine.construct import build_block
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.log_det import forward_with_log_det
from sedd_graph.engine.regions import RegionModule
from sedd_graph.graph.claims import uses
from sedd_graph.store.files import write_text

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # memcnn was written for an older torch
    try:
        import FrEIA.modules as freia
        import normflows
        from memcnn_stack import LAYERS, MODEL, ROWS, TOKENS, Stack
    except ImportError as error:
        raise SystemExit(
            f"{error}: this benchmark compares with FrEIA, normflows and memcnn; "
            "pip install --no-deps FrEIA==0.2 normflows==1.7.3 memcnn==1.5.2"
        ) from None

WIDTHS, BATCH = (64, 256), 4096
CLAMP, BINS, BOUND, LEAST = 2.0, 8, 3.0, 1e-3


def blocks(width: int) -> str:
    """Return a blueprint with each layer as a block; subnets are twice as wide as the layer."""
    return f"""
blueprint: 1
name: bijective
axes: {{b: batch, l: length, d: {width}}}
inputs: {{x: float b l d}}
outputs: {{x: householder}}
blocks:
  subnet:
    params: {{width: null}}
    inputs: {{x: float b l i}}
    outputs: {{x: down}}
    nodes:
      up: {{op: linear, in: x, with: {{width: {2 * width}}}}}
      act: {{op: lipschitz_act, in: up, with: {{activation: relu}}}}
      down: {{op: linear, in: act, with: {{width: "${{params.width}}"}}}}
  nice:
    invertible: {{level: volume_preserving}}
    inputs: {{x: float b l 2*h}}
    outputs: {{x: out}}
    nodes:
      half: {{op: split, in: x, with: {{sizes: [h, h]}}}}
      f: {{block: subnet, in: half.x1, with: {{width: {width // 2}}}}}
      y1: {{op: add, in: [half.x0, f]}}
      g: {{block: subnet, in: y1, with: {{width: {width // 2}}}}}
      y2: {{op: add, in: [half.x1, g]}}
      out: {{op: concat, in: [y1, y2]}}
  glow:
    invertible: {{level: bijective}}
    inputs: {{x: float b l 2*h}}
    outputs: {{x: out}}
    nodes:
      half: {{op: split, in: x, with: {{sizes: [h, h]}}}}
      f: {{block: subnet, in: half.x1, with: {{width: {width}}}}}
      of_f: {{op: split, in: f, with: {{sizes: [h, h]}}}}
      y1: {{op: affine, in: {{x: half.x0, s: of_f.x0, t: of_f.x1}}, with: {{clamp: {CLAMP}}}}}
      g: {{block: subnet, in: y1, with: {{width: {width}}}}}
      of_g: {{op: split, in: g, with: {{sizes: [h, h]}}}}
      y2: {{op: affine, in: {{x: half.x1, s: of_g.x0, t: of_g.x1}}, with: {{clamp: {CLAMP}}}}}
      out: {{op: concat, in: [y1, y2]}}
  real_nvp:
    description: Changes one half.
    invertible: {{level: bijective}}
    inputs: {{x: float b l 2*h}}
    outputs: {{x: out}}
    nodes:
      half: {{op: split, in: x, with: {{sizes: [h, h]}}}}
      f: {{block: subnet, in: half.x0, with: {{width: {width}}}}}
      of_f: {{op: split, in: f, with: {{sizes: [h, h]}}}}
      y: {{op: affine, in: {{x: half.x1, s: of_f.x0, t: of_f.x1}}, with: {{clamp: {CLAMP}}}}}
      out: {{op: concat, in: [half.x0, y]}}
  spline:
    invertible: {{level: bijective}}
    inputs: {{x: float b l 2*h}}
    outputs: {{x: out}}
    nodes:
      half: {{op: split, in: x, with: {{sizes: [h, h]}}}}
      f: {{block: subnet, in: half.x0, with: {{width: {width // 2 * (3 * BINS - 1)}}}}}
      y: {{op: spline, in: {{x: half.x1, params: f}}, with: {{bins: {BINS}, bound: {BOUND}, smallest: {LEAST}}}}}
      out: {{op: concat, in: [half.x0, y]}}
  plu:
    invertible: {{level: bijective}}
    inputs: {{x: float b l d}}
    outputs: {{x: out}}
    nodes: {{out: {{op: plu, in: x}}}}
  act_norm:
    invertible: {{level: bijective}}
    inputs: {{x: float b l d}}
    outputs: {{x: out}}
    nodes: {{out: {{op: act_norm, in: x}}}}
  householder:
    invertible: {{level: volume_preserving}}
    inputs: {{x: float b l d}}
    outputs: {{x: out}}
    nodes: {{out: {{op: orthogonal, in: x, with: {{kind: householder, reflections: 8}}}}}}
nodes:
  nice: {{block: nice, in: x}}
  glow: {{block: glow, in: nice}}
  real_nvp: {{block: real_nvp, in: glow}}
  spline: {{block: spline, in: real_nvp}}
  plu: {{block: plu, in: spline}}
  act_norm: {{block: act_norm, in: plu}}
  householder: {{block: householder, in: act_norm}}
"""


Pair = tuple[Tensor, Tensor]


class Ours:
    """A block of sedd_graph on x [b, 1, d], b sequences of one position: forward with log-determinant, and inverse."""

    def __init__(self, layer: RegionModule, layout: Layout) -> None:
        self.layer, self.layout, self.parameters = layer, layout, list(layer.parameters())

    def forward(self, x: Tensor) -> Pair:
        run = LayerRun(self.layout, self.layer)
        run.put(self.layout.inputs.values(), [x])
        log = forward_with_log_det(run, len(x))
        return run.take(self.layout.outputs.values())[0], log

    def inverse(self, y: Tensor) -> Tensor:
        run = LayerRun(self.layout, self.layer)
        run.put(self.layout.outputs.values(), [y])
        run.invert()
        return run.take(self.layout.inputs.values())[0]


class FreiaLayer:
    """A module of FrEIA."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.parameters = layer, list(layer.parameters())

    def forward(self, x: Tensor) -> Pair:
        (y,), log = self.layer([x])
        return y, torch.as_tensor(log, dtype=x.dtype).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        found: tuple[tuple[Tensor], Tensor] = self.layer([y], rev=True)
        return found[0][0]


class NormflowsLayer:
    """A flow of normflows; ``inverted`` exchanges its forward pass and its inverse."""

    def __init__(self, layer: nn.Module, *, inverted: bool = False) -> None:
        self.layer, self.inverted, self.parameters = layer, inverted, list(layer.parameters())

    def forward(self, x: Tensor) -> Pair:
        y, log = self._call(x, inverse=self.inverted)
        return y, log.expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return self._call(y, inverse=not self.inverted)[0]

    def _call(self, x: Tensor, *, inverse: bool) -> Pair:
        layer: Any = self.layer
        found: Pair = layer.inverse(x) if inverse else layer(x)
        return found


Layer = Ours | FreiaLayer | NormflowsLayer


def subnet(inside: int, outside: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, outside))


class Bounded(nn.Sequential):
    """A subnet whose log-scales, every second channel, are clamped as in sedd_graph: normflows leaves that to the subnet."""

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = super().forward(x).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([shift, CLAMP * torch.tanh(scale / CLAMP)], -1).flatten(-2)


class WithContext(nn.Sequential):
    """A subnet that accepts (and ignores) the context argument that normflows passes."""

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        found: Tensor = super().forward(x)
        return found


def copy_subnet(target: nn.Sequential, ours: Any, rows: Sequence[int] | None = None) -> None:
    """Copy our weights into ``target``, the last layer's ``rows`` in the order that the library expects."""
    up, down = (ours._modules[name].linear for name in ("up", "down"))
    target[0].load_state_dict(up.state_dict())
    take = torch.arange(len(down.weight)) if rows is None else torch.tensor(rows)
    target[2].load_state_dict({k: v[take] for k, v in down.state_dict().items()})


def theirs(name: str, ours: Any, width: int) -> dict[str, Layer]:
    """Return the same layer of each library that has it, with our weights."""
    children, half = ours._modules, width // 2
    made = functools.partial(subnet, hidden=2 * width)
    if name == "nice":
        nice = freia.NICECouplingBlock([(width,)], subnet_constructor=made)
        copy_subnet(nice.F, children["f"])
        copy_subnet(nice.G, children["g"])
        return {"FrEIA NICECouplingBlock": FreiaLayer(nice)}
    if name == "glow":
        soft = lambda u: torch.tanh(u / CLAMP)  # noqa: E731
        glow = freia.GLOWCouplingBlock([(width,)], subnet_constructor=made, clamp=CLAMP, clamp_activation=soft)
        copy_subnet(glow.subnet2, children["f"])
        copy_subnet(glow.subnet1, children["g"])
        return {"FrEIA GLOWCouplingBlock": FreiaLayer(glow)}
    if name == "real_nvp":
        net = Bounded(*made(half, width))
        copy_subnet(net, children["f"], [i for k in range(half) for i in (half + k, k)])
        return {"normflows AffineCouplingBlock": NormflowsLayer(normflows.flows.AffineCouplingBlock(net))}
    if name == "spline":
        coupling = normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(
            torch.cat([torch.zeros(half), torch.ones(half)]),
            lambda i, o: WithContext(*made(i, o)),
            num_bins=BINS,
            tails="linear",
            tail_bound=BOUND,
            min_bin_width=LEAST / BINS,
            min_bin_height=LEAST / BINS,
            min_derivative=LEAST,
        )
        copy_subnet(coupling.transform_net, children["f"])
        with torch.no_grad():  # ours is shifted so that a parameter of zero means a slope of one
            shift = torch.tensor(1 - LEAST).double().expm1().log()
            coupling.transform_net[2].bias.view(half, -1)[:, 2 * BINS :] += shift
        return {"normflows PiecewiseRationalQuadraticCoupling": NormflowsLayer(coupling)}
    own: Any = children["out"]
    if name == "plu":
        lower, upper, _ = own._factors(own.weight.dtype)
        p, low, up = torch.linalg.lu((lower @ upper + upper).index_select(0, own.order).T)
        affine = normflows.flows.InvertibleAffine(width)
        sign, log = up.diagonal().sign(), up.diagonal().abs().log()
        found = {"P": p, "L": low, "U": up.triu(1), "sign_S": sign, "log_S": log, "eye": torch.eye(width)}
        affine.load_state_dict(found)
        return {"normflows InvertibleAffine": NormflowsLayer(affine, inverted=True)}
    if name == "act_norm":
        own.ready.fill_(True)
        freias, flows = freia.ActNorm([(width,)]), normflows.flows.ActNorm((width,))
        freias.load_state_dict({"scale": own.log_scale[None], "bias": own.bias[None]})
        flows.s.data, flows.t.data = own.log_scale.data[None].clone(), own.bias.data[None].clone()
        flows.data_dep_init_done.fill_(1.0)
        return {"FrEIA ActNorm": FreiaLayer(freias), "normflows ActNorm": NormflowsLayer(flows)}
    turn = freia.HouseholderPerm([(width,)], n_reflections=len(own.weight))
    turn.Vs.data = own.weight.data.clone()
    return {"FrEIA HouseholderPerm": FreiaLayer(turn)}


def agreement(layers: dict[str, Layer], width: int) -> dict[str, float]:
    """Return the largest difference of outputs, log-determinants and inverses from ours, relative to the largest value; float64."""
    x = torch.randn(BATCH // 8, 1, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {}
    for layer in layers.values():
        layer.layer.double()
    ours, *others = layers.items()
    flat = x.squeeze(1)
    with torch.no_grad():
        y, log = ours[1].forward(x)
        back = ours[1].inverse(y).squeeze(1)
        y = y.squeeze(1)
        for name, layer in others:
            made = layer.forward(flat)
            pairs = [(made[0], y), (made[1], log), (layer.inverse(y), flat), (back, flat)]
            found[name] = max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)
    for layer in layers.values():
        layer.layer.float()
    return found


def there_and_back(layer: Layer, x: Tensor) -> None:
    with torch.no_grad():
        layer.inverse(layer.forward(x)[0])


def train(layer: Layer, x: Tensor) -> None:
    y, log = layer.forward(x)
    (0.5 * y.square().sum() - log.sum()).backward()
    for parameter in layer.parameters:
        parameter.grad = None


def contest(
    layers: dict[str, Layer], x: Tensor, what: Callable[[Layer, Tensor], None], rounds: int
) -> dict[str, list[float]]:
    """Return seconds per call of each layer, ours on x [b, 1, d] and theirs on [b, d]; short calls are repeated in a round."""
    contestants = {
        name: functools.partial(what, layer, x[:, None] if isinstance(layer, Ours) else x)
        for name, layer in layers.items()
    }
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for run in contestants.values():
            run()
        took = time.perf_counter() - start
    return interleave(contestants, rounds, max(1, min(20, round(0.04 / took))))


def compare(width: int, rounds: int, record: dict[str, Any]) -> list[str]:
    """Return the rows of the table for layers of ``width`` channels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bijective.yaml"
        path.write_text(blocks(width), encoding="utf-8")
        graph = sedd_graph.build(path, device="cpu", compile="off").network.graph
    torch.manual_seed(0)
    x = torch.randn(BATCH, width)
    rows = []
    for use in uses(graph.root):
        layer = build_block(use.layer, discover())
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        layer.double()
        given = () if use.layer.claim is None else use.layer.claim.given
        layers: dict[str, Layer] = {"sedd_graph": Ours(layer, Layout(use.layer, given))}
        torch.set_default_dtype(torch.float64)  # weights are copied without rounding
        layers |= theirs(use.name, layer, width)
        torch.set_default_dtype(torch.float32)
        same = agreement(layers, width)
        cells: dict[str, list[str]] = {name: [f"{value:.0e}"] for name, value in same.items()}
        for what in (there_and_back, train):
            seconds = contest(layers, x, what, rounds)
            record[f"{use.name} {width}, {what.__name__}"] = seconds
            for name in cells:
                middle, low, high = quartiles(seconds["sedd_graph"], seconds[name])
                cells[name] += [
                    f"{statistics.median(seconds['sedd_graph']) * 1e3:.2f} ms",
                    f"{middle:.2f} ({low:.2f}-{high:.2f})",
                ]
        for name, row in cells.items():
            rows.append(f"| {use.name} | {width} | {name} | {' | '.join(row)} |")
            print(rows[-1], flush=True)
        record[f"{use.name} {width}, difference"] = same
        if any(value >= 1e-6 for value in same.values()):
            raise SystemExit(f"{use.name} of width {width} differs from the libraries: {same}")
    return rows


def main() -> None:
    """Compare, time, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    retain_freed_memory()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    hardware = describe_hardware(torch.device("cpu"))
    print(f"{hardware}; torch {torch.__version__}; {BATCH} rows, float32, eager", flush=True)
    record: dict[str, Any] = {"hardware": hardware, "torch": torch.__version__, **vars(arguments)}
    table = [
        "| layer | width | compared with | largest difference (float64) | forward and back: ours | ratio | training step: ours | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for width in WIDTHS:
        table += compare(width, arguments.rounds, record)
    stack = Stack()
    record["stack"] = seconds = stack.timed(max(4, arguments.rounds // 3))
    stacked = ["| training step | seconds | sedd_graph, reversible / this |", "|---|---|---|"]
    for name, values in seconds.items():
        middle, low, high = quartiles(seconds["sedd_graph, reversible"], values)
        stacked.append(f"| {name} | {statistics.median(values):.3f} | {middle:.2f} ({low:.2f}-{high:.2f}) |")
    print("\n".join(stacked), flush=True)
    record["gradients"] = errors = stack.errors()
    wrong = [
        "| reversible execution | error of the weights' gradient | of the conditioning's gradient |",
        "|---|---|---|",
    ]
    wrong += [f"| {name} | {e['weights']:.1e} | {e['conditioning']:.1e} |" for name, e in errors.items()]
    print("\n".join(wrong))
    append_record("bijective", record)
    text = (
        "# Bijective layers compared with FrEIA 0.2, normflows 1.7.3 and memcnn 1.5.2\n\n"
        "Made by `python benchmarks/bijective.py`; the same layers with the same weights. "
        f"Hardware: {hardware}; torch {torch.__version__}.\n\n"
        f"## Layers\n\n{BATCH} rows, hidden layers twice the width; float32, eager. Difference: the largest of outputs, "
        "log-determinants and inverses, in float64, over the largest value. Ratio: ours / theirs, median and quartiles of "
        f"{arguments.rounds} rounds in one run; below 1, ours is faster. The libraries' inverses always compute a "
        "log-determinant as well; ours do not.\n\n" + "\n".join(table) + "\n\n"
        f"## A stack of token blocks under reversible execution\n\n{LAYERS} layers of attention and feed-forward, two streams of width "
        f"{MODEL}, {ROWS} x {TOKENS} tokens, no dropout, eager.\n\n" + "\n".join(stacked) + "\n\n"
        "## Gradients under reversible execution\n\nError relative to the same library's gradients with stored "
        "activations and the same dropout masks; 1 where no gradient arrives.\n\n" + "\n".join(wrong) + "\n"
    )
    write_text(RESULTS / "bijective.md", text)


if __name__ == "__main__":
    main()
