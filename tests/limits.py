"""A full disk, for any file that grows beyond a size: the system refuses the write, as it does on one that is full."""

import contextlib
import resource


@contextlib.contextmanager
def files_up_to(num_bytes):
    """No file of this process may grow beyond so many bytes (errno EFBIG; Python ignores the signal)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
