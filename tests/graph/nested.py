"""A blueprint with everything that expansion knows: an include within an include, blocks in blocks, repeats in repeats."""

from pathlib import Path

MAIN = """\
blueprint: 1
name: nested
use: {outer: lib/outer.yaml}
params: {dim: 12, depth: 2, width: 3}
axes: {b: batch, l: length, d: "${params.dim}"}
inputs: {x: float b l d, attend: bool b l}
outputs: {y: join, early: first.y}
blocks:
  twice:
    description: Two halves; its parameter is not the blueprint's of the same name.
    params: {depth: 1, width: null}
    inputs: {y: float b l d, attend: bool b l}
    outputs: {y: half2.y}
    nodes:
      half2: {block: outer.stack, in: {y: half1.y, attend: attend}, with: {width: 1}}
      half1: {block: outer.stack, repeat: "${params.depth}", in: {y: y, attend: attend}, with: {width: "${params.width}"}}
nodes:
  join: {op: add, in: [wide, first.y]}
  first: {block: twice, in: {y: x, attend: attend}, with: {width: "${params.width}"}}
  wide: {block: twice, repeat: "${params.depth}", in: [first.y, attend], with: {depth: 2, width: 1}, save: {ports: [y]}}
"""
OUTER = """\
blueprint: 1
use: {inner: ../inner.yaml}
blocks:
  stack:
    params: {width: 3}
    inputs: {y: float b l q, attend: bool b l}
    outputs: {y: fed}
    nodes:
      norm: {op: rms_norm, in: y, save: {ports: [out], every: 7}}
      mix: {block: inner.mix, in: {x: norm, attend: attend}, with: {width: "${params.width}"}}
      fed: {op: add, in: {xs: [y, mix.a]}}
"""
INNER = """\
blueprint: 1
blocks:
  mix:
    params: {width: null}
    inputs: {x: float b l c, attend: bool b l}
    outputs: {a: attention, half: parts.x0}
    nodes:
      conv: {op: short_conv, in: x, with: {width: "${params.width}"}}
      parts: {op: split, in: conv, with: {sizes: [c//2, c//2]}}
      swapped: {op: concat, in: [parts.x1, parts.x0], out: float b l c}
      attention: {op: attention, in: {x: swapped, attend: attend}, with: {heads: 2}}
"""


def write_nested(folder: Path) -> Path:
    """The three files; returns the first."""
    (folder / "lib").mkdir()
    for name, text in (("nested.yaml", MAIN), ("lib/outer.yaml", OUTER), ("inner.yaml", INNER)):
        (folder / name).write_text(text)
    return folder / "nested.yaml"
