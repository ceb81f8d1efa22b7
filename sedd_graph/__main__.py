"""``python -m sedd_graph`` is ``sedd-graph``."""

from sedd_graph.cli.main import main

if __name__ == "__main__":
    main()
