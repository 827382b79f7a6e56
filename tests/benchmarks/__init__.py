"""Where the project's figures come from: benchmarks of the library, the service, training and quality."""
