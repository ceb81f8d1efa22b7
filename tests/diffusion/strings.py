"""Strings and batches of them, from lists."""

import torch

from sedd_graph.diffusion.batch import Batch
from sedd_graph.diffusion.strings.strings import Strings


def strings(rows: list[list[int]], start: int) -> Strings:
    width = 1 + max(map(len, rows))
    tokens = torch.tensor([[start, *row, *[start] * (width - 1 - len(row))] for row in rows])
    return Strings(tokens, torch.arange(width) <= torch.tensor([len(r) for r in rows])[:, None])


def batch(rows: list[list[int]], spared: int = 0) -> Batch:
    padded = strings(rows, 0)
    tokens, real = padded.tokens[:, 1:], padded.attend[:, 1:]
    free = real & (torch.arange(tokens.shape[1]) >= spared)
    return Batch(tokens, real, free, free)
