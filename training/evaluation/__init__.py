"""Metrics of what a run leaves: `ranking` behind `retrieval`, `clicks` with `served` tables, and `code_stats`."""
