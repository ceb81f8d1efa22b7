"""Corpora, tokenizers and sources of points, and the rows that a network is trained on. No torch."""
