"""Low-rank networks that torch's fully_shard splits over two processes."""

from support.launching import ROOT, launch

WORKER = ROOT / "tests" / "support" / "workers" / "fsdp.py"


def test_a_sharded_training_equals_that_of_one_process_and_its_own_resume(tmp_path):
    assert "sharded as on one process" in launch(2, WORKER, tmp_path).stdout
