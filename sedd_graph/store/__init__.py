"""Storage of runs: run folders, files that are written atomically, and zarr arrays. Imports no torch."""
