"""The corridor of blocks and blobs: what travels between p2p and chain."""
