"""MNIST: 70,000 handwritten digits, 28 x 28 grey values."""

from app.data.official import idx_set

DATA_SETS = (idx_set("mnist", torchvision="MNIST"),)
