"""What lies in mapped files, sent elsewhere. In: what was opened. Out, where it is unpickled: the same, mapped anew."""

from __future__ import annotations

from typing import Any, ClassVar

from dpq_rec.errors import ArtifactError


class Reopened:
    """What another process that it is sent to, or a copy, opens again. What lies in no file is pickled as it is.

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
