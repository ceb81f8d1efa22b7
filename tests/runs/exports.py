"""Runs with random weights for tests of exports, what they compute, and a check of exports without sedd_graph."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.runs.check import LOCK, check, lock_text
from sedd_graph.runs.open import Run, open_run, read_data

__all__ = ["SMALL", "check_alone", "random_run", "record"]

SMALL = ("params.dim=16", "params.depth=2")
ROWS, LENGTH, STEPS = 3, 16, 20

ALONE = """
import importlib.abc, json, os, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sedd_graph", "sedd_graph_registry", "jaxtyping", "einops"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModel, AutoTokenizer, pipeline
for folder in sys.argv[1:]:
    found, given = {}, torch.load(folder + ".pt")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(input_ids=given["noisy"], **given["inputs"]).logits
    found["logits"] = float((logits - given["logits"]).abs().max())
    steps = {} if given["steps"] is None else {"steps": given["steps"]}
    made = model.generate(length=16, batch_size=2, seed=3, **steps)
    found["tokens"] = torch.equal(made, given["tokens"])
    found["prompted"] = torch.equal(model.generate(given["prompt"], seed=4, **steps), given["prompted"])
    found["samplers"] = {}
    for name, (tokens, own) in given["samplers"].items():
        rows = model.generate(given["prompt"], seed=5, sampler=name, steps=own)
        found["samplers"][name] = torch.equal(rows, tokens)
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        found["ids"] = tokenizer("The cat \\u00e9\\u4e2d", add_special_tokens=False)["input_ids"] == given["ids"]
        found["mask"] = [tokenizer.mask_token_id, model.config.mask_token_id]
        if model.config.mask_token_id is not None:
            fill = pipeline("fill-mask", model=folder, trust_remote_code=True)
            found["filled"] = len(fill("The c" + tokenizer.mask_token + "t sat"))
    print("FOUND", json.dumps(found))
"""


def random_run(folder: Path, blueprint: str | Path, *overrides: str) -> Run:
    """Return an opened run folder of a blueprint, without proof, with random weights (untrained heads are zero)."""
    folder.mkdir(parents=True)
    report = check(blueprint, overrides)
    (folder / LOCK).write_text(lock_text(report))
    if isinstance(report.data, DataConfig) and "data" in report.loaded.sections:
        data = read_data(report, root=folder)
        assert isinstance(data, Dataset)
        (folder / TOKENIZER).write_text(data.tokenizer.to_json())
    fresh = open_run(folder, device="cpu", compile="off").engine.model.state_dict()
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value)
        for name, value in fresh.items()
    }
    save_file({name: value.contiguous() for name, value in drawn.items()}, folder / "model.safetensors")
    return open_run(folder, device="cpu", compile="off")


def prompt_of(run: Run) -> torch.Tensor:
    """Return rows with given tokens, int64 [2, LENGTH], -1 at free positions."""
    process: Any = run.engine.process
    block, kernel = process.objective.block, process.kernel
    holes = torch.arange(LENGTH) >= 8 if block is not None else torch.arange(LENGTH) % 3 > 0
    allowed = torch.where(process.allowed[: kernel.data_tokens])[0]
    drawn = torch.randint(0, len(allowed), (2, LENGTH), generator=torch.Generator().manual_seed(9))
    return torch.where(holes, -1, allowed[drawn])


def record(run: Run, path: Path, samplers: dict[str, Any] | None = None) -> None:
    """Write what a run computes to ``path``: logits, tokens, a filled prompt, tokens of other samplers, token ids."""
    process: Any = run.engine.process
    model, kernel, block = run.engine.model.eval(), process.kernel, process.objective.block
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, kernel.data_tokens, (ROWS, LENGTH), generator=generator)
    noisy = clean
    if kernel.mask is not None:
        noisy = torch.where(torch.rand(clean.shape, generator=generator) < 0.5, kernel.mask, clean)
    sigma = torch.tensor([0.1, 0.7, 2.0])
    every = {"tokens": noisy, "sigma": sigma, "attend": torch.ones_like(noisy, dtype=torch.bool)}
    if block is not None:
        every = block_inputs(noisy, clean, block=block)
    with torch.no_grad():
        (logits,) = model(**{name: every[name] for name in model.input_names}).values()
    steps = None if process.sampler.steps is None else STEPS
    tokens = run.engine.sample(2, LENGTH, seed=3, steps=steps)
    prompt = prompt_of(run)
    given = {
        "noisy": noisy,
        "inputs": {"sigma": sigma} if block is None else {"clean_ids": clean},
        "logits": logits,
        "steps": steps,
        "tokens": tokens,
        "prompt": prompt,
        "prompted": run.engine.sample(2, LENGTH, seed=4, prompt=prompt, steps=steps),
        "samplers": samplers or {},
        "ids": None if run.tokenizer is None else run.tokenizer.encode("The cat \u00e9\u4e2d").tolist(),
    }
    torch.save(given, path)


def check_alone(folders: list[Path], cache: Path) -> list[dict[str, Any]]:
    """Open exports in a process in which sedd_graph cannot be imported, and compare them with ``FOLDER.pt``."""
    import json

    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, *map(str, folders)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
