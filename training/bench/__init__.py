"""Benchmarks of training: `python -m training.bench quality`, `cost` and `throughput`."""

PACKAGES = ("dpq-rec", "torch", "torchrec", "fbgemm-gpu-cpu", "numpy")  # whose versions every line of results has
