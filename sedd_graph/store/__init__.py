"""What is kept: run folders, whole files, zarr streams. No torch."""
