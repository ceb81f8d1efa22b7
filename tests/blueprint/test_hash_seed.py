"""What is said does not depend on PYTHONHASHSEED, which decides the order in which a set of names is walked."""

import os
import subprocess
import sys
from pathlib import Path

from tests.blueprint.test_fuzz import sources
from tests.conftest import ROOT

SAID = """
import random, sys
from pathlib import Path
from sedd_graph.runs.check import check
from sedd_graph.errors import SeddGraphError
from sedd_graph.inverse import solve
from sedd_graph.inverse.format import explain
from tests.blueprint.fuzz import mutant, overrides
from tests.inverse.test_random import KINDS, Grower
from tests.inverse.toys import region

folder, rng = Path(sys.argv[1]), random.Random(9)
texts = [p.read_text() for p in sorted(folder.glob("source-*.yaml"))]
for number in range(250):
    text = rng.choice(texts)
    path = folder / "mutant.yaml"
    path.write_bytes(mutant(text, rng))
    try:
        said = str(check(path, overrides(text, rng)))
    except SeddGraphError as error:
        said = str(error)
    print(number, said)
for number in range(100):  # and what the solver says, of regions that it knows nothing of
    inputs = [f"x{i}" for i in range(rng.randint(1, 4))]
    grower = Grower(inputs, [n for n in inputs if rng.random() < 0.2])
    known = list(grower.beside)
    for _ in range(rng.randint(1, 20)):
        grower.grow(rng.choice(KINDS), rng, rng.random() < 0.2)
    outputs = {f"o{i}": ref for i, ref in enumerate(dict.fromkeys(grower.streams or inputs[:1]))}
    print(number, explain(solve(region(inputs, grower.nodes, outputs), given=tuple(known))))
"""

SEVERAL_UNKNOWN = """\
blueprint: 1
name: several
axes: {b: batch, l: length, d: 4}
inputs: {x: float b l d}
outputs: {x: fed}
nodes:
  fed: {op: feed_forward, in: x, with: {hidden: b*l+d}}
"""


def test_messages_are_the_same_under_every_hash_seed(tmp_path: Path) -> None:
    for number, text in enumerate([*sources(tmp_path), *[SEVERAL_UNKNOWN] * 24]):
        (tmp_path / f"source-{number:02}.yaml").write_text(text)
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SAID, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        said.append(done.stdout.splitlines())
    assert sum("is not invertible" in line for line in said[0]) > 20
    assert sum("depends on batch, length" in line for line in said[0]) > 5
    assert said[1] == said[0]
