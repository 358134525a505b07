"""Blocks, rules, DAG, store, blobs, keys: pure where it can be, no trio, no I/O but the store."""
