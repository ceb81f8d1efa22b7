"""A stranger's package, as its author would meet us: installed from its folder into an environment of its own, then used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.environment import Environment

EXAMPLE = ROOT / "examples" / "third_party"
OPS = {
    *("append.v1", "logits_absorb.v1", "next_token_head.v1", "plain_logits_head.v1", "prefix.v1", "prefix_loss.v1"),
    *("square_root.v1", "window_attention.v1"),
}
CHECKS = """
from sedd_graph.testing.conformance import check_component
from sedd_graph_example import SquareRoot, WindowAttention

check_component(WindowAttention, {"heads": 2}, axes={"r": 8})
check_component(SquareRoot)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """One that has the example package; installed from a copy, since building writes beside the sources."""
    folder = tmp_path_factory.mktemp("stranger")
    made = Environment(folder / "venv")
    source = folder / "third_party"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    made.install(source)
    return made


def test_it_is_not_installed_here() -> None:
    """Otherwise the tests below would show nothing."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('sedd_graph_example') is not None)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_components_names_it_with_its_place(environment: Environment, tmp_path: Path) -> None:
    listed = environment.run("-m", "sedd_graph", "components", cwd=tmp_path)
    lines = {line.split()[0]: line for line in listed.splitlines() if "[sedd_graph_example 0.1.0]" in line}
    assert sorted(lines) == sorted(OPS)
    assert "attention.v1" in listed.split()  # beside ours
    for name, cls in (("window_attention", "WindowAttention"), ("square_root", "SquareRoot")):
        shown = environment.run("-m", "sedd_graph", "components", name, cwd=tmp_path)
        place = re.search(r"sedd_graph_example 0\.1\.0  (.+):(\d+)\n", shown)
        assert place is not None, shown
        file = Path(place[1])
        assert file.resolve().is_relative_to(environment.packages.resolve())
        assert file.read_text().splitlines()[int(place[2]) - 1].startswith(f"class {cls}(")


def test_build_and_train(environment: Environment, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "window.yaml", tmp_path)
    built = environment.run(
        "-m", "sedd_graph", "build", "window.yaml", "--device", "cpu", "--path-to", "run", cwd=tmp_path
    )
    assert "absorb with square_root" in built
    assert "holds  schedule.rate" in built
    run = tmp_path / (tmp_path / "run").read_text()
    assert "window_attention.v1" in (run / "blueprint.lock.yaml").read_text()
    assert "sedd_graph_example 0.1.0" in (run / "run.json").read_text()
    trained = environment.run("-m", "sedd_graph", "train", run, "--device", "cpu", cwd=tmp_path)
    assert "done at step 2" in trained
    assert (run / "checkpoints" / "step-00000002" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("prefix", ("prefix.sample", "prefix.prior", "objective.tight", "sampler.law")),
        ("logits", ("kernel.nelbo", "objective.tight", "sampler.law")),
    ],
)
def test_a_string_process_and_a_kernel_with_its_own_output_are_proved_and_trained(
    environment: Environment, tmp_path: Path, name: str, checks: tuple[str, ...]
) -> None:
    shutil.copy(EXAMPLE / f"{name}.yaml", tmp_path)
    told = environment.run("-m", "sedd_graph", "train", f"{name}.yaml", "--device", "cpu", cwd=tmp_path)
    assert "FAILS" not in told
    for check in checks:
        assert re.search(rf"holds  {check} ", told), check
    assert "done at step 1" in told
    (run,) = (tmp_path / "runs" / name).iterdir()
    sampled = environment.run("-m", "sedd_graph", "sample", run, "--batch", "2", "--steps", "4", cwd=tmp_path)
    assert "--- 1" in sampled


def test_conformance(environment: Environment, tmp_path: Path) -> None:
    environment.run("-W", "error", "-c", CHECKS, cwd=tmp_path)
