"""Every cell of the table in tests/compatibility, and the page that shows it."""

import pytest

from tests.compatibility import page
from tests.compatibility.cells import WAYS, cells, run_cell
from tests.compatibility.distributed import errors_of_ranks
from tests.device import DEVICE


def grouped(way, option):
    """All options are compiled into one package, by processes side by side into the same files of a cache."""
    together = [pytest.mark.xdist_group("AOTInductor")] if way == "AOTInductor package" else []
    return pytest.param(way, option, marks=together)


@pytest.mark.parametrize("way, option", [grouped(*cell) for cell in cells(in_processes=False)])
def test_way(way, option):
    if not WAYS[way].runs_here:
        pytest.skip("needs a GPU")
    run_cell(way, option)


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(DEVICE != "cpu", reason="processes that talk by gloo, on the CPU")
@pytest.mark.parametrize("way, option", cells(in_processes=True))
def test_distributed(way, option):
    assert errors_of_ranks()[way, option] == ""


def test_page_shows_the_table():
    assert page.PAGE.read_text().endswith(page.tables()), "make compatibility"
