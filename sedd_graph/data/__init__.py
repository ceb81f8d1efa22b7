"""Training data: corpora, tokenizers, sources of real-valued points, and rows cut from them. Imports no torch."""
