"""The embedding server: `python -m service --artifact DIR`. In: ids over HTTP and gRPC. Out: vectors.

A lookup over HTTP goes from `http_protocol`, a connection, to `http_lookup`: directly where it is small and has arrived
whole, else by way of `http_app` (FastAPI). Over gRPC it goes through `grpc_calls` and `grpc_api`. Both end in `engine`,
which holds the tables and the limits. `settings` are the options; `supervisor` starts processes, each a `worker`. It
never imports torch.
"""
