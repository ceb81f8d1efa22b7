"""Judges whose law is known: a language model without layers whose next token depends on the last alone, as a folder."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Bigram", "bigram"]

START, END, UNKNOWN = "<s>", "</s>", "<unk>"


class Bigram:
    """``table[i, j]``: the chance of token j after token i."""

    def __init__(self, folder: Path, letters: str, *, seed: int, opens: bool) -> None:
        self.folder, self.opens = folder, opens
        self.ids = {name: i for i, name in enumerate([START, END, UNKNOWN, *dict.fromkeys(letters)])}
        self.table = np.random.default_rng(seed).dirichlet(np.full(len(self.ids), 0.5), len(self.ids)) + 1e-3
        self.table /= self.table.sum(1, keepdims=True)

    def tokens(self, text: str) -> list[int]:
        """Of one document: a token for each letter."""
        return [self.ids.get(letter, self.ids[UNKNOWN]) for letter in text]

    def nats(self, documents: list[str], window: int = 10**9) -> tuple[float, int, int]:
        """By hand: nats of the tokens that count, how many these are, and windows."""
        row: list[tuple[int, bool]] = []
        for number, text in enumerate(documents):
            row += [(self.ids[END], False)] if number else []
            row += [(token, True) for token in self.tokens(text)]
        width = window - self.opens
        total, count, windows = 0.0, 0, 0
        for at in range(0, len(row), width):
            part = row[at : at + width]
            last = self.ids[START] if self.opens else None
            windows += 1
            for token, real in part:
                if last is not None and real:
                    total -= math.log(self.table[last, token])
                    count += 1
                last = token
        return total, count, windows


def bigram(folder: Path, letters: str, *, seed: int = 0, opens: bool = True, window: int = 64) -> Bigram:
    """Write one with the transformers library: config, safetensors, tokenizer. ``opens``: its tokenizer begins a text with
    a token of its own, as Llama's does and GPT-2's does not."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors

    made = Bigram(folder, letters, seed=seed, opens=opens)
    size = len(made.ids)
    width = size + size % 2  # the library takes no odd one
    config: Any = transformers.LlamaConfig(
        vocab_size=size, hidden_size=width, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1,
        max_position_embeddings=window, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        rms_norm_eps=1e-12,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        # the norm makes sqrt(width) times a unit vector of it
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.zero_()[:, :size] = torch.from_numpy(np.log(made.table).T / math.sqrt(width))
    model.save_pretrained(folder)
    inner = tokenizers.Tokenizer(models.WordLevel(made.ids, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    if opens:
        inner.post_processor = processors.TemplateProcessing(single=f"{START} $0", special_tokens=[(START, 0)])
    library_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=START, eos_token=END, unk_token=UNKNOWN
    )
    library_tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 0
    return made
