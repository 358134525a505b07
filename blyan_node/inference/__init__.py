"""The corridor of prompts: swarm view, placement, route, session (entry side), stage (serving side)."""
