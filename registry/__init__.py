"""The built-in components, one theme a file. They come in through the same entry points as anybody else's."""
