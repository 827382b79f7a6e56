"""The embedding server: `python -m service --artifact DIR`. In: ids over HTTP and gRPC. Out: vectors.

Read `settings` (what can be chosen), `engine` (what a request is answered with), `http_app` and `grpc_api` (two ways to
ask for it), `worker` (one serving process) and `supervisor` (the parent that starts them). It never imports torch.
"""
