"""A solved region: its program after a round trip in numpy and a comparison of volumes, or its refusal with its remedy."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from sedd_graph.graph.model import Ref, Region
from sedd_graph.inverse import Program, Refusal, solve
from sedd_graph.inverse.solve import SIZES
from tests.inverse import toys


def random_inputs(outer: Region, seed: int = 0) -> dict[str, toys.Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=t.dims[0].size.constant or 0) for name, t in outer.inputs.items()}


def inverted(outer: Region, given: Sequence[str] = (), level: str = "injective", stored: Sequence[Ref] = ()) -> Program:
    """The program of ``outer``, after it has recovered random inputs, and its log-determinant where it has one."""
    program = solve(outer, given=given, stored=stored)
    assert isinstance(program, Program)
    inputs = random_inputs(outer)
    values = toys.forward(outer, inputs)
    known = toys.run(program, toys.facts(program, values))
    for name, value in inputs.items():
        np.testing.assert_allclose(known[Ref("", name)], value, rtol=1e-8, atol=1e-8)
    assert program.level == level, program.note
    if level != "injective":
        assert not program.unmeasured
        assert toys.log_det(program, values) == pytest.approx(toys.true_log_det(program, inputs), abs=1e-8)
    return program


def refused(outer: Region, given: Sequence[str] = (), sizes: Mapping[str, int] = SIZES) -> Refusal:
    refusal = solve(outer, given=given, sizes=sizes)
    assert isinstance(refusal, Refusal)
    assert isinstance(solve(outer, given=given, stored=refusal.remedy.values), Program), "the remedy is none"
    return refusal
