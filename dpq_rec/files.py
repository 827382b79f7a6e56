"""Atomic writes of files and folders, and pickles of mapped ones. In: a target. Out: written beside it, then renamed.

Objects whose data is mapped from files are pickled as a path: another process maps the files again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from dpq_rec.errors import ArtifactError

_MOST_SHOWN = 50  # characters of a name, of up to 4 bytes each


@contextlib.contextmanager
def renamed_into(target: Path) -> Iterator[Path]:
    """A folder beside the target, renamed to it when the block succeeds, removed when it does not.

    So are the folders above it that were made for it. An OSError names the target, or the file.
    """
    aside = _beside(target)
    made = [folder for folder in aside.parents if not folder.exists()]
    try:
        with naming(target):
            aside.mkdir(parents=True)
            yield aside
            for folder in [*(p for p in aside.rglob("*") if p.is_dir()), aside]:
                sync_folder(folder)
            aside.rename(target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # one that is not empty stays, the target's parent above all
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """OSErrors of the block name the path, which the system leaves out where a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is None:  # a library's, in its own words
            error.args = (f"{path}: {error}",)
        elif error.filename is None:
            error.filename = str(path)
        raise


def write_file(path: Path, content: str | bytes) -> None:
    """Write bytes, or a text in UTF-8, and wait until they are on disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside the path and rename it: a reader sees the whole of it, or what was there before."""
    aside = _beside(path)
    try:
        with naming(path):
            write_file(aside, content)
            aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _beside(path: Path) -> Path:
    """A name beside a path that nothing else has, short however long the path's is: a name may have 255 bytes."""
    return path.with_name(f".{path.name[:_MOST_SHOWN]}.{secrets.token_hex(4)}.tmp")


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PickledByPath:
    """Base of objects whose data is mapped: one that was opened is pickled as its path; one made in memory, as usual.

    Attributes:
        opened_as: the arguments of `reopen` that give the same; none of what was made in memory.
    """

    opened_as: ClassVar[tuple[str, ...]] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (reopen, self.opened_as) if self.opened_as else super().__reduce_ex__(protocol)


def reopen(path: str, version: str, table: str = "", attribute: str = "") -> Any:
    """The artifact that was at a path before, and no other; or a table of it; or an attribute of that.

    Raises:
        ArtifactError: it is there no more, or another is in its place.
    """
    from dpq_rec.artifact import open_artifact  # it imports this module

    try:
        artifact = open_artifact(path)
    except ArtifactError as error:
        raise type(error)(f"version {version!r}, which was pickled, cannot be opened again: {error}") from error
    if artifact.version != version:
        raise ArtifactError(f"{path}: got version {artifact.version!r}, want {version!r}, which was pickled")
    found: Any = artifact.tables[table] if table else artifact
    return getattr(found, attribute) if attribute else found
