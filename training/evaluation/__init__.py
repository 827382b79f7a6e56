"""Metrics of the artifact of a run: `ranking` behind `retrieval`, `clicks`, `code_stats`; `served` reads its tables."""
