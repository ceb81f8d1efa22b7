"""docs/reference/invertible-components.md is true: every component that the solver knows anything of has a row, and its row agrees with it."""

import inspect
import math
import re
import sys

import pytest

from sedd_graph.component.contract import Algebra
from sedd_graph.component.kinds import NODE, kinds_at
from sedd_graph.component.registry import discover
from tests.conftest import ROOT
from tests.registry.test_conformance import CASES, OWN

TEXT = (ROOT / "docs" / "reference" / "invertible-components.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("`"): cells
    for line in TEXT.splitlines()
    if line.startswith("| `") and line.count("|") > 5
    for cells in [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]]
}
REGISTRY = discover()


def algebra(name: str) -> Algebra:
    """Under the first config that the conformance tests take."""
    cls = REGISTRY.component(OWN[name].op)
    config = cls.Config.model_validate(CASES[name][0][0])
    return cls.algebra(config, cls.signature(config, {"xs": 2}))


KNOWN = {
    name: found
    for name in CASES
    if REGISTRY.component(OWN[name].op).kind in kinds_at(NODE) and name != "transformers_backbone"
    for found in [algebra(name)]
    if found.rules or found.linear or found.lipschitz
}


def test_every_component_that_the_solver_knows_of_has_a_row_and_no_other() -> None:
    assert ROWS.keys() == KNOWN.keys()
    assert all(len(cells) == 7 for cells in ROWS.values())


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_row_agrees_with_the_component(name: str) -> None:
    found, (_, _, undone, log_det, lipschitz, padding, _) = KNOWN[name], ROWS[name]
    cls = REGISTRY.component(OWN[name].op)
    assert (padding == "yes") == ("attend" in inspect.signature(cls.forward).parameters)
    if found.linear:
        (factors,) = found.linear.values()
        assert lipschitz == "linear"
        assert log_det == ("0" if all(abs(f) == 1 for f in factors.values()) else "linear")
        return
    # concat's rule is for parts of fixed sizes, which are known in a graph alone
    assert (undone == "-") == (not found.rules and name != "concat")
    if found.integers:
        assert not found.log_det
        assert log_det == "-"
    elif found.rules:
        (method,) = found.log_det.values()
        assert log_det == ("0" if method == "zero" else "own")
    bounds = {bound for (port, _), bound in found.lipschitz.items() if port.startswith("x")}
    config = cls.Config.model_validate(CASES[name][0][0])
    shown: dict[str, set[float | None]] = {"none": set(), "1": {1.0}}
    shown |= {"bound": {getattr(config, "bound", None)}, "exp(clamp)": {math.exp(getattr(config, "clamp", 0.0))}}
    assert bounds == shown[lipschitz]


def test_papers_are_those_that_the_components_cite() -> None:
    """A number in a row stands in the component's module, or in the block that it is cited for."""
    blocks = (ROOT / "blueprints" / "blocks" / "reversible.yaml").read_text(encoding="utf-8")
    for name, cells in ROWS.items():
        cls = REGISTRY.component(OWN[name].op)
        source = inspect.getsource(sys.modules[cls.__module__]) + blocks + (inspect.getdoc(REGISTRY.component("exact_likelihood")) or "")  # fmt: skip
        for number in re.findall(r"\d{4}\.\d{5}|\d{4}\.\d{4}", cells[-1]):
            assert number in source, (name, number)
