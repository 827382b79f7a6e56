"""What training costs: `python -m tests.benchmarks.training NAME`."""

PACKAGES = ("dpq-rec", "torch", "torchrec", "fbgemm-gpu-cpu", "numpy")  # whose versions every line of results has
