"""Corpora, tokenizers, and rows of tokens with roles. No torch."""
