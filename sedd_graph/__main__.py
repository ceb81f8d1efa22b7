"""Entry point of ``python -m sedd_graph``, equivalent to the command ``sedd-graph``."""

from sedd_graph.cli.main import main

if __name__ == "__main__":
    main()
