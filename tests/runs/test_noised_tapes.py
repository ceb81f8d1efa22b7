"""Tapes of texts that the kernel has noised: text to noise and back, refusals, and sizes."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from sedd_graph.cli.main import run as command
from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.runs.edit import edit_run, replace_in
from sedd_graph.runs.invert import invert_run
from sedd_graph.runs.noise import denoise_run, noise_run
from sedd_graph.runs.open import Run
from sedd_graph.runs.restore import restored_texts
from sedd_graph.runs.sample import sample_run
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import Tape, read_tape, write_tape
from tests.conftest import SMALL
from tests.runs.folders import placed
from tests.runs.test_tapes import TEXTS, opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return opened(placed(tmp_path_factory.mktemp("noised"), SMALL))


@pytest.fixture(scope="module")
def tape(run: Run) -> Path:
    said: list[str] = []
    path = noise_run(run, TEXTS, until=0.6, steps=2, batch=2, say=said.append)
    many = sum(map(len, TEXTS))
    assert f"5 texts, {many} tokens, noise of {many} tokens at time 0.6" in said[0]
    return path


def test_noise_leads_back_to_its_texts_in_this_and_another_process(run: Run, tape: Path, tmp_path: Path) -> None:
    found = read_tape(tape)
    assert restored_texts(run, found, where=tape) == TEXTS
    out = tmp_path / "text.txt"
    code = f"import torch; torch.set_num_threads(2); from sedd_graph.cli.main import main; main(['restore', {str(tape)!r}, '--device', 'cpu', '-o', {str(out)!r}])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().decode() == "\n".join(TEXTS)


def test_the_format_is_as_documented(run: Run, tape: Path) -> None:
    found = read_tape(tape)
    facts, arrays = found.facts, found.arrays
    assert (facts.kind, facts.until, facts.steps, facts.mask) == ("noise", 0.6, 2, 128)
    assert sorted(facts.parts) == ["kernel", "schedule"]
    assert facts.dtype == "none"  # neither kernel nor schedule has weights
    assert arrays["rows"].tolist() == [2, 2, 1]
    assert arrays["lengths"].tolist() == [len(t) for t in TEXTS]
    share = float((arrays["noise"] == 128).mean())
    assert 0.3 < share < 0.9  # the schedule loglinear masks a share t
    first = Bitstream.from_bytes(arrays["bitstream"].tobytes()[: int(arrays["sizes"][0])])
    assert len(first.steps) == 2


def test_another_forward_process_is_refused_and_another_network_is_not(run: Run, tape: Path, tmp_path: Path) -> None:
    found = read_tape(tape)
    other = opened(placed(tmp_path, SMALL, "params.dim=32"))
    assert restored_texts(other, found, where=tape) == TEXTS
    with pytest.raises(UserError, match="written with the schedule"):
        restored_texts(opened(run.path, overrides=["process.schedule={op: cosine}"]), found, where=tape)
    other.tokenizer = _Renamed(other.text_tokenizer())  # type: ignore[assignment]  # a stand-in
    with pytest.raises(UserError, match="the tokenizer of"):
        restored_texts(other, found, where=tape)
    with pytest.raises(UserError, match="no noise of a sampler"):
        edit_run(run, found, None, where=tape)


class _Renamed:
    """A tokenizer with another file."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def to_json(self) -> str:
        return str(self._own.to_json()) + " "


