"""Corpora, tokenizers, points, and their rows. No torch."""
