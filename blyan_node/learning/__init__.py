"""Learning: training jobs, and what judges their results."""
