"""The decode in strips: equal to the whole one, in less memory, and in no more work."""

import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pixart_sigma.errors import SigmaError
from pixart_sigma.memory.measure import StorageMeter
from pixart_sigma.vae import feature_maps, stage
from pixart_sigma.vae.feature_maps import Parking, Rows
from pixart_sigma.vae.layers import read_decoder
from pixart_sigma.vae.memory import decode_memory, least_budget, shares, whole_decode_bytes
from pixart_sigma.vae.stage import decode, decode_picture, ways_within
from pixart_sigma.vae.strips import decode_in_strips

LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def make_vae(widths=(32, 64, 64, 96), layers=2) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        **LEVELS, block_out_channels=widths, layers_per_block=layers, latent_channels=4, norm_num_groups=32
    )
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def decoder(vae):
    return read_decoder(vae)


def latent_of(height, width, seed=0):
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(16, 24), (25, 7), (3, 40)])
@pytest.mark.parametrize("leaves_device", [False, True])
def test_it_equals_the_whole_decode(monkeypatch, vae, decoder, size, leaves_device):
    monkeypatch.setattr(feature_maps, "CHUNK", 4096)  # a piece in RAM is several, and a part of one
    latent = latent_of(*size)
    whole = vae.decode(latent).sample
    for budget in (None, 6e6, least_budget(decoder, *size, 4)):
        parking = Parking(latent.device, 1e6)
        parking.leaves_device = leaves_device  # as on a GPU: what has no room comes back as a copy
        picture = decode_in_strips(decoder, latent, budget, parking=parking)
        assert (picture - whole).abs().max() <= 1e-4 * whole.abs().max()
        assert parking.parked == 0 and parking.room == 1e6
        assert leaves_device == (parking.moved > 0)


def test_it_equals_the_whole_decode_in_the_sdxl_vaes_own_width():
    vae = make_vae((128, 256, 512, 512))
    latent = latent_of(16, 12)
    picture = decode_in_strips(read_decoder(vae), latent, 24e6)
    whole = vae.decode(latent).sample
    assert (picture - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_in_half_precision_it_is_as_exact_as_the_whole_decode():
    vae = make_vae()
    latent = latent_of(16, 12)
    exact = vae.decode(latent).sample
    vae.to(torch.bfloat16)
    whole = vae.decode(latent.bfloat16()).sample.float()
    strips = decode_in_strips(read_decoder(vae), latent.bfloat16(), 0.5e6)
    assert (strips - exact).norm() <= 1.1 * (whole - exact).norm()
    # No step of tone between strips: rows differ from the exact ones alike.
    tone = (strips - exact).mean(dim=(0, 1, 3))
    assert tone.std() <= 1.2 * (whole - exact).mean(dim=(0, 1, 3)).std()


def test_it_does_the_same_multiply_adds(vae, decoder):
    latent = latent_of(24, 16)
    with FlopCounterMode(display=False) as whole:
        vae.decode(latent)
    with FlopCounterMode(display=False) as strips:
        decode_in_strips(decoder, latent, 6e6)
    assert strips.get_total_flops() == whole.get_total_flops()


def test_a_mean_far_from_zero_does_not_spoil_the_statistics(vae):
    rows = Rows(Parking(torch.device("cpu"), 0))
    values = torch.randn(1, 32, 40, 16) + 1000
    for strip in values.split((1, 7, 20, 12), dim=2):
        rows.append(strip)
    norm = torch.nn.GroupNorm(8, 32)
    assert (rows.normalise(norm)(values) - norm(values)).abs().max() < 1e-3


class Fused(TorchFunctionMode):
    """Attention as a fused kernel does it, without scores. On the meta device there is none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


class Watched(Parking):
    """Counts the bytes in RAM, which on the meta device are like those on the device."""

    ram = ram_peak = 0

    def _to_ram(self, piece):
        self.ram += piece.nbytes
        self.ram_peak = max(self.ram_peak, self.ram)
        return super()._to_ram(piece)

    def leave(self, piece):
        if id(piece) not in self._stays:
            self.ram -= piece.nbytes
        super().leave(piece)


class DeviceMeter(StorageMeter):
    """The most that was alive but for what waits in RAM."""

    def __init__(self, parking):
        super().__init__(parking.device)
        self.parking, self.device_peak = parking, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = super().__torch_dispatch__(function, types, args, kwargs)
        alive = sum(size for storage, size in self._storages.values() if not storage.expired())
        self.device_peak = max(self.device_peak, alive - self.before - self.parking.ram)
        return output


@pytest.fixture(scope="module")
def published():
    """The SDXL VAE's decoder, shapes alone."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            **LEVELS,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
        )
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "pixels, dtype, budget",
    [
        (512, torch.float32, None),
        (512, torch.float32, 4e8),
        (1024, torch.bfloat16, 2.5e8),
        (1024, torch.bfloat16, 8e8),
        (1024, torch.float32, None),
    ],
)
def test_what_it_needs_is_known_beforehand(published, pixels, dtype, budget):
    decoder = read_decoder(published)
    side = pixels // 8
    latent = torch.empty(1, 4, side, side, device="meta", dtype=dtype)
    published.to(dtype)
    parking = Watched(latent.device, shares(budget)[1])
    meter = DeviceMeter(parking)
    with Fused(), meter:
        decode_in_strips(decoder, latent, budget, parking=parking)
    picture = pixels * pixels * 3 * 4  # it is made in RAM
    expected = decode_memory(decoder, side, side, dtype.itemsize, budget)
    assert meter.device_peak - picture == pytest.approx(expected.device, rel=0.1)
    assert parking.ram_peak <= expected.ram * 1.1
    if budget is not None:
        assert meter.device_peak - picture <= budget


def test_it_needs_a_part_of_what_the_whole_decode_needs(published):
    """At 1024x1024 in fp32: what is at work, and that with all maps that wait."""
    published.to(torch.float32)
    latent = torch.empty(1, 4, 128, 128, device="meta")
    with Fused():
        meter = StorageMeter(latent.device)
        with meter:
            published.decode(latent)
        whole = meter.peak - meter.before
        parking = Watched(latent.device, 0)
        meter = DeviceMeter(parking)
        with meter:
            decode_in_strips(read_decoder(published), latent, parking=parking)
    assert whole == pytest.approx(whole_decode_bytes(read_decoder(published), 128, 128, 4), rel=0.1)
    assert meter.device_peak <= 0.35 * whole
    assert meter.device_peak + parking.ram_peak <= whole


def test_a_budget_that_is_too_small_is_named(decoder):
    with pytest.raises(SigmaError, match="for a row of a picture as wide as this, and the budget is 1 MB"):
        decode_in_strips(decoder, latent_of(1, 512), 1e6)
    with pytest.raises(SigmaError, match="for the attention"):
        decode_in_strips(decoder, latent_of(32, 32), 1.5e6)
    with pytest.raises(SigmaError, match="shape"):
        decode_in_strips(decoder, torch.zeros(2, 4, 8, 8))


def test_it_runs_the_vaes_own_layers(vae, decoder):
    """A host says on them, when it loads the VAE, where their weights are: copies would miss it."""
    layers = [decoder.conv_in, decoder.norm_out, decoder.conv_out]
    for block in decoder.blocks:
        layers += [layer for layer in vars(block).values() if layer is not None]
    own = {id(module) for module in vae.decoder.modules()}
    assert len(layers) > 20 and all(id(layer) in own for layer in layers)


def test_it_can_be_stopped_between_strips(vae, decoder):
    class Stop(BaseException):
        pass

    seen = []

    def on_progress(done, total):
        seen.append((done, total))
        if len(seen) == 20:
            raise Stop

    parking = Parking(torch.device("cpu"), 0)
    with pytest.raises(Stop):
        decode_in_strips(decoder, latent_of(16, 16), 4e6, on_progress, parking)
    assert len(seen) == 20
    assert all(
        module.padding == (1, 1)
        for module in vae.decoder.modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)
    )
    seen.clear()
    seen.append((0, 0))
    decode_in_strips(decoder, latent_of(16, 16), None, lambda done, total: seen.append((done, total)))
    assert all(before[0] < after[0] for before, after in zip(seen, seen[1:], strict=False))
    assert seen[-1][0] == seen[-1][1]


def test_it_goes_over_to_strips_where_the_whole_does_not_fit(vae):
    latents = torch.cat([latent_of(16, 16), latent_of(16, 16, 1)]) * 0.1
    whole = decode(vae, latents, "whole")
    counted = []
    budget = whole_decode_bytes(read_decoder(vae), 16, 16, 4)
    assert (decode(vae, latents, "auto", budget) - whole).abs().max() == 0
    picture = decode(vae, latents, "auto", budget * 0.9, lambda done, total: counted.append((done, total)))
    assert 0 < (picture - whole).abs().max() < 1e-4
    assert counted[-1][0] == counted[-1][1]
    with pytest.raises(SigmaError, match="choose one of auto, whole, strips, tiles"):
        decode(vae, latents, "strip")


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_where_memory_runs_out_it_takes_strips_then_smaller_ones(decoder, monkeypatch, caplog):
    latent = latent_of(16, 16)
    whole = decode_in_strips(decoder, latent)
    ways = ways_within(decoder, (16, 16, 4), 1e9)
    picture, way = decode_picture(decoder, latent, ways, out_of_memory)
    assert (picture - whole).abs().max() < 1e-4 and way.chosen["decode"] == "strips"
    assert "runs again: in strips" in caplog.text

    budgets = []

    def fails(decoder, latent, budget, on_progress):
        budgets.append(budget)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(stage, "decode_in_strips", fails)
    with pytest.raises(SigmaError, match="It needs at least [0-9]+ MB beside the VAE's weights"):
        decode_picture(decoder, latent, ways_within(decoder, (16, 16, 4), 64e6), out_of_memory)
    assert budgets[:3] == [64e6, 32e6, 16e6] and budgets == sorted(set(budgets), reverse=True)


def test_too_little_ram_for_the_maps_that_wait_is_named(published, monkeypatch):
    published.to(torch.bfloat16)
    latent = torch.empty(1, 4, 512, 512, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 4e9})())
    decoder = read_decoder(published)
    with pytest.raises(SigmaError, match=r"keeps [0-9.]+ GB in RAM, and 4.0 GB is free"):
        decode_picture(decoder, latent, ways_within(decoder, (512, 512, 2), 2e9, "strips"), out_of_memory)


def test_another_kind_of_vae_is_left_to_its_own_decode(vae, monkeypatch):
    from diffusers import AutoencoderTiny

    assert read_decoder(AutoencoderTiny()) is None
    latents = latent_of(8, 8)
    whole = decode(vae, latents, "whole")
    monkeypatch.setattr(stage, "read_decoder", lambda vae: None)
    assert torch.equal(decode(vae, latents, "auto", 1.0), whole)
    with pytest.raises(SigmaError, match="cannot be decoded in strips"):
        decode(vae, latents, "strips")


def test_pictures_after_the_first_do_not_try_again_what_did_not_fit(vae, monkeypatch):
    latents = torch.cat([latent_of(8, 8), latent_of(8, 8, 1), latent_of(8, 8, 2)])
    tried = []

    def fails(latent):
        tried.append(latent.shape)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    whole = decode(vae, latents, "whole")
    monkeypatch.setattr(vae, "decode", fails)
    assert (decode(vae, latents, "auto", 1e9) - whole).abs().max() < 1e-4
    assert tried == [(1, 4, 8, 8)]
