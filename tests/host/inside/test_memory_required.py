"""What our MODEL asks the host for is what it uses; importing the nodes costs little."""

import sys
import weakref
from types import SimpleNamespace

import pack.nodes.loaders
import pack.nodes.memory
import pack.nodes.sampling
import pack.nodes.text  # noqa: F401
import torch
from torch.utils._python_dispatch import TorchDispatchMode

IMPORTED = set(sys.modules)  # by the nodes: what the tests use is imported in them


def test_importing_the_nodes_imports_no_diffusers():
    assert "pack.nodes.sampling" in IMPORTED
    assert "diffusers" not in IMPORTED, "importing the nodes is slow"


def test_layers_that_get_their_weights_on_demand_compute_the_same(monkeypatch):
    """The host makes them without weights where it loads them on demand."""
    import comfy.memory_management
    from pack.nodes.host.transformer import load_model
    from pack.pixart_sigma import DEMO

    plain = load_model(DEMO).model.diffusion_model
    with monkeypatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        lazy = load_model(DEMO).model.diffusion_model
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([500.0]), torch.ones(1, 3, 128)
    assert torch.equal(plain(*inputs), lazy(*inputs))
    assert plain.state_dict().keys() == lazy.state_dict().keys()


class LiveBytes(TorchDispatchMode):
    """Bytes alive on the meta device, which computes nothing: a forward pass is counted at its true width."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(made) and made.is_meta:
                self.add(made.untyped_storage())
        return result

    def add(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, identity, size):
        self.known.discard(identity)
        self.live -= size


def test_the_memory_it_asks_for_is_what_it_uses():
    model, network = published_network()
    for batch, height, width, length in (
        (2, 32, 32, 300),
        (2, 128, 128, 20),
        (4, 61, 97, 120),
        (1, 512, 512, 600),
    ):
        with LiveBytes() as counted:
            latents = torch.empty(batch, 4, height, width, device="meta")
            context = torch.empty(batch, length, 4096, device="meta")
            mask = torch.empty(batch, length, device="meta")
            network(latents, torch.empty(batch, device="meta"), context, mask)
        shapes = {"c_crossattn": [[batch // 2 or 1, length, 4096], [batch // 2 or 1, 1, 4096]]}
        estimate = model.memory_required([batch, 4, height, width], shapes)
        assert 0.9 < estimate / counted.peak < 1.1, (batch, height, width, length)


def published_network():
    """Our MODEL's model and its network of the published width, with two layers and no attention."""
    import comfy.ops
    from pack.nodes.host.network import build_network
    from pack.nodes.host.transformer import SigmaModel, _host_config
    from pack.pixart_sigma.noise_schedule import PUBLISHED
    from pack.pixart_sigma.transformer.config import TransformerConfig

    sizes = TransformerConfig(128, 2.0, 2, 16, 72, 4, 8, 2, 4096, 1152)
    network = build_network(sizes, comfy.ops.disable_weight_init)
    checkpoint = SimpleNamespace(config=sizes, dtype=torch.float32, noise_schedule=PUBLISHED)
    config = _host_config(checkpoint, 10**9, "fp32")
    model = SigmaModel(config, network)
    network.dtype = torch.float32
    processor = type(network.transformer_blocks[0].attn1.processor)
    network.set_attn_processor(processor(lambda query, key, value, mask, options: torch.empty_like(query)))
    return model, network
