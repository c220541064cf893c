"""The process that opens models ends by itself when nobody asks; the next question starts another."""

import gc
import warnings

import pytest

from consilience.engine import load_check


class Quick(load_check.Loader):
    """A loader whose processes end at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr("sys.executable", "true")


def test_a_process_that_has_ended_is_replaced_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Quick(monkeypatch)
    first = loader.running()
    first.wait(timeout=30)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        second = loader.running()
        assert second is not first
        assert first.stdin is not None
        assert first.stdin.closed
        loader.close()
        del first, second
        gc.collect()
    assert not [one for one in seen if issubclass(one.category, ResourceWarning)]
