"""The shipped blueprints, as package data."""
