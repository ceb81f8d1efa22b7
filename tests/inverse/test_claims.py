"""Claims in blueprints, from YAML to the console: derived, or refused at their place with the whole diagnosis."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from sedd_graph.errors import BlueprintError
from sedd_graph.runs.check import check, inverses, lock_text

HALVES = """\
blueprint: 1
blocks:
  half:
    inputs: {x: float b l d, c: float b e}
    outputs: {x: mlp}
    nodes:
      norm: {op: layer_norm, in: x}
      modulate: {op: adaln_modulate, in: {x: norm, c: c}}
      mlp: {op: feed_forward, in: modulate}
"""

TEXT = """\
blueprint: 1
name: reversible
use: {halves: halves.yaml}
params: {depth: 3}
axes: {b: batch, l: length, d: 16, e: 8, v: 129}
inputs: {tokens: int b l, sigma: float b}
outputs: {log_score: head}
blocks:
  couple:
    invertible: {given: [c], level: volume_preserving}
    inputs: {x1: float b l d, x2: float b l d, c: float b e}
    outputs: {x1: y1, x2: y2}
    nodes:
      f: {block: halves.half, in: {x: x2, c: c}}
      y1: {op: add, in: [x1, f]}
      g: {block: halves.half, in: {x: y1, c: c}}
      y2: {op: add, in: [x2, g]}
  deep:
    invertible: {given: [c]}
    inputs: {x1: float b l d, x2: float b l d, c: float b e}
    outputs: {s: s, d: d}
    nodes:
      trunk: {block: couple, repeat: "${params.depth}", in: {x1: x1, x2: x2, c: c}}
      s: {op: add, in: [trunk.x1, trunk.x2]}
      d: {op: sub, in: [trunk.x1, trunk.x2]}
    params: {depth: 3}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  time: {op: sigma_embedding, in: sigma, out: float b e}
  deep: {block: deep, in: {x1: embed, x2: embed, c: time}, with: {depth: "${params.depth}"}}
  join: {op: mean, in: [deep.s, deep.d]}
  head: {op: score_head, in: {x: join, tokens: tokens, sigma: sigma}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: score_entropy}
sample: {op: analytic, steps: 8}
data: {tokenizer: {op: characters, size: 128}, length: 32}
train: {batch: 8}
"""

SINGLE = ("couple, repeat: \"${params.depth}\", in: {x1: x1, x2: x2, c: c}}", "single, in: {x1: x1, x2: x2, c: c}}"), (
    "  deep:\n",
    """\
  single:
    invertible: {given: [c]}
    inputs: {x1: float b l d, x2: float b l d, c: float b e}
    outputs: {x1: y1, x2: y2}
    nodes:
      f: {block: halves.half, in: {x: x1, c: c}}
      y1: {op: add, in: [x1, f]}
      y2: {op: scale, in: x2, with: {by: 2}}
  deep:
""",
)  # fmt: skip


@pytest.fixture
def blueprint(tmp_path: Path) -> Callable[..., Path]:
    def write(*changes: tuple[str, str]) -> Path:
        text = TEXT
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        (tmp_path / "halves.yaml").write_text(HALVES)
        (tmp_path / "main.yaml").write_text(text)
        return tmp_path / "main.yaml"

    return write


def refusal(path: Path) -> str:
    with pytest.raises(BlueprintError) as error:
        check(path)
    return str(error.value).replace(f"{path.parent}/", "")


def test_claims_are_derived_and_listed(blueprint: Callable[..., Path]) -> None:
    report = check(blueprint())
    assert str(report).split("\n")[-2:] == [
        "invertible  deep: given c; 13 derivations; bijective (the linear system that gives trunk.2.y1 and trunk.2.y2 changes "
        "volume 2-fold per number); 18 evaluations; log|det| = 16*batch*length*log(2)",
        "            couple: given c; 4 derivations; volume_preserving; 6 evaluations; log|det| = 0",
    ]


def test_a_failing_claim_is_an_error_at_its_place(
    blueprint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = blueprint(*SINGLE, ("invertible: {given: [c]}\n    inputs: {x1: float b l d, x2: float b l d, c: float b e}\n    outputs: {s", "inputs: {x1: float b l d, x2: float b l d, c: float b e}\n    outputs: {s"))  # fmt: skip
    expected = """\
