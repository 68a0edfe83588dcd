"""Memory that was freed goes back to the system, and is not kept by the C library's allocator.

Left to itself glibc learns from each large block that is freed to serve the next one of that size from its heap, where
a small block behind it keeps all of it resident: a gateway that once read large bodies stays large, and looks as if it
still held them. With a fixed threshold each large body is a mapping of its own, which ends with it; what small blocks
leave is given back by `trim`. Elsewhere than on glibc both do nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

# <malloc.h>
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8

# glibc's own first threshold. Setting it ends its growth, which would reach 32 MiB.
OWN_MAPPING_BYTES: Final = 128 * 1024
# A gateway's threads beside its event loop allocate little.
ARENAS: Final = 2


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def tune() -> None:
    """Have this process give large blocks back as they are freed."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, OWN_MAPPING_BYTES)
        libc.mallopt(M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Give back what is free now. Takes a millisecond or so for each ten megabytes that go back."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
