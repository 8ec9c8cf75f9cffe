"""Files that leave a mark if somebody unpickles them."""

import os
import pickle
from pathlib import Path

import torch


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def payloads(mark: Path) -> list[bytes]:
    """Returns what makes the folder `mark` when it is unpickled: a pickle, one in text, and one of torch.save."""
    file = mark.with_name("payload.pt")
    torch.save(Evil(mark), file)
    return [pickle.dumps(Evil(mark)), pickle.dumps(Evil(mark), 0), file.read_bytes()]
