"""``python -m blyan_node`` is ``blyan-node``."""

from blyan_node.cli import main

main()
