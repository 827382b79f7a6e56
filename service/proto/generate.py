"""Stubs from the contract: `python -m service.proto.generate`. In: dpq/v1/*.proto. Out: *_pb2.py, *.pyi, *_pb2_grpc.py.

The stubs are committed, so that serving needs no compiler. Run this after a change of the contract.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

HERE = Path(__file__).parent
PROTO = "dpq/v1/embedding.proto"
_PACKAGE = "service.proto."


def generate(folder: Path) -> list[Path]:
    """The stubs, written below a folder.

    Raises:
        RuntimeError: protoc refuses the contract.
    """
    from grpc_tools import protoc  # a development tool: serving does without

    includes = [f"--proto_path={HERE}", f"--proto_path={resources.files('grpc_tools') / '_proto'}"]
    outputs = [f"--python_out={folder}", f"--pyi_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main(["protoc", *includes, *outputs, PROTO]):
        raise RuntimeError(f"protoc refused {HERE / PROTO}")
    stem = folder / PROTO.removesuffix(".proto")
    grpc_stub = stem.with_name(stem.name + "_pb2_grpc.py")
    # protoc imports by the contract's path; the stubs live below service.proto.
    grpc_stub.write_text(grpc_stub.read_text().replace("from dpq.v1 import", f"from {_PACKAGE}dpq.v1 import"))
    return [stem.with_name(stem.name + "_pb2.py"), stem.with_name(stem.name + "_pb2.pyi"), grpc_stub]


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in generate(HERE))
