"""Opening of untrusted files: regular files only, bounded sizes, names confined to a folder, parsers run with limits."""
