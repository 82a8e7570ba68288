"""Run under mpirun: Heat's split SVD against one process's, in many shapes and groups."""

import scipy.linalg
import torch

from app.runtime.processes import start_runtime
from oialr.linalg.svd import economy_svd
from oialr.placement.heat_svd import SplitSVD

SHAPES = [(40, 5), (5, 40), (41, 5), (43, 7), (12, 6), (6, 6), (3, 1), (1, 9), (1, 1), (130, 64)]


def matrices(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    thin = [torch.randn(side, 2, generator=generator, dtype=torch.float64) for side in shape]
    yield (thin[0] @ thin[1].T).to(dtype)
    yield torch.zeros(shape, dtype=dtype)
    scaled = torch.randn(shape, generator=generator, dtype=torch.float64)
    yield (scaled * torch.logspace(0, -6, shape[1], dtype=torch.float64)).to(dtype)


def check(split, matrix, members, index):
    factors = split.factorize(matrix, members)
    if index != members[0]:
        assert factors is None
        return
    U, s, Vh = factors
    expected = economy_svd(matrix)
    assert [f.shape for f in factors] == [f.shape for f in expected]
    assert [f.dtype for f in factors] == [f.dtype for f in expected]
    assert all(f.is_contiguous() for f in factors)
    tolerance = 1e-12 if matrix.dtype == torch.float64 else 1e-5
    identity = torch.eye(len(s), dtype=torch.float64)
    for vectors in (U.double(), Vh.double().T):
        assert torch.linalg.matrix_norm(vectors.T @ vectors - identity, 2) < tolerance
    scale = max(1.0, float(expected.s[0]))
    torch.testing.assert_close(s, expected.s, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(
        (U * s @ Vh).to(matrix.dtype), matrix, rtol=0, atol=10 * tolerance * scale
    )


def check_shards(split, processes):
    """A given, uneven sharding is not copied, and gives rows of the polar factor."""
    matrix = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = [30 - 6 * (processes.count - 1)] + [6] * (processes.count - 1)
    shard = matrix.split(sizes)[processes.index]
    before = shard.clone()
    part = split.factorize_shard(shard, range(processes.count))
    assert torch.equal(shard, before)
    parts = processes.gather(part)
    assert all(torch.equal(p.s, part.s) and torch.equal(p.Vh, part.Vh) for p in parts)
    U, _, Vh = economy_svd(matrix)
    polar = torch.cat([p.U @ p.Vh for p in parts])
    torch.testing.assert_close(polar, U @ Vh, rtol=0, atol=1e-12)


def main():
    with start_runtime(device="cpu", timeout=60) as runtime:
        processes, index = runtime.processes, runtime.process_index
        random_state = torch.get_rng_state()
        split = SplitSVD(runtime.communicator)
        assert torch.equal(torch.get_rng_state(), random_state), "heat has seeded torch"
        everyone = tuple(range(processes.count))
        groups = [everyone, everyone[::-1], everyone[:1], everyone[-2:]]
        for members in groups:
            for shape in SHAPES:
                for dtype in (torch.float32, torch.float64):
                    for matrix in matrices(shape, dtype):
                        check(split, matrix, members, index)
        check(split, torch.ones(9, 2, dtype=torch.bfloat16), everyone, index)
        # In float32 alone Heat's Q would be orthonormal to 3e-5.
        check(split, torch.full((1024, 256), 0.1), everyone, index)
        # Two groups at the same time, each with other matrices and another number of them.
        half = processes.count // 2
        mine = everyone[:half] if index < half else everyone[half:]
        for number in range(3 + (index < half)):
            for matrix in matrices((40 + number, 5), torch.float32):
                check(split, matrix, mine, index)
        check_shards(split, processes)
        # A matrix that does not converge is known to all; the others go on.
        split.factorize(torch.ones(40, 2), everyone)
        svd = torch.linalg.svd
        if index == 0:
            torch.linalg.svd = fail
            scipy.linalg.svd = fail
        try:
            split.factorize(torch.ones(40, 2), everyone)
            assert index != 0
        except torch.linalg.LinAlgError:
            assert index == 0
        torch.linalg.svd = svd
        known = dict(split._groups)
        for members in groups:
            check(split, torch.ones(40, 5), members, index)
        assert split._groups == known, "a group was made twice"
        split.close()
        if runtime.is_first:
            print("split as whole")


def fail(*_, **__):
    raise torch.linalg.LinAlgError("did not converge")


if __name__ == "__main__":
    main()
