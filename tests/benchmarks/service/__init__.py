"""How fast the service is beside what others would use: `python -m tests.benchmarks.service NAME`."""
