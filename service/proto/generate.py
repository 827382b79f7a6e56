"""Stubs from the contract: `python -m service.proto.generate`. In: dpq/v1/*.proto. Out: *_pb2.py, *.pyi, *_pb2_grpc.py.

The stubs are committed, so that serving needs no compiler. Run this after a change of the contract.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
STEM = "dpq/v1/embedding"


def generate(folder: Path) -> list[Path]:
    """The stubs, written below a folder.

    Raises:
        RuntimeError: protoc refuses the contract.
    """
    from grpc_tools import protoc  # a development tool: serving does without

    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"--proto_path={HERE}", *outputs, f"{STEM}.proto"]):
        raise RuntimeError(f"protoc refused {HERE / STEM}.proto")
    stubs = [folder / f"{STEM}{suffix}" for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]
    # protoc imports by the contract's path; the stubs live below service.proto.
    stubs[-1].write_text(stubs[-1].read_text().replace("from dpq.v1 import", "from service.proto.dpq.v1 import"))
    return stubs


if __name__ == "__main__":
    sys.stdout.writelines(f"{path}\n" for path in generate(HERE))
