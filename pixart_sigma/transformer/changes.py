"""What an adapter makes of a transformer's weights."""

from collections.abc import Callable

import torch

# A weight (any float dtype) -> the changed weight of the same shape, dtype and device; the argument is not
# touched, and the arithmetic is float32's.
Change = Callable[[torch.Tensor], torch.Tensor]
