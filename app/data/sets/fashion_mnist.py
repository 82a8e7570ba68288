"""Fashion-MNIST: 70,000 pieces of clothing, 28 x 28 grey values."""

from app.data.official import idx_set

DATA_SETS = (idx_set("fashion_mnist", torchvision="FashionMNIST"),)
