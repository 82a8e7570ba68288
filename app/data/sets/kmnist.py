"""Kuzushiji-MNIST: 70,000 characters of old Japanese script, 28 x 28 grey values."""

from app.data.official import idx_set

DATA_SETS = (idx_set("kmnist", torchvision="KMNIST"),)