main.yaml:19:5: blocks.single.invertible: single is not invertible: x1 cannot be recovered
  lost: x1 (unknown with it: f.mlp)
  at main.yaml:24:7: y1: y1 is one equation for 2 unknowns: x1 and f.mlp (which needs x1); all follow from x1, but a fixed-point iteration need not converge: op 'layer_norm' (f.norm, halves.yaml:7), op 'adaln_modulate' (f.modulate, halves.yaml:8) and op 'feed_forward' (f.mlp, halves.yaml:9) have no Lipschitz bound
  store: x1 (float batch length 16): 64*batch*length bytes, 16,384 at batch 8 and length 32; no smaller set suffices
  or: write the residual y1 = x1 + f(x1) with two streams, y1 = x1 + f(x2) and y2 = x2 + g(y1), or make f a contraction: every op in it with a Lipschitz bound, whose product is below 1"""
    assert refusal(path) == expected
    assert cli.run(["build", "--check", str(path)]) == 2
    assert capsys.readouterr().err.strip().replace(f"{path.parent}/", "") == expected


def test_a_claim_that_is_too_strong(blueprint: Callable[..., Path]) -> None:
    path = blueprint(
        ("  deep:\n    invertible: {given: [c]}", "  deep:\n    invertible: {given: [c], level: volume_preserving}")
    )
    assert refusal(path) == (
        "main.yaml:19:5: blocks.deep.invertible: claims to be volume_preserving, but is proved to be no more than bijective: "
        "the linear system that gives trunk.2.y1 and trunk.2.y2 changes volume 2-fold per number"
    )


def test_every_failing_claim_is_reported(blueprint: Callable[..., Path]) -> None:
    assert [line.split(": ")[1] for line in refusal(blueprint(*SINGLE)).split("\n") if line.startswith("main")] == [
        "blocks.single.invertible",
        "blocks.deep.invertible",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "[cc]",
            "main.yaml:10:26: blocks.couple.invertible.given[0]: no input 'cc' (did you mean 'c'?); inputs: x1, x2, c",
        ),
        (
            "[c, x1, x2]",
            "main.yaml:10:18: blocks.couple.invertible.given: every input is given: no inputs left to invert",
        ),
    ],
)
def test_what_is_given_must_be_inputs(blueprint: Callable[..., Path], given: str, message: str) -> None:
    assert refusal(blueprint(("{given: [c], level: volume_preserving}", f"{{given: {given}}}"))) == message


def test_a_claim_with_nothing_given_and_one_that_is_false(blueprint: Callable[..., Path]) -> None:
    path = blueprint(("    invertible: {given: [c], level: volume_preserving}\n", "    invertible: false\n"))
    assert [one.region.label for one in check(path).derived] == ["deep"]
    assert (
        refusal(blueprint(("{given: [c], level: volume_preserving}", "true")))
        == """\
