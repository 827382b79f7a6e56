"""Benchmarks of training: `python -m training.bench.throughput`."""