@pytest.mark.parametrize("count", [16, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_altered_tapes_are_refused_and_never_silently_wrong(run: Run, tape: Path, tmp_path: Path, count: int) -> None:
    """One entry changed: by the hash; and, where someone writes the hash anew, by the digests of the bitstream."""
    numbers, found = random.Random(count), read_tape(tape)
    for number in range(count):
        arrays = {name: data.copy() for name, data in found.arrays.items()}
        name = sorted(arrays)[number % len(arrays)]
        at = numbers.randrange(len(arrays[name]))
        arrays[name][at] = (
            arrays[name][at] ^ 1 if name == "bitstream" else arrays[name][at] + numbers.choice([1, -1, 7])
        )
        target = tmp_path / f"{number}.zarr"
        if number % 3:
            write_tape(target, Tape(facts=found.facts, arrays=arrays), numbers=False)
        else:
            shutil.copytree(tape, target)
            zarr.open_array(str(target / name), mode="r+")[...] = arrays[name]
        with pytest.raises(UserError):
            restored_texts(run, read_tape(target), where=target)


def test_noise_that_is_not_the_bitstreams_is_named(run: Run, tape: Path, tmp_path: Path) -> None:
    found = read_tape(tape)
    noise = found.arrays["noise"].copy()
    noise[0] = 5 if noise[0] != 5 else 6
    forged = write_tape(
        tmp_path / "f.zarr", Tape(facts=found.facts, arrays={**found.arrays, "noise": noise}), numbers=False
    )
    with pytest.raises(DamagedError, match="texts 1 to 2: the noisy rows are not those"):
        denoise_run(run, read_tape(forged), where=forged)
    for name, value in (
        ("rows", np.asarray([9, 2, 1])),
        ("sizes", found.arrays["sizes"][:2]),
        ("lengths", np.asarray([2**40])),
    ):
        forged = write_tape(
            tmp_path / f"{name}.zarr", Tape(facts=found.facts, arrays={**found.arrays, name: value}), numbers=False
        )
        with pytest.raises(DamagedError, match=r"do not fit|lengths is not"):
            read_tape(forged)


def test_verbs_print_sizes_and_refuse_what_makes_no_sense(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, cpu, lines = tmp_path / "own.zarr", ["--device", "cpu"], tmp_path / "lines.txt"
    lines.write_text("\n".join(f"line {i} of many" for i in range(300)))
    assert command(["invert", str(run.path), "--file", str(lines), "--by", "kernel", "--batch", "64", "-o", str(where), *cpu]) == 0  # fmt: skip
    said = capsys.readouterr().out
    many = sum(len(f"line {i} of many") for i in range(300))
    assert f"300 texts, {many:,} tokens" in said
    # under absorb at t = 1 nearly all tokens are masks, and each costs log2(128) = 7 bits
    assert "(6.99" in said or "(7.0" in said
    assert "verified by the way back" in said
    assert command(["restore", str(where), "--run", str(run.path), *cpu]) == 0
    assert capsys.readouterr().out == lines.read_text() + "\n"
    for more, message in (
        (["--time", "0.5"], "give --by kernel"),
        (["--by", "kernel", "-o", str(where)], "exists already"),
        (["--by", "kernel", "--text", "\u0416"], "was not trained on"),
    ):
        text = [] if "--text" in more else ["--text", "a"]
        assert command(["invert", str(run.path), *text, *more, *cpu]) == 2
        assert message in capsys.readouterr().err


def test_information_is_that_of_the_transition_matrix(run: Run) -> None:
    said: list[str] = []
    noise_run(run, ["ab" * 400], until=0.5, seed=4, say=said.append)
    share = float(said[1].rsplit("(", 1)[1].split(" ")[0])
    assert share == pytest.approx(0.5 * 7, abs=0.35)  # a share t of tokens is masked, of log2(128) bits each


@pytest.mark.parametrize(
    "name",
    [
        "editflow-tiny",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("flexmdm-tiny", "indel-tiny", "did-tiny", "d3pm-gaussian-tiny", "power-tiny", "neighbours-tiny")
        ),
    ],
)
def test_every_kernel_of_text_is_walked_to_noise_and_back(name: str, tmp_path: Path) -> None:
    made = opened(placed(tmp_path, name))
    path = noise_run(made, TEXTS, until=0.7, batch=3, where=tmp_path / "t.zarr")
    found = read_tape(path)
    assert restored_texts(made, found, where=path) == TEXTS
    assert restored_texts(made, found, where=path) != [made.text_tokenizer().decode(found.arrays["noise"].tolist())]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ("flow-tiny", "diffusion-lm-tiny")])
def test_processes_of_vectors_and_points_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--by kernel: a process of"):
        noise_run(opened(placed(tmp_path, name)), ["abc"])


def test_texts_of_a_model_with_conditions_are_walked_to_noise_and_back(tmp_path: Path) -> None:
    made = opened(placed(tmp_path, SMALL, "sample.matching=(a|the) [a-z]+", "sample.particles=3", "sample.steps=4"))
    texts = ["a cat", "the cat", "a dog"]
    path = invert_run(made, texts, where=tmp_path / "c.zarr")
    assert restored_texts(made, read_tape(path), where=path) == texts
    with pytest.raises(UserError, match="with what is given and allowed"):
        invert_run(made, ["two cats"])
    said: list[str] = []
    tape = tmp_path / "s.zarr"
    sample_run(made, SampleRequest(batch=2, length=6, seed=3), tape=tape, say=said.append)
    again = restored_texts(made, read_tape(tape), where=tape)
    assert [line.split("\n", 1)[1] for line in said[:2]] == again
    assert all(re.fullmatch("(a|the) [a-z]+", text) for text in again)
    with pytest.raises(UserError, match="no trajectory"):
        sample_run(made, SampleRequest(batch=2, length=6, seed=3), trajectory=True)
    edited = edit_run(made, read_tape(path), replace_in("cat", "dog"), where=path, strength=0.2)
    assert all("dog" in str(text) for text in zarr.open_group(str(edited), mode="r")["text"][...])  # type: ignore[index]  # an array
