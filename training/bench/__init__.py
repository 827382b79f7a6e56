"""Benchmarks of training: `python -m training.bench.throughput` and `python -m training.bench.cost`."""
