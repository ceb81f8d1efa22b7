"""Opening of untrusted files.

Only regular files of bounded size are opened. File names in a blueprint must lie in the project's folder (the
blueprint's) unless the user allows others. Parsers run in a child process with limits on memory and time.
"""
