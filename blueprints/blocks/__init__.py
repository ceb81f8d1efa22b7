"""Blocks for other blueprints to use."""
