"""The shipped components, one theme per file, registered through the same entry points as third-party components."""
