"""What several files here need."""

import pytest
import torch

from pixart_sigma.transformer.streaming import StreamedTransformer


@pytest.fixture
def parked(monkeypatch):
    """Blocks go through two buffers on the CPU too, as on a GPU but without CUDA's streams."""
    move = StreamedTransformer.to

    def to(self, device):
        if not self._parked:
            self._park(torch.device(device))
        return move(self, device)

    monkeypatch.setattr(StreamedTransformer, "to", to)
