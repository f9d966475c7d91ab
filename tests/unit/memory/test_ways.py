import pytest
import torch

from pixart_sigma.errors import CheckpointError, SigmaError
from pixart_sigma.memory.out_of_memory import is_out_of_memory
from pixart_sigma.memory.ways import Needs, Way, first_that_fits


def way(how):
    return Way(how, {"decode": how}, lambda: Needs(1, 1))


def test_the_first_way_that_fits_is_told_with_its_result(caplog):
    tried = []

    def run(way):
        tried.append(way.how)
        if way.how != "small":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return len(tried)

    result, found = first_that_fits("stage", map(way, ("large", "middle", "small", "tiny")), run)
    assert (result, found.how, tried) == (3, "small", ["large", "middle", "small"])
    assert "Memory ran out in the stage (large). It is released and runs again: middle." in caplog.text
    assert caplog.text.count("Memory ran out") == 2


def test_after_the_last_way_it_is_an_error_with_advice():
    def run(way):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SigmaError, match="Memory ran out in the stage. Close other programs"):
        first_that_fits("stage", [way("only")], run)
    with pytest.raises(SigmaError, match="Memory ran out in the stage. Buy more."):
        first_that_fits("stage", [way("only")], run, "Buy more.")


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        CheckpointError("damaged"),
    ],
)
def test_another_error_is_not_tried_again(error):
    tried = []

    def run(way):
        tried.append(way)
        raise error

    with pytest.raises(type(error)):
        first_that_fits("stage", [way("one"), way("two")], run)
    assert len(tried) == 1


def wrapped(way):
    """As a loader does that takes it for the file's fault."""
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        raise CheckpointError("t5 could not be loaded") from error


def no_memory(way):
    raise MemoryError


@pytest.mark.parametrize("run", [lambda way: torch.empty(2**50), no_memory, wrapped])
def test_memory_of_a_cpu_and_what_is_made_of_it_is_the_same(run, caplog):
    ways = [way("large"), way("small")]
    result, found = first_that_fits("stage", ways, lambda way: run(way) if way.how == "large" else 7)
    assert (result, found.how) == (7, "small") and "Memory ran out in the stage (large)" in caplog.text


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory",
        "unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)",
    ],
)
def test_what_backends_say_of_it(said):
    assert is_out_of_memory(RuntimeError(said))
