"""The gRPC contract: `dpq/v1/embedding.proto`, and what `python -m service.proto.generate` makes of it."""
