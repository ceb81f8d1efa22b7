"""docs/reference/matrix.md: every pair of registered components has a cell, with the state that a check gives it."""

import re

import pytest

from sedd_graph.component.registry import discover
from sedd_graph.runs.matrix import Cell, cells, matrix
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "reference" / "matrix.md").read_text(encoding="utf-8")
REGISTRY = discover()


def table(title: str) -> dict[tuple[str, str], str]:
    """Return the state of each row and column of the table under ``title``."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return {(row[0], column): state for row in rows[2:] for column, state in zip(rows[0][1:], row[1:], strict=True)}


@pytest.mark.parametrize(
    ("name", "title"),
    [("objective", "Kernels, heads and objectives"), ("sampler", "Kernels, heads and samplers")],
)
def test_every_cell_has_the_state_of_a_check(name: str, title: str) -> None:
    own = {e.name for e in REGISTRY if e.distribution.replace("-", "_").startswith("sedd_graph ")}
    shown = table(title)
    now = {
        (c.row, c.column): c.state
        for c in cells(REGISTRY, prove=False)
        if c.table == name and c.row.split(",")[0] in own and c.column in own
    }
    assert shown.keys() == now.keys()
    for pair, state in now.items():
        if state == "allowed":
            assert shown[pair] in ("proved", "broken"), pair
        else:
            assert shown[pair] == state, pair
    assert "heuristic" in now.values() or name == "objective"


def test_every_kernel_meets_every_schedule() -> None:
    shown = table("Kernels and schedules")
    kinds = {k: {c.name for c in REGISTRY.contracts() if c.kind == k} for k in ("kernel", "schedule")}
    assert {row for row, _ in shown} <= kinds["kernel"]
    assert {column for _, column in shown} <= kinds["schedule"]
    assert len(shown) == len({r for r, _ in shown}) * len({c for _, c in shown})
    assert {r for r, _ in shown} == {r.split(",")[0] for r, _ in table("Kernels, heads and samplers")}
    assert not re.search(r"\bNone\b|<<<|>>>", TEXT)


def test_reasons_follow_the_table() -> None:
    found = matrix(
        [
            Cell("sampler", "a, log_x0", "one", "proved", "0.001"),
            Cell("sampler", "a, log_x0", "two", "refused", why="'two' needs a mask, not 'a'"),
            Cell("sampler", "b, log_x0", "one", "heuristic", why="its order depends on the network"),
            Cell("sampler", "b, log_x0", "two", "refused", why="'two' needs a mask, not 'b'"),
        ]
    )
    assert found == (
        "## Kernels, heads and samplers\n\n| | one | two |\n|---|---|---|\n| a, log_x0 | proved | refused |\n"
        "| b, log_x0 | heuristic | refused |\n\n- refused: 'two' needs a mask (a, log_x0 with two, b, log_x0 with two)\n"
        "- heuristic: its order depends on the network (b, log_x0 with one)\n"
    )
