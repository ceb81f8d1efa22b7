"""The wheel alone: it holds every file of the packages, and builds, trains and samples a shipped blueprint by name."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sedd_graph
from tests.conftest import ROOT

PACKAGES = {"sedd_graph": "sedd_graph", "registry": "sedd_graph_registry", "blueprints": "sedd_graph_blueprints"}
"""Folders of the repository and the packages that they become."""

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([*PIP, "wheel", *flags, str(source)], check=True)
    (found,) = out.glob("*.whl")
    return found


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in PACKAGES.items():
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert len(files) > 10
        assert {f"{package}/{p.relative_to(ROOT / folder)}" for p in files} <= names
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES.values())


def test_its_metadata_is_that_of_the_project(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
        licence = archive.read(f"{path.rpartition('/')[0]}/licenses/LICENSE")
    assert metadata["Version"] == sedd_graph.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "the sedd_graph authors"
    assert metadata.get_all("Project-URL") is None
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_it_works_alone(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder and used from another, with nothing of the repository on the path."""
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    dependencies = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    variables["PYTHONPATH"] = os.pathsep.join([str(target), *dependencies])

    def python(*arguments: str) -> str:
        # -S: no .pth file is read, so that an editable install of the repository is not found
        command = [sys.executable, "-S", *arguments]
        done = subprocess.run(
            command, cwd=elsewhere, env=variables, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def verb(*arguments: str) -> str:
        return python("-m", "sedd_graph", *arguments)

    found = python(
        "-c", "import sedd_graph, sedd_graph_registry; print(sedd_graph.__file__, sedd_graph_registry.__file__)"
    )
    assert all(Path(path).is_relative_to(target) for path in found.split())
    cpu = ["--device", "cpu"]
    small = [
        "params.dim=32",
        "params.depth=1",
        "data.length=32",
        "train.steps=2",
        "train.evaluate=null",
        "train.warmup=1",
    ]
    built = verb("build", "first", *small, "--compile", "off", "--path-to", "run", *cpu)
    assert "absorb with loglinear" in built
    assert "fails" not in built
    run = elsewhere / (elsewhere / "run").read_text()
    assert "done at step 2" in verb("train", str(run), *cpu)
    verb("sample", str(run), "--batch", "2", "--steps", "4", *cpu)
    assert (run / "samples.zarr" / "zarr.json").is_file()
    assert "<h2>Samples</h2>" in (run / "report.html").read_text(encoding="utf-8")
    assert "first.yaml" in verb("init", "first")
    assert verb("build", "first.yaml", "--check") == verb("build", "first", "--check")
