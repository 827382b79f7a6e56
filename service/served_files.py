"""Files that are served, and whether they are still what was opened. In: an opened store. Out: damaged tables, and how.

An artifact never changes once published: it is mapped, not read. A file that is truncated ends every process that
reads beyond its new end (SIGBUS), and one that is overwritten in place gives other vectors without a word. Neither can
be prevented from here, but both can be seen in the file's size and time of change, and the table be refused. A file
that was replaced or removed is no damage: what was mapped is still there.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from dpq_rec import EmbeddingStore
from dpq_rec.tensorfile import sha256_of

logger = logging.getLogger("service.served_files")
_FIX = "publish a whole artifact under a new version and start the server anew; never write to one that is served"


class FileState(NamedTuple):
    """What tells one state of a file from another."""

    device: int
    inode: int
    num_bytes: int
    written_ns: int
    changed_ns: int  # which nobody can set back, as programs that copy do with the other


class ServedFiles:
    """The files of an opened store, as they are now."""

    def __init__(self, store: EmbeddingStore) -> None:
        folder = store.artifact.path
        self._tables = {name: (folder / table.manifest.file, table.manifest) for name, table in store.tables.items()}
        self._states = {path: _state_of(path) for path, _ in self._tables.values()}
        self._damage: dict[str, str] = {}

    def damage(self) -> dict[str, str]:
        """Tables whose files are no longer what was opened: name -> what happened, and what to do.

        A file whose time of change differs is read whole, to compare its digest. What is damaged stays so.
        """
        for name, (path, manifest) in self._tables.items():
            state, before = _state_of(path), self._states[path]
            is_same_file = state is not None and before is not None and state[:2] == before[:2]
            if state is None or not is_same_file or state == before or name in self._damage:
                continue
            if state.num_bytes < manifest.bytes:
                what = f"was truncated from {manifest.bytes} to {state.num_bytes} bytes"
            else:
                try:
                    is_whole = sha256_of(path) == manifest.sha256
                except OSError:  # it was removed just now, or no descriptor is left: the next look will tell
                    continue
                if is_whole:  # touched, or its permissions changed
                    self._states[path] = state
                    continue
                what = "was overwritten in place"
            self._damage[name] = f"table {name!r}: {path} {what} while it was served; {_FIX}"
        return dict(self._damage)


def _state_of(path: Path) -> FileState | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def watch_descriptors(were_used_up: bool) -> bool:
    """Whether this process has no file descriptors left, which is logged once: new connections are then closed."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if not were_used_up:
            logger.error("%s: connections are refused; raise `ulimit -n`, or have callers keep fewer open", error)
        return True
    if were_used_up:
        logger.warning("there are file descriptors again")
    return False
