"""blyan-node: peer-to-peer inference of one language model by many machines, bound to a block DAG."""

__version__ = "0.1.0"
