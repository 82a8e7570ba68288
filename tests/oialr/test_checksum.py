"""The checksum that tells whether processes hold the same bits."""

import pytest
import torch

from oialr.linalg.checksum import checksum

CPU = torch.device("cpu")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.complex128]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 4, 3)])
def test_every_bit_counts(dtype, shape):
    tensor = random(*shape, dtype=dtype)
    expected = checksum([tensor], CPU)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    size = 8 * parts.element_size()
    for position in range(parts.numel()):
        for bit in (0, 1, size // 2, size - 1):
            changed = tensor.clone()
            bits = torch.view_as_real(changed) if tensor.is_complex() else changed
            bits = bits.view(integer[parts.element_size()]).view(-1)
            bits[position] ^= -(2**bit) if bit == size - 1 and size > 8 else 2**bit
            assert checksum([changed], CPU) != expected, (position, bit)


def test_order_of_columns_rows_and_tensors_counts():
    tensor = random(6, 5)
    expected = checksum([tensor], CPU)
    assert checksum([tensor[:, [1, 0, 2, 3, 4]]], CPU) != expected
    assert checksum([tensor[[1, 0, 2, 3, 4, 5]]], CPU) != expected
    a, b = tensor[:3], tensor[3:]
    assert checksum([a, b], CPU) != checksum([b, a], CPU)


def test_layout_does_not_count():
    tensor = random(2, 4, 3, 5)
    channels_last = tensor.contiguous(memory_format=torch.channels_last)
    assert checksum([tensor], CPU) == checksum([channels_last], CPU)
    assert checksum([tensor[0, 0]], CPU) == checksum([tensor[0, 0].T.contiguous().T], CPU)
    assert checksum([torch.empty(0, 3)], CPU) == 0
