"""HTTP of a node: OpenAI's routes, the network's own, authentication and limits."""
