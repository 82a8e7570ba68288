"""Allocate and free what a step does, twice; print the pages that the kernel gives the second time.

One argument: kept, or given-back as glibc does by itself.
"""

import resource
import sys

from app.runtime.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

import torch


def allocate():
    return [torch.ones(k * 2**19) for k in range(1, 8)]  # up to 14 MB


allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
