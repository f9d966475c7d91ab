import platform

import pytest
import torch

from pixart_sigma.devices import half_precision, pick_device, pick_dtype
from pixart_sigma.errors import SigmaError


def test_a_device_that_cannot_be_used_is_named():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("toaster", "cuda:99", None):
        with pytest.raises(SigmaError, match="cannot be used here"):
            pick_device(name)


@pytest.mark.parametrize("version, expected", [("14.2", torch.bfloat16), ("13.6", torch.float16)])
def test_half_precision_is_bfloat16_where_it_is_computed(monkeypatch, version, expected):
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), ""))
    assert half_precision(torch.device("mps")) == pick_dtype(torch.device("mps")) == expected
    assert half_precision(torch.device("cpu")) == torch.bfloat16
    assert pick_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: version == "14.2")
    assert half_precision(torch.device("cuda")) == pick_dtype(torch.device("cuda")) == expected
