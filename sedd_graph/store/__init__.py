"""Files of runs: run folders, files written atomically, zarr arrays. No torch."""
