"""The command: `python -m service --artifact DIR`. See `--help`, or README.md beside this file."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

_PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "orjson", "grpc", "grpc_health", "grpc_reflection",
             "prometheus_client", "swagger_ui_bundle", "tyro")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; the exit code (see `--help`)."""
    # No product of matrices is made here: the threads that would make them only cost memory, and stand in a fork's way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from dpq_rec import ArtifactError, ConfigError, EmbeddingStore, MissingDependencyError
    from service.settings import read_settings

    try:
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(", ".join(missing), "serve")
        settings = read_settings(sys.argv[1:] if argv is None else argv, os.environ)
        log_format = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
        logging.basicConfig(level=settings.log_level.upper(), format=log_format)
        store = EmbeddingStore.open(settings.artifact)
        from service import supervisor

        return supervisor.run(store, settings)
    except (ArtifactError, ConfigError, MissingDependencyError, OSError) as error:
        print(f"service: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
