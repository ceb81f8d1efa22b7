"""The commands as a user meets them: exit codes, messages, and the whole road in small."""

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.store.files import alone
from sedd_graph.training.checkpoint import latest_checkpoint


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def build(path: Path, runs: Path, *overrides: str) -> Path:
    marker = runs / "marker"
    runs.mkdir(exist_ok=True)
    assert (
        cli.run(["build", str(path), *overrides, "--runs", str(runs), "--device", "cpu", "--path-to", str(marker)]) == 0
    )
    return Path(marker.read_text())


def test_the_whole_road(small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(("repeat:", "save: {ports: [x], every: 2}, repeat:"))
    run = build(path, tmp_path / "runs")
    assert {p.name for p in run.iterdir()} >= {"blueprint.yaml", "blueprint.lock.yaml", "graph.json", "graph.svg", "graph.mmd", "certificate.json", "run.json", "report.html", "tokenizer.json"}  # fmt: skip
    assert all(c["holds"] is not False for c in json.loads((run / "certificate.json").read_text())["checks"])
    assert cli.run(["train", str(run), "--device", "cpu"]) == 0
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    taps = zarr.open_group(str(run / "activations.zarr"), mode="r")
    assert taps["trunk/x/step"][:].tolist() == [2, 4, 6]  # type: ignore[index]
    assert taps["trunk/x/value"].shape == (3, 8, 32, 16)
    capsys.readouterr()
    assert cli.run(["sample", str(run), "--batch", "3", "--length", "20", "--trajectory", "--device", "cpu"]) == 0
    first = capsys.readouterr().out
    store = zarr.open_group(str(run / "samples.zarr"), mode="r")
    tokens = np.asarray(store["tokens"])
    assert tokens.shape == (3, 20)
    assert store["trajectory"].shape == (10, 3, 20)
    facts = json.loads((run / "run.json").read_text())
    assert {key: value for key, value in store.attrs.items() if key != "hashes"} == {
        "sampler": "ancestral.v1",
        "settings": sedd_graph.check(run / "blueprint.lock.yaml").plan.sampling(),
        "steps": 8,
        "seed": 0,
        "weights": "checkpoints/step-00000006/model.safetensors"
        if not (run / "checkpoints/step-00000006/ema.safetensors").exists()
        else "checkpoints/step-00000006/ema.safetensors",
        "revision": facts["revision"],
        "blueprint": facts["blueprint"],
        "device": "cpu",
        "dtype": "float32",
        "mask": 128,
        "pad": 127,
        "end": None,
        "clamped": 0,
        "evaluations": store.attrs["evaluations"],
    }
    assert np.asarray(store["lengths"]).tolist() == [20, 20, 20]
    assert np.array_equal(np.asarray(store["trajectory"])[-1], tokens)
    # neither the mask (128) nor an id that no text has ever comes out
    tokenizer = load_tokenizer(run)
    assert not np.isin(tokens, [128, *tokenizer.forbidden]).any()
    texts = [tokenizer.decode(row) for row in tokens.tolist()]
    assert np.asarray(store["text"]).tolist() == texts
    assert first.split("--- 0\n")[1].split("\n--- 1\n")[0] == texts[0]
    assert cli.run(["sample", str(run), "--batch", "3", "--length", "20", "--device", "cpu"]) == 0
    again = capsys.readouterr().out
    assert first.split("\n---\n")[0] == again.split("\n---\n")[0]
    assert cli.run(["infill", str(run), "--text", "The [[7]] statement [[2]].", "--batch", "2", "--device", "cpu"]) == 0
    filled = capsys.readouterr().out.split("--- 0\n")[1].split("\n---")[0]
    assert re.fullmatch(r"The (.|\n){7} statement (.|\n){2}\.", filled)
    assert (
        cli.run(
            ["infill", str(run), "--prefix", "ab", "--suffix", "yz", "--batch", "1", "--length", "9", "--device", "cpu"]
        )
        == 0
    )
    assert re.search(r"--- 0\nab(.|\n){5}yz\n---", capsys.readouterr().out)
    assert cli.run(["eval", str(run), "--batches", "2", "--device", "cpu"]) == 0
    assert "bits per character" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'class="reel"' in page
    assert cli.run(["export", str(run), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    engine = sedd_graph.build(tmp_path / "out", device="cpu")
    reopened = sedd_graph.build(run, device="cpu")
    assert torch.equal(engine.sample(2, 12, seed=5), reopened.sample(2, 12, seed=5))
    assert cli.run(["show", str(run)]) == 0
    assert "layer x 2" in capsys.readouterr().out


def test_text_is_held_to_conditions(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build(small(("steps: 8}", 'steps: 8, forbid: [e], allow: {-1: "[.!]"}}')), tmp_path / "runs")

    def drawn(*words: str) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = cli.run([words[0], str(run), "--batch", "3", "--device", "cpu", *words[1:]])
        said = capsys.readouterr()
        return code, re.findall(r"--- \d+\n(.*?)(?=\n---)", said.out, flags=re.DOTALL), said.err

    pattern = r"[A-Z][a-z]+( [a-z]+){2,4}[.?!]"
    code, texts, _ = drawn("sample", "--length", "20", "--matching", pattern, "--forbid", "a", "--allow", "1=[xyz]")
    assert code == 0
    assert len(texts) == 3
    assert all(re.fullmatch(pattern, t) and t[1] in "xyz" and t[-1] in ".!" and not set("ae") & set(t) for t in texts)
    told = zarr.open_group(str(run / "samples.zarr"), mode="r").attrs["conditions"]
    assert told == {"forbid": ["e", "a"], "allow": {"-1": "[.!]", "1": "[xyz]"}, "matching": pattern}
    code, texts, warned = drawn(
        "infill", "--text", "Th[[9]] is[[1]]", "--matching", r"Th[a-z]+ is\.", "--guidance", "2"
    )
    assert (code, warned) == (0, "")
    assert all(re.fullmatch(r"Th[a-z]{9} is\.", t) for t in texts)
    attributes = zarr.open_group(str(run / "infilled.zarr"), mode="r").attrs
    assert str(attributes["infilling"]).startswith("exact: the given text is held fixed")
    code, texts, _ = drawn("infill", "--text", "I (x.[[3]]) is [[4]].", "--hole", "[xyz]+", "--hole", "a|[b-d]{2,} *")
    assert code == 0
    assert all(re.fullmatch(r"I \(x\.[xyz]{3}\) is [b-d]{2,} *\.", t) and len(t) == 18 for t in texts)
    for words, said in (
        (("--matching", "a+"), "no text of 32 tokens matches 'a+' with what is given and allowed (row 0)"),
        (("--length", "4", "--matching", "x{7}"), "no text of 4 tokens matches 'x{7}': the nearest lengths are 7"),
        (("--matching", "(a"), "--matching: at character 3 of '(a': a '(' is never closed"),
        (("--allow", "99=a"), "allow: there is no position 99 in rows of 32 tokens"),
    ):
        code, _, warned = drawn("sample", *words)
        assert code == 2
        assert warned.startswith(said)
    blueprint = ["sedd-uniform-tiny", "matching: a", "a kernel under which visible tokens stay, for matching"]
    with pytest.raises(sedd_graph.errors.SeddGraphError, match=blueprint[2]):
        sedd_graph.check(f"blueprints/{blueprint[0]}.yaml", ["sample.matching=a"])
    with pytest.raises(sedd_graph.errors.SeddGraphError, match=r"sample.matching: .*no anchors"):
        sedd_graph.check("blueprints/first.yaml", ["sample.matching=^a"])


def test_a_lock_builds_the_same_again(small: Callable[..., Path], tmp_path: Path) -> None:
    first = build(small(), tmp_path / "a")
    second = build(first / "blueprint.lock.yaml", tmp_path / "b")
    for name in ("blueprint.lock.yaml", "graph.json", "graph.svg"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_resume_goes_through_the_same_losses(small: Callable[..., Path], tmp_path: Path) -> None:
    path = small(("heads: 2, depth", "heads: 2, depth"), ("warmup: 2", "warmup: 2, ema: 0.9"))
    whole = build(path, tmp_path / "a")
    assert cli.run(["train", str(whole), "--device", "cpu"]) == 0
    cut = build(path, tmp_path / "b")
    assert cli.run(["train", str(cut), "--device", "cpu"]) == 0
    # as after a kill: only the checkpoint of step 3 is left
    newest = latest_checkpoint(cut / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000006"
    shutil.rmtree(newest)
    (cut / "metrics.jsonl").write_text("")
    assert cli.run(["train", str(cut), "--device", "cpu"]) == 2  # trained already: --resume is asked for
    assert cli.run(["train", str(cut), "--resume", "--device", "cpu"]) == 0
    expected = losses(whole)
    assert losses(cut) == {step: expected[step] for step in (4, 5, 6)}
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = (r / "checkpoints" / "step-00000006" / name for r in (whole, cut))
        assert a.read_bytes() == b.read_bytes()


def test_a_run_is_trained_by_one_process_at_a_time(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build(small(), tmp_path / "runs")
    with alone(run, "training"):
        before = sorted(run.rglob("*"))
        assert cli.run(["train", str(run), "--device", "cpu"]) == 2
        assert capsys.readouterr().err == f"{run}: another process is training it\n"
        assert sorted(run.rglob("*")) == before
    assert cli.run(["train", str(run), "--device", "cpu"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_checkpoint(small: Callable[..., Path], tmp_path: Path, number: signal.Signals) -> None:
    run = build(small(("steps: 6", "steps: 100000")), tmp_path / "runs")
    process = subprocess.Popen(
        [sys.executable, "-m", "sedd_graph", "train", str(run), "--device", "cpu"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "--resume" in out
    assert latest_checkpoint(run / "checkpoints") is not None


def test_a_kill_loses_nothing_that_was_whole(small: Callable[..., Path], tmp_path: Path) -> None:
    path = small(("steps: 6", "steps: 100000"), ("repeat:", "save: {ports: [x], every: 1, rows: 1, chunk: 2}, repeat:"))
    run = build(path, tmp_path / "runs")
    command = [sys.executable, "-m", "sedd_graph", "train", str(run), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.time() + 120
    while latest_checkpoint(run / "checkpoints") is None and time.time() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    step = int(found.name.split("-")[1])
    steps, values = (zarr.open_array(run / "activations.zarr" / "trunk" / "x" / n, mode="r") for n in ("step", "value"))
    assert np.asarray(steps).tolist() == list(range(1, steps.shape[0] + 1))
    assert step <= steps.shape[0] <= values.shape[0]
    assert np.asarray(values)[: steps.shape[0]].any((1, 2, 3)).all()
    resumed = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, text=True)
    assert resumed.stdout is not None
    lines = []
    for line in resumed.stdout:
        lines.append(line)
        if line.startswith(f"step {step + 1}/"):
            break
    resumed.terminate()
    resumed.communicate(timeout=120)
    assert lines[0] == f"resumed from {found.name}\n"


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([], id="small", marks=pytest.mark.slow),
        pytest.param(
            ["objective.op=nelbo", "process.schedule.op=learned"],
            id="learned schedule",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_see_the_losses_of_one(small: Callable[..., Path], tmp_path: Path, changes: list[str]) -> None:
    path = small(("batch: 8", "batch: 8, accumulate: 2"))
    one, two = build(path, tmp_path / "a", *changes), build(path, tmp_path / "b", *changes)
    assert cli.run(["train", str(one), "--device", "cpu"]) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        "-m",
        "sedd_graph",
        "train",
        str(two),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = losses(one)
    assert losses(two) == pytest.approx(expected, rel=1e-5)
    # one process goes on from the third step of two
    shutil.rmtree(two / "checkpoints" / "step-00000006")
    assert cli.run(["train", str(two), "--resume", "--device", "cpu"]) == 0
    assert losses(two) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "nowhere.yaml", "--check"], 2, "nowhere.yaml: no such file"),
        (["train", "nowhere"], 2, "nowhere is not a run folder: there is no blueprint.lock.yaml in it"),
        (
            ["components", "atention"],
            2,
            "unknown op 'atention' (did you mean 'attention'?); `sedd-graph components` lists them",
        ),
        (["import", "sedd", "nowhere.pth"], 2, "nowhere.pth: no such file or folder"),
        (
            ["sample", "nowhere", "--device", "quantum"],
            2,
            "unknown device 'quantum': use cpu, cuda, cuda:0, mps or auto",
        ),
    ],
)
def test_faults_of_the_user(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == code
    captured = capsys.readouterr()
    assert captured.err == message + "\n"
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "override 'train.stepz=3': train.stepz: unknown key (did you mean 'steps'?)"),
        (
            "params.dimm=3",
            "override 'params.dimm=3': unknown param 'dimm' (did you mean 'dim'?); known: dim, heads, depth, tokens",
        ),
        ("train.optimizer.lr=fast", "override 'train.optimizer.lr=fast': train.optimizer"),
        ("steps", "override 'steps': write key=value, such as train.steps=100"),
        ("trian.steps=3", "override 'trian.steps=3': unknown key 'trian' (did you mean 'train'?)"),
        ("train.optimizer.lr=nan", "override 'train.optimizer.lr=nan': nan is not a finite number"),
    ],
)
def test_overrides(small: Callable[..., Path], override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["build", str(small()), override, "--check"]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_divergence_leaves_with_three(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build(small(("warmup: 2", "warmup: 0, clip: null, optimizer: {op: adamw, lr: 1e30}")), tmp_path / "runs")
    assert cli.run(["train", str(run), "--device", "cpu"]) == 3
    assert "the loss became" in capsys.readouterr().err


def test_weights_that_diverged_push_out_no_checkpoint(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = "warmup: 0, clip: null, optimizer: {op: adamw, lr: 1e30}, ema: null"
    path = small(("warmup: 2", changes), ("log_every: 1", "log_every: 100"), ("{every: 3}", "{every: 1, keep: 1}"))
    run = build(path, tmp_path / "runs")
    assert cli.run(["train", str(run), "--device", "cpu"]) == 3
    assert "weights became NaN or infinite" in capsys.readouterr().err
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


def test_help_is_instant_and_brings_no_torch() -> None:
    code = "import sys; sys.argv=['x','--help']\ntry:\n import sedd_graph.cli.main as c; c.main()\nexcept SystemExit: pass\nassert not {'torch','pydantic','networkx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_blueprint_and_graph_layers_bring_no_torch() -> None:
    code = "import sys, sedd_graph.blueprint.load, sedd_graph.blueprint.lock, sedd_graph.graph.expand, sedd_graph.graph.draw, sedd_graph.data.rows, sedd_graph.store.arrays\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_of_build_can_be_called(small: Callable[..., Path]) -> None:
    import sedd_graph.build

    engine = sedd_graph.build(small(), device="cpu", compile="off")
    assert engine.sample(1, 5, seed=0).shape == (1, 5)


def test_results_as_json(small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is one JSON value; the lines for people are on standard error."""
    blueprint, at = str(small()), tmp_path / "at"
    run = cli.run
    assert run(["build", blueprint, "--check", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert (checked["name"], checked["family"]) == ("small", "tokens")
    own = ["--device", "cpu", "--runs", str(tmp_path / "runs")]
    assert run(["build", blueprint, "--json", "--proof", "quick", *own]) == 0
    built = capsys.readouterr()
    certificate = json.loads(built.out)
    assert certificate["measure"]["parameters"] == checked["parameters"]
    assert all(check["holds"] is not False for check in certificate["checks"])
    assert "parameters" in built.err
    assert run(["train", certificate["run"], "--path-to", str(at), "--device", "cpu"]) == 0
    assert at.read_text() == certificate["run"]
    capsys.readouterr()
    assert run(["eval", certificate["run"], "--batches", "2", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_character"] == pytest.approx(found["nats_per_token"] / math.log(2))
    assert "row_nats" not in found


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in ("sedd-graph", *words))
        asked = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _shtab_sedd_graph; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split()

    assert completed("tra") == ["train"]
    assert completed("sample", "--tem") == ["--temperature"]
    assert completed("completion", "z") == ["zsh"]
    every = completed("")
    assert {"init", "build", "train", "sample", "eval", "runs", "compare", "sweep"} <= set(every)


def test_completion_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.run(["completion", "bash"]) == 1
    assert "sedd_graph[completion]" in capsys.readouterr().err
