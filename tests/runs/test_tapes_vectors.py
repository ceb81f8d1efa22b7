"""Tapes of models of vectors: text to vectors to noise and back to the last bit, in another process; edits; refusals."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sedd_graph.cli.main import run as command
from sedd_graph.errors import UserError
from sedd_graph.runs.edit import edit_run, replace_in
from sedd_graph.runs.invert import invert_run, restore_run
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.restore import restored_texts
from sedd_graph.store.manifest import DamagedError
from sedd_graph.store.tape import Tape, _digest, read_tape, write_tape
from tests.runs.unproved import built

TEXTS = ["The cat sat on the mat.", "", "def f(x):", "A cat, a hat and a cat.", "return None"]
REVERSIBLE = "sample={op: reversible_heun, steps: 8}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return built(tmp_path_factory.mktemp("flow") / "run", "langflow-tiny", "params.cond=16", REVERSIBLE)


@pytest.fixture(scope="module")
def tape(run: Run) -> Path:
    said: list[str] = []
    path = invert_run(run, TEXTS, batch=2, say=said.append)
    assert "equal to the last bit" in said[0]
    assert not said[1:]  # the network decodes every token itself
    return path


def decoded(run: Run, tokens: list[list[int]]) -> list[str]:
    return [run.text_tokenizer().decode(row) for row in tokens]


def test_a_tape_leads_back_to_its_texts_in_this_and_another_process(run: Run, tape: Path, tmp_path: Path) -> None:
    found = read_tape(tape)
    assert found.facts.kind == "vectors"
    assert found.arrays["states"].shape == (sum(map(len, TEXTS)), 2, 16)
    assert not len(found.arrays["place"])
    assert restored_texts(run, found, where=tape) == TEXTS
    out = tmp_path / "text.txt"
    code = (
        f"from sedd_graph.cli.main import main; main(['restore', {str(tape)!r}, '--device', 'cpu', '-o', {str(out)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().decode() == "\n".join(TEXTS)


def test_noise_of_a_text_is_close_to_normal(run: Run, tape: Path) -> None:
    noise = read_tape(tape).arrays["states"] / 2.0**20
    assert abs(noise[:, 0].mean()) < 0.2
    assert 0.8 < noise[:, 0].std() < 1.3
    # the streams stay together
    assert np.abs(noise[:, 0] - noise[:, 1]).mean() < 0.3


@pytest.mark.parametrize("name", ["langflow-tiny", "diffusion-lm-tiny"])
def test_noise_to_vectors_to_noise_is_equal_to_the_last_bit(name: str, run: Run, tmp_path: Path) -> None:
    if name != "langflow-tiny":
        run = built(tmp_path / "run", name, "sample={op: reversible_heun, steps: 5}")
    inversion, network = run.engine.process.inversion(), run.engine.network
    assert inversion is not None
    noise = torch.randint(-(2**21), 2**21, (3, 9, *inversion.shape), generator=torch.Generator().manual_seed(0))
    reached = inversion.to_text(network, noise)
    assert torch.equal(inversion.to_noise(network, reached.state), noise)
    assert not torch.equal(reached.state, noise)
    with pytest.raises(UserError, match="the noise has the shape"):
        inversion.to_text(network, noise[..., 1:])


def test_tokens_that_the_network_does_not_decode_are_stored(tmp_path: Path) -> None:
    run = built(tmp_path / "run", "diffusion-lm-tiny", "sample={op: reversible_heun, steps: 5}")
    said: list[str] = []
    tape = invert_run(run, TEXTS, say=said.append)
    assert "stored as they are" in said[1]  # an untrained network that predicts vectors
    assert len(read_tape(tape).arrays["place"]) > 10
    assert restored_texts(run, read_tape(tape), where=tape) == TEXTS


def test_other_models_and_conditions_are_refused(run: Run, tape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_tape(tape)
    other = open_run(run.path, device="cpu", compile="off", overrides=["sample.steps=9"])
    with pytest.raises(UserError, match="written with the sampler"):
        restore_run(other, found, where=tape)
    other = open_run(run.path, device="cpu", compile="off")
    with torch.no_grad():
        next(other.engine.model.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(UserError, match="the weights of"):
        restore_run(other, found, where=tape)
    half = open_run(run.path, device="cpu", compile="off")
    half.engine.model.bfloat16()
    with pytest.raises(UserError, match="the dtype of the weights"):
        restore_run(half, found, where=tape)
    # with another number of threads the result is exact, or refused
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            assert decoded(run, restore_run(run, found, where=tape)) == TEXTS
        except DamagedError as error:
            assert "of the run differ" in str(error)
        finally:
            torch.set_num_threads(threads)
    # arithmetic that differs in its last bits, as on another machine
    plain = run.engine.network.run
    monkeypatch.setattr(run.engine.network, "run", lambda *a: {n: v * (1 + 1e-6) for n, v in plain(*a).items()})
    with pytest.raises(DamagedError, match=r"rows \d+ of the run differ"):
        restore_run(run, found, where=tape)


def test_altered_tapes_are_refused(run: Run, tape: Path, tmp_path: Path) -> None:
    random_, found = random.Random(0), read_tape(tape)
    for number in range(12):
        arrays = {name: data.copy() for name, data in found.arrays.items()}
        name = random_.choice(["states", "marks", "lengths"])
        flat = arrays[name].reshape(-1)
        at = random_.randrange(len(flat))
        flat[at] = flat[at] + random_.choice([1, -1, 7]) if name != "marks" else flat[at] ^ 1
        facts, target = found.facts, tmp_path / f"{number}.zarr"
        if number % 2:  # the hash is written anew
            facts = facts.model_copy(update={"digest": _digest(facts, arrays)})
        write_tape(target, Tape(facts=facts, arrays=arrays), numbers=False)
        with pytest.raises(UserError):
            restore_run(run, read_tape(target), where=target)
    for name, value, message in (
        ("lengths", np.asarray([2**40], dtype=np.int64), "lengths is not"),
        ("states", found.arrays["states"][1:], "states is not that of"),
        ("states", found.arrays["states"][0], "is int64"),
        ("states", np.full_like(found.arrays["states"], 2**51), "out of range"),
        ("place", np.asarray([10**6]), "do not fit|at no position"),
        ("token", np.asarray([-1]), "at no position"),
    ):
        forged = write_tape(
            tmp_path / "forged.zarr", Tape(facts=found.facts, arrays={**found.arrays, name: value}), numbers=True
        )
        with pytest.raises(DamagedError, match=message):
            read_tape(forged)
    arrays = {**found.arrays, "place": np.asarray([0]), "token": np.asarray([500])}
    forged = write_tape(tmp_path / "token.zarr", Tape(facts=found.facts, arrays=arrays), numbers=False)
    with pytest.raises(DamagedError, match="none of the model's 128"):
        restore_run(run, read_tape(forged), where=forged)


def test_edits_keep_the_text_at_strength_0_and_have_the_new_words_above(run: Run, tape: Path) -> None:
    found = read_tape(tape)
    said: list[str] = []
    edit_run(run, found, replace_in("cat", "horse"), where=tape, strength=0.0, say=said.append)
    assert TEXTS[0] in said
    for strength in (1e-6, 1.0):
        said.clear()
        edit_run(run, found, replace_in("cat", "horse"), where=tape, strength=strength, say=said.append)
        made = [text for text in said if not text.startswith("---")]
        assert len(made) == 2
        assert made[0][4:9] == "horse"
        assert made[1][2:7] == made[1][-6:-1] == "horse"
        assert [len(text) for text in made] == [25, 27]
    # with no new words and hardly any fresh noise, the road is that of the tape
    said.clear()
    edit_run(run, found, None, where=tape, strength=1e-9, say=said.append)
    assert [text for text in said if not text.startswith("---")] == [text for text in TEXTS if text]


def test_samplers_without_the_property_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = built(tmp_path / "run", "langflow-tiny", "params.cond=16", "sample={op: ode, steps: 8}")
    assert plain.engine.process.inversion() is None
    assert command(["invert", str(plain.path), "--text", "a cat", "--device", "cpu"]) == 2
    assert "reversible_heun" in capsys.readouterr().err
    with pytest.raises(UserError, match="at most 2,000"):
        built(tmp_path / "d", "diffusion-lm-tiny", REVERSIBLE).engine.process.inversion(2001)
