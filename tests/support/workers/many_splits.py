"""Run under mpirun: COUNT factorizations of one split layer; MPICH has 2,048 communicators."""

import resource
import sys

import torch

from app.runtime.processes import start_runtime
from oialr.linalg.svd import economy_svd
from oialr.placement.heat_svd import SplitSVD


def main():
    with start_runtime(device="cpu", timeout=60) as runtime:
        split = SplitSVD(runtime.communicator)
        members = range(runtime.process_count)
        matrix = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
        expected = economy_svd(matrix).s
        memory = []
        for number in range(int(sys.argv[1])):
            factors = split.factorize(matrix, members)
            if factors:
                torch.testing.assert_close(factors.s, expected)
            if number in (99, int(sys.argv[1]) - 1):
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        grown = (memory[-1] - memory[0]) / 1024
        assert grown < 50, f"{grown} MiB more"
        if runtime.is_first:
            print(f"{sys.argv[1]} factorizations, {grown:.1f} MiB more")


if __name__ == "__main__":
    main()
