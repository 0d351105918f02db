"""Data that ships inside the package: `cifar10-mini`, made by `scripts/make_cifar10_mini.py`."""
