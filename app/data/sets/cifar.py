"""CIFAR-10 and CIFAR-100: 60,000 coloured images, 32 x 32, as pickles."""

from app.data.official import OfficialSet

DATA_SETS = (
    OfficialSet(
        name="cifar10",
        torchvision="CIFAR10",
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_files=("test_batch",),
        train_size=50_000,
        test_size=10_000,
        shape=(3, 32, 32),
        classes=10,
        label_key="labels",
    ),
    OfficialSet(
        name="cifar100",
        torchvision="CIFAR100",
        folder="cifar-100-python",
        train_files=("train",),
        test_files=("test",),
        train_size=50_000,
        test_size=10_000,
        shape=(3, 32, 32),
        classes=100,
        label_key="fine_labels",
    ),
)
