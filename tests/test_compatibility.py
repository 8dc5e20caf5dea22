"""Every cell of the table in compatibility.py, and that docs/compatibility.md shows this table."""

import itertools

import pytest

from tests import compatibility
from tests.compatibility import OPTIONS, WAYS, applies, outcomes_of_ranks, run_cell
from tests.device import DEVICE

CELLS = [(way, option) for way, option in itertools.product(WAYS, OPTIONS) if applies(way, option)]
TOGETHER = [cell for cell in CELLS if WAYS[cell[0]].group == "distributed"]


@pytest.mark.parametrize("way, option", [cell for cell in CELLS if cell not in TOGETHER])
def test_way(way, option):
    run_cell(way, option)


@pytest.mark.skipif(DEVICE != "cpu", reason="processes that talk by gloo, on the CPU")
@pytest.mark.parametrize("way, option", TOGETHER)
def test_distributed(way, option):
    outcomes = outcomes_of_ranks()
    assert [outcome[f"{way} / {option}"] for outcome in outcomes] == [""] * compatibility.WORLD
