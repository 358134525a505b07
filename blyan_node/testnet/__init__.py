"""Local nets of real daemons, for the demo, for tests and for trying things out."""
