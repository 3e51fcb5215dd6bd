"""Results without matplotlib."""

from __future__ import annotations

import pytest

from benchmarks.pictures import if_matplotlib_is_there


def test_without_matplotlib_the_results_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with if_matplotlib_is_there():
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot")
    assert capsys.readouterr().out == "no plot: matplotlib is not installed\n"


def test_another_package_that_is_missing_is_told() -> None:
    with pytest.raises(ModuleNotFoundError, match="sklearn"), if_matplotlib_is_there():
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
