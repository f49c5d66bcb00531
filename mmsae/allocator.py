"""Memory of a command's process: large buffers are used again instead of going back to the system after each use.

By default glibc maps every buffer above a limit (32 MB at most) anew and unmaps it when it is freed, and a process pays
a page fault for each 4 KB of it again and again: for a host's layer over a batch, for pre-codes, for the temporaries of
an optimiser step. That can be more than half of the CPU time (docs/how-to/jobs.md). Nothing here changes a number that
is computed.
"""

from __future__ import annotations

import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h

OWN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Variables by which glibc is told otherwise; ``GLIBC_TUNABLES`` is one more."""


def keep_memory() -> bool:
    """Have this process keep the memory that it frees: for the beginning of a command, never of a library.

    Only glibc is asked, and only where its own variables do not say what to do. Processes that are forked inherit it,
    others have to call it again.

    Returns:
        Whether the allocator was set.
    """
    if any(name in os.environ for name in OWN) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt if libc.gnu_get_libc_version else None
    except (OSError, TypeError, AttributeError):  # another C library, or another system
        return False
    # all from the heap, whose top is never given back: -1 is the largest number
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def free_memory() -> int:
    """Bytes of the machine's memory that can be had without swapping; all of it where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            said = dict(line.split(":", 1) for line in file)
        return int(said["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
