import pytest
import torch

from pixart_sigma.errors import SigmaError
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


def test_another_error_is_not_tried_again():
    tried = []

    def run(way):
        tried.append(way)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        first_that_fits("stage", [way("one"), way("two")], run)
    assert len(tried) == 1
