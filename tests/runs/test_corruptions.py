"""Every kind of damage to every file of a run folder: refused by name, repaired, or harmless; never silently wrong.

tests/training/test_damage.py, tests/store/test_recover.py and tests/cli/test_cli_faults.py have a part of it in the suite.
"""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.conftest import SMALL
from tests.runs.forked import Forked

CASES = int(os.environ.get("SEDD_GRAPH_CORRUPTIONS", "300"))
"""Number of corruptions of the slow test."""
CPU = ["--device", "cpu"]
SHOWN = {"blueprint.yaml", "graph.json", "graph.svg", "graph.mmd", "report.html", "evaluation.json"}
"""Files that no command computes with; the last three are written anew."""
LATE = "checkpoints/step-00000009"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def run_command(folder: Path, *arguments: str) -> tuple[int, str]:
    command = Forked([*arguments, *CPU], folder.with_name("log"))
    return command.wait(), command.text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was cut off behind step 6 of 9, with samples; and the results of one that is whole."""
    folder = tmp_path_factory.mktemp("corruptions")
    text = SMALL.replace("repeat:", "save: {ports: [x], every: 1, rows: 2, chunk: 4}, repeat:")
    text = text.replace("steps: 6,", "steps: 9,").replace("{every: 3}", "{every: 3, keep: 3}")
    (folder / "small.yaml").write_text(text)
    made = ["build", str(folder / "small.yaml"), "--runs", str(folder / "runs"), "--path-to", str(folder / "at")]
    assert run_command(folder / "x", *made)[0] == 0
    run = Path((folder / "at").read_text()).rename(folder / "run")
    assert run_command(run, "train", str(run))[0] == 0
    shutil.rmtree(run / LATE)
    code, said = run_command(run, "sample", str(run), "--batch", "2", "--steps", "4")
    assert code == 0, said
    copy = shutil.copytree(run, folder / "copy")
    found, said = results(copy)
    assert said == "", said
    shutil.rmtree(copy)
    return run, found


GIVEN = {
    "sample": ["sample"],
    "eval": ["eval"],
    "judge": ["judge"],
    "train": ["model", "ema", "optimizer", "losses", "taps step", "taps value"],
}
"""What each command gives."""
EVERY = ("sample", "eval", "judge", "train")


def results(run: Path, verbs: Sequence[str] = EVERY) -> tuple[dict[str, Any], str]:
    """What commands compute from a run folder, to the last bit, without those that are refused; and complaints."""
    found: dict[str, Any] = {}
    complaints = []

    def told(verb: str, *more: str) -> bool:
        code, said = run_command(run, verb, str(run), *more)
        assert code in (0, 2), f"{verb} ends with {code}: {said[-500:]}"
        assert "internal error" not in said, f"{verb}: {said[-500:]}"
        assert "Traceback" not in said, f"{verb}: {said[-500:]}"
        lines = said.splitlines()
        complaints.extend(lines[-1:] if code else [line for line in lines if line.startswith("warning")])
        return code == 0

    if "sample" in verbs and told("sample", "--batch", "1", "--length", "24", "--steps", "4"):
        newest = max(run.glob("samples*.zarr"), key=lambda path: path.stat().st_mtime)
        found["sample"] = np.asarray(zarr.open_group(newest, mode="r")["tokens"]).tolist()
    if "eval" in verbs and told("eval", "--batches", "2"):
        found["eval"] = json.loads((run / "evaluation.json").read_text())["nats_per_token"]
    if "judge" in verbs and told("eval", "--samples", "samples.zarr"):
        found["judge"] = json.loads((run / "quality.jsonl").read_text().splitlines()[-1])["samples"]
    if "train" in verbs and told("train", "--resume"):
        for name in ("model", "ema", "optimizer"):
            found[name] = (run / LATE / f"{name}.safetensors").read_bytes()
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found["losses"] = [r["loss"] for r in records if "loss" in r]
        for name in ("step", "value"):
            found[f"taps {name}"] = np.asarray(zarr.open_array(run / "activations.zarr/trunk/x" / name, mode="r")).tobytes()  # fmt: skip
    return found, "\n".join(complaints)


# -- damage ---------------------------------------------------------------------------------------------------------


def flipped(path: Path, rng: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(raw)), rng.randrange(8)
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    return f"bit {bit} of byte {place} flipped"


def truncated(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def emptied(path: Path, rng: random.Random) -> str:
    os.truncate(path, 0)
    return "empty"


def deleted(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "deleted"


def zeroed(path: Path, rng: random.Random) -> str:
    path.write_bytes(bytes(path.stat().st_size))
    return "zeros"


def swapped(path: Path, rng: random.Random) -> str:
    others = [
        p
        for p in path.parent.parent.rglob(path.name)
        if p.is_file() and p != path and p.read_bytes() != path.read_bytes()
    ]
    if not others:
        return flipped(path, rng)
    other = rng.choice(sorted(others))
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return f"swapped with {other.parent.name}"


VALUES = [-5, 10**30, 0, 1.5, "1", "../../x", None, [], {}, True, [1, 2], 1e308]


def edited(path: Path, rng: random.Random) -> str:
    """Replace a value of a JSON file, or a number in another text."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return flipped(path, rng)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            collect(node[key])

    collect(content)
    if not places:
        return emptied(path, rng)
    node, key = rng.choice(places)
    before, node[key] = node[key], rng.choice(VALUES)
    path.write_text(json.dumps(content))
    return f"{key}: {str(before)[:40]} is now {node[key]}"


