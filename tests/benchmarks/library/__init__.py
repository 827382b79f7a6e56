"""How fast the library is beside what it replaces: `python -m tests.benchmarks.library NAME`."""
