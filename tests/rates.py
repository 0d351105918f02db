"""What forward passes of tests import."""

RATE = 1.0