DAMAGE: list[Callable[[Path, random.Random], str]] = [flipped, truncated, emptied, deleted, zeroed, swapped, edited]


def files_of(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.stat().st_size)


def verdict(run: Path, whole: dict[str, Any], name: str) -> str:
    """Classify what a damaged run folder gives; an AssertionError if it is silently wrong."""
    place = Path(name).parts[0]
    verbs = {"checkpoints": ("sample", "train"), "activations.zarr": ("train",), "samples.zarr": ("judge",)}.get(
        place, EVERY
    )
    found, said = results(run, verbs)
    # a file is named by its path, or by the folder of its checkpoint or array
    parts = Path(name).parts
    named = any(part in said for part in parts if part not in ("c", "0", "1", "checkpoints"))
    missing = {key for verb in verbs for key in GIVEN[verb]} - found.keys()
    assert not missing or named, f"{missing} refused without naming the file: {said}"
    differ = [key for key in found if found[key] != whole[key]]
    assert not differ or named, f"{differ} silently wrong: {said}"
    return "refused" if missing else "told" if differ else "repaired" if named else "harmless"


def corrupt(runs: tuple[Path, dict[str, Any]], folder: Path, name: str, damage: Callable[[Path, random.Random], str], rng: random.Random) -> str:  # fmt: skip
    run = shutil.copytree(runs[0], folder / "run")
    how = damage(run / name, rng)
    try:
        return verdict(run, runs[1], name)
    except (AssertionError, Exception) as error:
        raise AssertionError(f"{name}: {how}: {error}") from error
    finally:
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_no_corruption_is_silent(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    rng, counts, wrong = random.Random(time.time_ns()), Counter[str](), []
    files = [name for name in files_of(runs[0]) if name not in SHOWN]
    cases = [(name, damage) for name in files for damage in DAMAGE]
    rng.shuffle(cases)
    for number in range(CASES):
        name, damage = cases[number % len(cases)]
        try:
            counts[corrupt(runs, tmp_path, name, damage, rng)] += 1
        except AssertionError as error:
            wrong.append(str(error))
            print(f"WRONG {error}", flush=True)
        print(f"{number + 1} corruptions: {dict(counts)}, {len(wrong)} wrong", flush=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("checkpoints/step-00000006/ema.safetensors", flipped, "refused"),
        ("activations.zarr/trunk/x/value/zarr.json", emptied, "repaired"),
        ("samples.zarr/tokens/c/0/0", flipped, "refused"),
    ],
)
def test_a_few_corruptions(
    runs: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path, random.Random], str],
    expected: str,
) -> None:
    assert corrupt(runs, tmp_path, name, damage, random.Random(0)) == expected
