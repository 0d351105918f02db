"""One CNN, many devices: a network and its detachable sub-models in one file.

    zoo -> trace -> cuts -> stepdown -> plan -> detachable -> train, save, detach

    >>> net = detachnet.make_detachable(model, cuts=["features.6", "features.23"], input_size=(3, 32, 32))
    >>> net.names
    ('base', 'sub0', 'sub1')
    >>> net(images, which="sub1").shape
    torch.Size([8, 10])

Importing this package imports nothing heavy; each name of `__init__.pyi` is loaded when it is first used.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("detachnet")
