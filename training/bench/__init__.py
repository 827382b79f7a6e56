"""Benchmarks of training: `python -m training.bench quality`, `cost` and `throughput`."""
