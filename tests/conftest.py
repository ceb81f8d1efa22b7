"""Shared by all tests: a small blueprint as text, and a way to change it."""

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup does
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLUEPRINTS = sorted((ROOT / "blueprints").glob("*.yaml"))
PARITY = Path(__file__).parent / "data" / "parity"

SMALL = """\
blueprint: 1
name: small
params: {dim: 16, heads: 2, depth: 2, tokens: 128}
axes: {b: batch, l: length, d: "${params.dim}", v: "${params.tokens}+1"}
inputs: {tokens: int b l, attend: bool b l}
outputs: {log_x0: head}
blocks:
  layer:
    params: {heads: 2}
    inputs: {x: float b l d, attend: bool b l}
    outputs: {x: fed}
    nodes:
      norm: {op: rms_norm, in: x}
      attention: {op: attention, in: {x: norm, attend: attend}, with: {heads: "${params.heads}"}}
      attended: {op: add, in: [x, attention]}
      mlp: {op: feed_forward, in: attended, with: {hidden: 2*d}}
      fed: {op: add, in: [attended, mlp]}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  trunk: {block: layer, repeat: "${params.depth}", in: {x: embed, attend: attend}, with: {heads: "${params.heads}"}}
  head: {op: x0_head, in: {x: trunk, tokens: tokens}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: masked_count}
sample: {op: ancestral, steps: 8}
data: {tokenizer: {op: characters, size: 128}, length: 32}
train: {steps: 6, batch: 8, warmup: 2, compile: "off", log_every: 1, evaluate: null, checkpoint: {every: 3}}
"""


def pytest_sessionstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave modules and collected tests, which stay to the end, out of each later garbage collection."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """``small(('old', 'new'), ...)``: the small blueprint with texts replaced, as a file."""

    def write(*changes: tuple[str, str], name: str = "small.yaml") -> Path:
        text = SMALL
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
