"""tensors of many graphs -> one file in which the same bytes are stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from detachnet.deploy.half import halved

WEIGHTS = "weights.bin"
"""The one file of weights that all ONNX graphs of a folder refer to."""
INLINE_BYTES = 256
"""Smaller tensors stay in the graph: shapes must be there when it is loaded, and sharing them saves nothing."""
_ALIGNMENT = 64


class SharedWeights:
    """A file of tensors in which the same bytes are stored once.

    Args:
        path: The file, which is made.
        alignment: Tensors begin at multiples of so many bytes.
        half: Store float32 numbers in float16 where that changes none.

    Attributes:
        used: Bytes of the tensors that were asked for since `start` was called, each counted once.
    """

    def __init__(self, path: Path, alignment: int = _ALIGNMENT, half: bool = False) -> None:
        self.path, self._alignment, self._half = path, alignment, half
        self._places: dict[bytes, int] = {}
        self._counted: set[int] = set()
        self.used = 0
        path.touch()

    def start(self) -> None:
        """Count `used` from 0 again, for the next model."""
        self._counted.clear()
        self.used = 0

    def encode(self, numbers: bytes) -> bytes:
        """Float32 numbers as they are stored: in float16, which takes half the bytes, or as they are."""
        return (halved(numbers) if self._half else None) or numbers

    def __contains__(self, content: bytes) -> bool:
        return hashlib.sha256(content).digest() in self._places

    def place(self, content: bytes) -> int:
        """Where some bytes are in the file, in bytes from its start; written if they are new."""
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            with self.path.open("ab") as file:
                file.write(bytes(-file.tell() % self._alignment))
                self._places[key] = file.tell()
                file.write(content)
        place = self._places[key]
        if place not in self._counted:
            self._counted.add(place)
            self.used += len(content)
        return place
