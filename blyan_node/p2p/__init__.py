"""Bytes between peers: the transport seam, the libp2p host behind it, requests, channels and peers."""
