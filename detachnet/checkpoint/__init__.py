"""family <-> one file.

fingerprint, answer   the classes, attributes and shapes of a model's layers; what it makes of one image
header -> content     what a file says about its family; header and tensors <-> bytes, with a checksum
saving, loading       net -> file -> net
"""
