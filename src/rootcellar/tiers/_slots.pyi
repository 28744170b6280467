# What native/slots.cc offers. ``views`` have more than 240 bytes, and fill their slots but for less than a block.
from collections.abc import Sequence

def read(
    fd: int, at: int, stride: int, views: list[memoryview], seeds: Sequence[int], piece: int, vectors: str = ""
) -> list[int | None]: ...
def write(
    fd: int,
    at: int,
    stride: int,
    views: list[memoryview],
    seeds: Sequence[int],
    piece: int,
    gathers: bool,
    vectors: str = "",
) -> list[int]: ...
def sums(images: list[memoryview], seeds: Sequence[int], into: list[memoryview], vectors: str = "") -> list[int]: ...