main.yaml:10:5: blocks.couple.invertible: couple is not invertible: x1, x2 and c cannot be recovered
  lost: x2 (unknown with it: f.mlp)
  lost: c (unknown with it: f.mlp and g.mlp)
  at main.yaml:15:7: y1: y1 is one equation for 2 unknowns: x1 and f.mlp (which needs c and x2); they depend on c, x1 and x2, which are independent
  at main.yaml:17:7: y2: y2 is one equation for 2 unknowns: x2 and g.mlp (which needs c); they depend on c and x2, which are independent
  store: c (float batch 8): 32*batch bytes, 256 at batch 8 and length 32; no smaller set suffices
  or: if c is known at inversion too (as conditioning is), declare given: [c]"""
    )


def test_the_lock_file_keeps_claims(blueprint: Callable[..., Path], tmp_path: Path) -> None:
    report = check(blueprint())
    (tmp_path / "lock.yaml").write_text(lock_text(report))
    again = check(tmp_path / "lock.yaml")
    assert [str(one) for one in again.derived] == [str(one) for one in report.derived]
    assert lock_text(again) == lock_text(report)


PSEUDO = """\
inverse of deep: x1, x2 from s, d, given c
  trunk.2.y1 = 1/2 d + 1/2 s; trunk.2.y2 = 1/2 s - 1/2 d
  trunk.1.y2 = trunk.2.y2 - trunk.2.g(trunk.2.y1, c)
  trunk.1.y1 = trunk.2.y1 - trunk.2.f(trunk.1.y2, c)
  trunk.0.y2 = trunk.1.y2 - trunk.1.g(trunk.1.y1, c)
  trunk.0.y1 = trunk.1.y1 - trunk.1.f(trunk.0.y2, c)
  x2 = trunk.0.y2 - trunk.0.g(trunk.0.y1, c)
  x1 = trunk.0.y1 - trunk.0.f(x2, c)
  bijective (the linear system that gives trunk.2.y1 and trunk.2.y2 changes volume 2-fold per number); 18 evaluations; \
log|det| = 16*batch*length*log(2)

inverse of couple: x1, x2 from y1 (output x1), y2 (output x2), given c
  x2 = y2 - g(y1, c)
  x1 = y1 - f(x2, c)
  volume_preserving; 6 evaluations; log|det| = 0
"""


def test_show_inverse(blueprint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", str(blueprint()), "--inverse"]) == 0
    assert capsys.readouterr().out == PSEUDO
    assert cli.run(["show", str(blueprint(*SINGLE)), "--inverse"]) == 2
    assert (
        "single is not invertible: x1 cannot be recovered\n  lost: x1 (unknown with it: f.mlp)"
        in capsys.readouterr().out
    )


def test_show_inverse_where_there_is_none_to_show(
    blueprint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = blueprint(
        ("    invertible: {given: [c], level: volume_preserving}\n", ""), ("    invertible: {given: [c]}\n", "")
    )
    assert cli.run(["show", str(path), "--inverse"]) == 2
    assert "no block claims to be invertible" in capsys.readouterr().err
    assert cli.run(["show", str(blueprint()), "--inverse", "--format", "json"]) == 2
    assert "--inverse goes with --format tree, mermaid or svg" in capsys.readouterr().err


def test_drawings_show_both_directions(blueprint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(blueprint())
    drawn = {}
    for form in ("svg", "mermaid"):
        for more in ([], ["--inverse"]):
            assert cli.run(["show", path, "--format", form, *more]) == 0
            drawn[form, len(more)] = capsys.readouterr().out
    # couple: y1, c -> g; y2, g -> x2; x2, c -> f; y1, f -> x1.  deep: s, d, c -> trunk; trunk -> x2, x1; x2 -> trunk
    back = 8 + 6
    lines = drawn["mermaid", 1].split("\n")
    assert sum(" -.-> " in line for line in lines) == back
    assert " -.-> " not in drawn["mermaid", 0]
    assert "      i_deep__trunk__x2 -.-> n_deep__trunk__f".strip() in [line.strip() for line in lines]
    edges = [line for line in lines if "->" in line and ("-->" in line or "-.->" in line)]
    styled = [int(n) for n in next(line for line in lines if "linkStyle" in line).split()[1].split(",")]
    assert [i for i, line in enumerate(edges) if "-.->" in line] == styled
    for key, count in ((0, 0), (1, back)):
        ET.fromstring(drawn["svg", key])
        assert drawn["svg", key].count("url(#back)") == count


def test_undo_gives_the_diagnoses_without_raising(blueprint: Callable[..., Path]) -> None:
    _, derived = inverses(blueprint(*SINGLE))
    assert [(one.region.label, one.problem is None) for one in derived] == [("deep", False), ("single", False)]
