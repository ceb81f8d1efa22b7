"""``check`` answers without a parameter: shapes only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sedd_graph.engine import construct
from sedd_graph.engine.construct import build_model
from sedd_graph.runs.check import check
from tests.conftest import BLUEPRINTS
from tests.graph.nested import write_nested


class Largest(TorchDispatchMode):
    """The largest tensor off the meta device that any operation puts out."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda p: p.stem)
def test_check_allocates_no_parameter(path: Path) -> None:
    with Largest() as watch:
        report = check(path)
    # what a kernel is told of single tokens, or of pairs of them, is no parameter of the network
    kernels = dict.fromkeys(("unigram", "power", "spindle", "learned_power", "delete", "indel", "edit_flow"), 1)
    kernels |= {"ordinal": 2, "rates": 2}
    kernel = getattr(report.plan, "kernel", None)
    told = report.plan.states ** kernels.get(kernel.name, 0) if report.plan and kernel else 0
    if kernel and kernel.name == "steps":
        told = (2 * kernel.config.steps + 2) * report.plan.states**2  # its matrices and their products
    elif kernel and kernel.contract.kind == "vector_kernel":
        told = kernel.config.vocab * kernel.config.width  # its embeddings
    assert watch.numel <= max(16, told)


def test_check_counts_what_will_be_allocated(small: Any) -> None:
    with Largest() as watch:
        assert_counted(small())
    assert watch.numel >= 129 * 16  # the watch sees what is allocated


def assert_counted(path: Path) -> None:
    report = check(path)
    model = build_model(report.graph, report.registry)
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_repeats_within_repeats_are_counted_out(tmp_path: Path) -> None:
    assert_counted(write_nested(tmp_path))


def test_a_check_makes_each_distinct_block_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, old = [], construct._Builder._component

    def component(builder: Any, op: Any, step: Any, path: str) -> Any:
        made.append(path)
        return old(builder, op, step, path)

    monkeypatch.setattr(construct._Builder, "_component", component)
    assert check(small(("depth: 2", "depth: 4096"))).graph.root.size == 2 + 5 * 4096
    assert len(made) == 7
