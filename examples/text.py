"""Text for the examples that needs no download: Python's own library, one token a byte."""

from pathlib import Path

import torch

VOCAB_SIZE = 256


class Bytes(torch.utils.data.Dataset):
    """Rows of `length` consecutive bytes, as transformers' causal language models take them."""

    def __init__(self, length: int, folder: Path = Path(torch.__file__).parent / "nn" / "modules"):
        data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: len(data) // length * length].view(
            -1, length
        )
        self.rows = self.rows[torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(0))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}

    def batch(self, number: int, size: int) -> dict[str, torch.Tensor]:
        """Return the batch of this number, `[size, length]`, over and over the same epoch."""
        rows = self.rows[(torch.arange(size) + number * size) % len(self.rows)].long()
        return {"input_ids": rows, "labels": rows}
