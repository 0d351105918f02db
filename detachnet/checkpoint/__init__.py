"""family <-> one file.

fingerprint           the classes, attributes and shapes of a model's layers
header -> content     what a file says about its family; header and tensors <-> bytes, with a checksum
saving, loading       net -> file -> net
"""
