"""A store of artifacts. In: an artifact. Out: a folder of published versions; its file CURRENT names the one in use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dpq_rec.artifact import Artifact, verify
from dpq_rec.errors import ConfigError
from dpq_rec.files import renamed_into, replace_file
from dpq_rec.manifest import CURRENT, MANIFEST, read_current


def publish(artifact: str | os.PathLike[str], store: str | os.PathLike[str]) -> Path:
    """Verify an artifact, copy it into a store under its version and make it the current one.

    A version that the store has already is made current again: to roll back, or to end a publish that was cut off.

    Raises:
        ArtifactError: as `verify`.
        ConfigError: the store's CURRENT is a folder.
        FileExistsError: the store has another artifact of that version, or this one is the current one already.
    """
    if (Path(store) / CURRENT).is_dir():
        raise ConfigError(f"{Path(store) / CURRENT}: got a folder, want a file that names a version; move it elsewhere")
    verified = verify(artifact)
    target = Path(store) / verified.version
    if target.exists():
        _check_published(verified, target)
    else:
        _copy_into(target, verified)
    replace_file(Path(store) / CURRENT, f"{verified.version}\n")
    return target


def _check_published(verified: Artifact, target: Path) -> None:
    if (target / MANIFEST).read_bytes() != (verified.path / MANIFEST).read_bytes():
        raise FileExistsError(f"{target} holds another artifact of that version; give this one a version of its own")
    if target.with_name(CURRENT).is_file() and read_current(target.parent) == verified.version:
        raise FileExistsError(f"{target} is the current version already; a version is published once")
    verify(target)


def _copy_into(target: Path, verified: Artifact) -> None:
    with renamed_into(target) as folder:
        files = dict.fromkeys(table.manifest.file for table in verified.tables.values())  # each once
        for file in [*files, MANIFEST]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(verified.path / file, folder / file)
            descriptor = os.open(folder / file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        verify(folder)
