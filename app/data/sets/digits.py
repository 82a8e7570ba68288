"""The handwritten digits that scikit-learn ships: 1,797 images of 8 x 8 grey values."""

from typing import TYPE_CHECKING

import numpy as np

from app.compatibility import import_scikit_learn
from app.data.data_set import IMAGE_KEYS, LoadedSet

if TYPE_CHECKING:
    from app.config.data_section import DataSection
    from app.data.datasets import ImageSet

TEST, VALIDATION = 360, 180
"""Sizes of the parts; the other 1,257 are the training part."""


class Digits(LoadedSet):
    """They have no official parts: test and validation part are cut off by a fixed seed."""

    def load(self, data: "DataSection") -> "ImageSet":
        """Read the digits."""
        from app.data.datasets import Images, ImageSet
        from app.data.splitting import limit_training_part, split_off

        import_scikit_learn()
        from sklearn.datasets import load_digits

        digits = load_digits()
        whole = Images(
            images=digits.images[:, None].astype(np.uint8),  # 0 to 16, exactly
            labels=digits.target.astype(np.int64),
        )
        rest, test = split_off(whole.labels, TEST)
        train, validation = split_off(whole.labels[rest], VALIDATION)
        return ImageSet(
            train=whole.select(limit_training_part(rest[train], data)),
            validation=whole.select(rest[validation]),
            test=whole.select(test),
            classes=10,
        )


DATA_SETS = (Digits(name="digits", in_root=False, keys=IMAGE_KEYS - {"validation_fraction"}),)
