"""Heads: those of the shipped blueprints fit their kernels, and one that does not fit is refused at build with the defect."""

from pathlib import Path

import pytest

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.families.tokens import TokenProcess
from sedd_graph.verify.output import check_output
from tests.conftest import BLUEPRINTS

ROOT = Path(__file__).parents[2]
SMALL = [p for p in BLUEPRINTS if p.stem.endswith("tiny") or p.stem in ("first", "learn")]


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_heads_of_shipped_blueprints_fit(path: Path) -> None:
    engine = sedd_graph.build(path, device="cpu", compile="off")
    checks = engine.process.check_network(engine.network)
    assert [check for check in checks if not check.holds] == []
    assert isinstance(engine.process, TokenProcess) == ("head.output" in {check.name for check in checks})


@pytest.mark.parametrize(
    ("name", "mask", "defect"),
    [
        ("unigram-tiny", "last", "a possible clean token has probability 0"),
        ("unigram-tiny", "hidden", "a possible clean token has probability 0"),
        ("mixture-tiny", "last", "a possible clean token has probability 0"),
        ("mixture-tiny", "none", "the mask has a positive probability of being the clean token"),
        ("mdlm-tiny", "none", "the mask has a positive probability of being the clean token"),
        ("mdlm-tiny", "hidden", "a visible token, which is clean, is not carried over"),
    ],
)
def test_heads_that_do_not_fit_are_caught(name: str, mask: str, defect: str) -> None:
    engine = sedd_graph.build(
        ROOT / "blueprints" / f"{name}.yaml", [f"nodes.head.with.mask={mask}"], device="cpu", compile="off"
    )
    found = check_output(engine.network, engine.process.kernel, engine.process.objective)
    assert found.holds is False
    assert defect in found.value


def test_d3pm_reads_a_prediction_that_gives_the_mask_a_probability() -> None:
    """As D3PM's logits do; the objective declares it, and only where its posterior is Bayes' rule for the mask too."""
    path = ROOT / "blueprints" / "d3pm-tiny.yaml"
    engine = sedd_graph.build(path, ["nodes.head.with.mask=none"], device="cpu", compile="off")
    assert check_output(engine.network, engine.process.kernel, engine.process.objective).holds
    changes = ["nodes.head.with.mask=none", "process={op: power, schedule: {op: loglinear}}"]
    engine = sedd_graph.build(path, changes, device="cpu", compile="off")
    found = check_output(engine.network, engine.process.kernel, engine.process.objective)
    assert found.value.startswith("the mask has a positive probability")


def test_build_refuses_a_head_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blueprint = str(ROOT / "blueprints" / "mdlm-tiny.yaml")
    code = cli.run(["build", blueprint, "nodes.head.with.mask=none", "--device", "cpu", "--compile", "off"])
    assert code == 2
    assert "the network does not fit the process: head.output" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("run.json"))
