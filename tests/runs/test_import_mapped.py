"""``sedd-graph import map``: any weights onto a blueprint by a table of names, and lists of what does not match."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sedd_graph.cli import main as cli
from sedd_graph.errors import UserError
from sedd_graph.runs.weight_names import NameMap, Rows, mapped

SMALL = ["params.dim=16", "params.depth=2", "params.tokens=20", "data.tokenizer.size=20"]


def theirs(path: Path) -> dict[str, torch.Tensor]:
    """Write weights of ``learn`` under other names: q, k and v apart, a head that is transposed, and a buffer."""
    from sedd_graph.runs.open import build

    torch.manual_seed(0)
    state = {k: torch.randn_like(v) for k, v in build("learn", SMALL, device="cpu").model.state_dict().items()}
    found = {"wte": state["embed.embed.weight"], "ln_f": state["norm.weight"], "freqs": torch.ones(2)}
    found["lm_head"] = state["head.weight"].T.contiguous()
    for i in range(2):
        q, k, v = state[f"trunk.{i}.attention.qkv.weight"].chunk(3)
        norms = torch.cat([state[f"trunk.{i}.norm.weight"], state[f"trunk.{i}.norm2.weight"]])
        found |= {
            f"h.{i}.q": q.contiguous(),
            f"h.{i}.k": k.contiguous(),
            f"h.{i}.v": v.contiguous(),
            f"h.{i}.norms": norms,
        }
        for ours in ("attention.out", "mlp.up", "mlp.down", "conv", "conv2"):
            found[f"h.{i}.{ours}"] = state[f"trunk.{i}.{ours}.weight"]
        for ours in ("q_scale", "k_scale"):
            found[f"h.{i}.{ours}"] = state[f"trunk.{i}.attention.{ours}"]
    save_file({k: v.contiguous() for k, v in found.items()}, path)
    return state


TABLE = """
weights:
  embed.embed.weight: wte
  norm.weight: ln_f
  head.weight: lm_head
  "trunk.{i}.attention.qkv.weight": ["h.{i}.q", "h.{i}.k", "h.{i}.v"]
  "trunk.{i}.attention.out.weight": "h.{i}.attention.out"
  "trunk.{i}.attention.q_scale": "h.{i}.q_scale"
  "trunk.{i}.attention.k_scale": "h.{i}.k_scale"
  "trunk.{i}.norm.weight": {name: "h.{i}.norms", part: 0, of: 2}
  "trunk.{i}.norm2.weight": {name: "h.{i}.norms", part: 1, of: 2}
  "trunk.{i}.mlp.up.weight": "h.{i}.mlp.up"
  "trunk.{i}.mlp.down.weight": "h.{i}.mlp.down"
  "trunk.{i}.conv.weight": "h.{i}.conv"
  "trunk.{i}.conv2.weight": "h.{i}.conv2"
ignore: [freqs]
transpose: [head.weight]
"""


def test_weights_of_other_names_are_those_of_the_model(tmp_path: Path) -> None:
    state = theirs(tmp_path / "w.safetensors")
    (tmp_path / "map.yaml").write_text(TABLE)
    command = [
        "import",
        "map",
        str(tmp_path / "w.safetensors"),
        "--blueprint",
        "learn",
        "--map",
        str(tmp_path / "map.yaml"),
    ]
    assert cli.run([*command, "--set", *SMALL, "-o", str(tmp_path / "run")]) == 0
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_what_does_not_match_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs(tmp_path / "w.safetensors")
    text = TABLE.replace("norm.weight: ln_f", "norm.weight: ln").replace("ignore: [freqs]", "ignore: []")
    (tmp_path / "map.yaml").write_text(text.replace('  "trunk.{i}.conv.weight": "h.{i}.conv"\n', ""))
    command = [
        "import",
        "map",
        str(tmp_path / "w.safetensors"),
        "--blueprint",
        "learn",
        "--map",
        str(tmp_path / "map.yaml"),
    ]
    assert cli.run([*command, "--set", *SMALL, "-o", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "norm.weight: the file has no 'ln'" in message
    assert "trunk.1.conv.weight [16, 1, 7] has no weights" in message
    assert "freqs [2] of the file is neither used nor ignored" in message
    assert "ln_f [16] of the file is neither used nor ignored" in message
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_exist_and_unknown_names_are_refused() -> None:
    tensors = {"a": torch.zeros(6, 2)}
    with pytest.raises(UserError, match="has no parts 5 to 7 of 6"):
        mapped(NameMap(weights={"x": Rows(name="a", part=5, parts=2, of=6)}), tensors, {"x": [2, 2]}, Path("w"))
    with pytest.raises(UserError, match="y is no weight of the model"):
        mapped(NameMap(weights={"y": "a"}), tensors, {}, Path("w"))


def test_a_table_of_names_is_needed_with_map_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["import", "map", str(tmp_path)]) == 2
    assert "'map' needs --blueprint and --map" in capsys.readouterr().err
    (tmp_path / "map.yaml").write_text("weights: [1]\n")
    with pytest.raises(UserError, match=r"map\.yaml: weights: "):
        NameMap.read(tmp_path / "map.yaml")
