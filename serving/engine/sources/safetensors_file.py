"""Writes bfloat16 safetensors without torch, one tensor in memory at a time.

The format (safetensors README): the header's length in 8 little-endian bytes, a JSON header, then the
tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BF16_BYTES = 2


@dataclass(frozen=True)
class Tensor:
    """One tensor to write; `values` gives it in float32 when its turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], NDArray[np.float32]]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape)) * BF16_BYTES


def write(path: Path, tensors: Sequence[Tensor], written: Callable[[int, int], None]) -> None:
    """Write `tensors`; `written(done_bytes, total_bytes)` is called after each one."""
    total = sum(tensor.size_bytes for tensor in tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The library's own writer pads so that tensors start 8-byte aligned; readers map them.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        done = 0
        for tensor in tensors:
            values = tensor.values()
            if values.shape != tensor.shape:
                raise ValueError(f"tensor {tensor.name} has shape {values.shape}, {tensor.shape} expected")
            file.write(bfloat16(values).data)
            done += tensor.size_bytes
            written(done, total)


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of bfloat16, rounded to nearest even as torch does. Weights are finite: NaN is not handled."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
