"""Files and folders that appear whole or not at all. In: a target. Out: what was written beside it, renamed to it."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path


class renamed_into:  # noqa: N801 - reads as the statement it is: `with renamed_into(target) as folder`
    """A folder beside the target, renamed to it when the block succeeds, removed when it does not."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for folder in [*(p for p in self.folder.rglob("*") if p.is_dir()), self.folder]:
                    sync_folder(folder)
                self.folder.rename(self.target)
                sync_folder(self.target.parent)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text, in UTF-8, and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a text beside the path and rename it: a reader sees the whole of it, or what was there before."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_file(aside, text)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
