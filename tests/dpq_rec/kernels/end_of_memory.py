"""Arrays behind which no memory can be read: to read a byte beyond one is to crash."""

import ctypes
import mmap

import numpy as np

libc = ctypes.CDLL(None, use_errno=True)
keep = []


def at_the_end(array):
    pages = -(-array.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    guard = ctypes.c_void_p(whole.ctypes.data + pages * mmap.PAGESIZE)
    assert libc.mprotect(guard, mmap.PAGESIZE, 0) == 0
    keep.append((memory, whole))
    placed = whole[pages * mmap.PAGESIZE - array.nbytes : pages * mmap.PAGESIZE].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed
