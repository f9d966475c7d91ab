import gc
import weakref

import pytest
import torch

from pixart_sigma.errors import SigmaError
from pixart_sigma.memory.measure import live_bytes, weight_bytes
from pixart_sigma.memory.stages import Stages

MEGABYTE = 1_000_000


def model(megabytes: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(megabytes * MEGABYTE // 4), requires_grad=False)
    return module


class Loader:
    """Loads a model and remembers its weight by weakref, and how often it was asked."""

    def __init__(self, megabytes: int = 8):
        self.megabytes, self.count, self.weight = megabytes, 0, lambda: None

    def __call__(self):
        self.count += 1
        loaded = model(self.megabytes)
        self.weight = weakref.ref(loaded.weight)
        return loaded


def test_free_drops_the_weights_before_run_returns():
    loader = Loader()
    result = Stages(release="free").run("stage", loader, lambda loaded: loaded.weight.sum().item())
    assert result == 0
    assert loader.weight() is None


@pytest.mark.parametrize("release", ["keep", "offload"])
def test_a_kept_model_is_loaded_once(release):
    loader, stages = Loader(), Stages(release=release)
    for _ in range(3):
        stages.run("stage", loader, lambda loaded: None)
    assert loader.count == 1
    assert loader.weight() is not None


def test_a_freed_model_is_loaded_again():
    loader, stages = Loader(), Stages(release="free")
    for _ in range(2):
        stages.run("stage", loader, lambda loaded: None)
    assert loader.count == 2


def test_what_cannot_be_moved_is_dropped_in_place_of_offloaded():
    """As T5 in 8 or 4 bit: `to` would leave its weights on the device."""
    loader, stages = Loader(), Stages("meta", "offload")  # a device on which nothing is

    def load():
        loaded = loader()
        loaded.is_movable = False
        return loaded

    for _ in range(2):
        stages.run("stage", load, lambda loaded: None)
        assert loader.weight() is None
    assert loader.count == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_that_is_kept_does_not_keep_the_weights(error):
    loader = Loader()

    def fail(loaded):
        inner = loaded.weight
        raise error(f"with {len(inner)} weights at hand")

    with pytest.raises(error) as kept:
        Stages(release="free").run("stage", loader, fail)
    gc.collect()
    assert kept.value is not None
    assert loader.weight() is None


def test_a_failed_load_leaves_nothing_behind():
    alive = []

    def fail():
        half = model(4)
        alive.append(weakref.ref(half.weight))
        raise RuntimeError("the second half is missing")

    stages = Stages(release="free", measure=True)
    with pytest.raises(RuntimeError):
        stages.run("stage", fail, lambda loaded: None)
    assert alive[0]() is None
    assert stages.run("stage", Loader(), lambda loaded: "well") == "well"


def test_the_peak_is_the_largest_stage_not_the_sum():
    stages = Stages(release="free", measure=True)
    stages.run("small", Loader(8), lambda loaded: None)
    stages.run("large", Loader(20), lambda loaded: None)
    small, large = stages.costs["small"], stages.costs["large"]
    assert small.weights == 8 * MEGABYTE and large.weights == 20 * MEGABYTE
    assert 8 * MEGABYTE <= small.peak - small.before < 9 * MEGABYTE
    assert 20 * MEGABYTE <= large.peak - large.before < 21 * MEGABYTE
    assert abs(large.after - small.before) < MEGABYTE


def test_activations_count_while_they_live():
    stages = Stages(release="free", measure=True)

    def use(loaded):
        for _ in range(3):
            activation = loaded.weight + 1
            activation = activation * 2
        return activation.sum().item()

    stages.run("stage", Loader(8), use)
    cost = stages.costs["stage"]
    # The weight, one activation and the one made from it; the next round's first overlaps with the last.
    assert 24 * MEGABYTE <= cost.peak - cost.before < 25 * MEGABYTE


def test_live_bytes_counts_a_shared_storage_once():
    before = live_bytes(torch.device("cpu"))
    tensor = torch.zeros(MEGABYTE)
    views = [tensor[10:], tensor.view(10, -1)]
    assert live_bytes(torch.device("cpu")) - before == 4 * MEGABYTE
    assert len(views) == 2


def test_weight_bytes_counts_tied_weights_once():
    module = model(4)
    module.tied = module.weight
    assert weight_bytes(module) == 4 * MEGABYTE


def test_table_and_json_name_each_stage():
    stages = Stages(release="free", measure=True)
    stages.run("text encoder", Loader(8), lambda loaded: None)
    assert "text encoder" in stages.table() and "8.0 MB" in stages.table()
    figures = {"before", "peak", "after", "weights", "loaded", "freed", "seconds"}
    assert set(stages.as_dict()["text encoder"]) == figures


@pytest.mark.parametrize(
    "release, loaded, freed",
    [("free", (8, 8), (8, 8)), ("offload", (8, 0), (0, 0)), ("keep", (8, 0), (0, 0))],
)
def test_loaded_and_freed_bytes_are_those_that_moved(release, loaded, freed):
    stages = Stages(release=release, measure=True)  # on the CPU, where offloading moves nothing
    for first_or_second in (0, 1):
        stages.run("stage", Loader(8), lambda loaded: None)
        cost = stages.costs["stage"]
        assert cost.weights == 8 * MEGABYTE
        assert cost.loaded == loaded[first_or_second] * MEGABYTE
        assert cost.freed == freed[first_or_second] * MEGABYTE


def test_an_unknown_release_is_named():
    with pytest.raises(SigmaError, match="'drop'.*keep, offload, free"):
        Stages(release="drop")
