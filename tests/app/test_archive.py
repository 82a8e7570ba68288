"""Files of torch.save: no damage to them is loaded."""

import zipfile

import pytest
import torch
from torch.utils.serialization import config

from app.analysis.checkpoint import CheckpointError, read_checkpoint
from app.training.archive import DamagedFileError, load_verified, verify, verify_foreign

CONTENT = {"step": 7, "weights": torch.arange(300.0), "flags": [True, None, "x"]}


def saved(path, content=CONTENT):
    torch.save(content, path)
    return path


def is_unharmed(content):
    return (
        content.keys() == CONTENT.keys()
        and torch.equal(content["weights"], CONTENT["weights"])
        and (content["step"], content["flags"]) == (7, [True, None, "x"])
    )


def outcome(path):
    """Return "found" or "harmless"; anything else fails the test."""
    try:
        content = load_verified(path)
    except DamagedFileError as error:
        line = str(error)
    else:
        assert is_unharmed(content)
        return "harmless"
    assert path.name in line
    assert "\n" not in line
    return "found"


def test_a_flipped_bit_is_found_or_without_effect(tmp_path):
    path = saved(tmp_path / "state.pt")
    content = path.read_bytes()
    found = 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found += outcome(path) == "found"
    assert found > 500  # all but those in padding and in what nobody reads


@pytest.mark.parametrize("size", [64, 512])
def test_a_block_of_zeros_is_found_or_without_effect(tmp_path, size):
    path = saved(tmp_path / "state.pt")
    content = path.read_bytes()
    for start in range(0, len(content), 64):
        path.write_bytes(content[:start] + bytes(size) + content[start + size :])
        outcome(path)


def test_a_file_that_ends_early_is_found(tmp_path):
    path = saved(tmp_path / "state.pt")
    content = path.read_bytes()
    for end in range(0, len(content), 97):
        path.write_bytes(content[:end])
        assert outcome(path) == "found", end


def test_what_is_whole_but_no_dictionary_of_plain_values_is_named(tmp_path):
    path = saved(tmp_path / "state.pt", [1, 2])
    with pytest.raises(DamagedFileError, match=r"state.pt holds a list, not a dictionary"):
        load_verified(path)
    saved(path, {"path": tmp_path})
    with pytest.raises(DamagedFileError, match=r"state.pt cannot be loaded \(UnpicklingError"):
        load_verified(path)


@pytest.fixture
def without_checksums():
    config.save.compute_crc32 = False
    yield
    config.save.compute_crc32 = True


def test_foreign_files_may_lack_checksums_and_that_is_told_once(
    tmp_path, without_checksums, caplog
):
    path = saved(tmp_path / "model.pt")
    assert not verify(path)
    for _ in range(2):
        verify_foreign(path)
    (line,) = caplog.messages
    assert line == f"{path} was saved without checksums: damage to it would not be seen"
    with pytest.raises(DamagedFileError, match=r"model.pt has no checksums"):
        load_verified(path)


def test_foreign_files_with_checksums_are_held_against_them(tmp_path):
    path = saved(tmp_path / "model.pt")
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("model/data/0").header_offset
    content = bytearray(path.read_bytes())
    content[start + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"model.pt is damaged \(BadZipFile: Bad CRC-32"):
        verify_foreign(path)


def test_other_formats_are_left_to_their_readers(tmp_path):
    path = tmp_path / "old.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    verify_foreign(path)


def test_an_analysis_reads_no_damaged_weights(tmp_path):
    path = saved(tmp_path / "model.pt", {"fc.weight": torch.full((4, 4), 1.5)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4, 4), 1.5).numpy().tobytes())] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.pt is damaged"):
        read_checkpoint(path)
