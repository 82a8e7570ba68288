"""Memory of the CPU that a training frees in one step and needs in the next.

glibc gives what is freed back to the kernel, which hands it out anew page by page, each filled with
zeros. Activations are freed and asked for at every step, so that this takes some hundredths of its
time (docs/speed.md). So what was needed once is kept, in blocks up to the size that glibc lets lie
in its heap.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
_NEVER = -1
_LARGEST_IN_HEAP = 32 * 2**20
"""The most that mallopt takes. Larger blocks, such as whole data sets, are given back."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees.

    What the user has set by environment variables stays as it is. Without glibc nothing happens.
    """
    tuned = os.environ.get("GLIBC_TUNABLES", "")
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in tuned:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
