"""Runs the cells and, if they are as the table says, writes docs/compatibility.md."""

import sys

import torch

from tests.compatibility import page
from tests.compatibility.cells import WAYS, cells, run_cell
from tests.compatibility.distributed import errors_of_ranks
from tests.device import DEVICE


def main() -> None:
    torch.set_default_device(DEVICE)
    errors = dict(errors_of_ranks())
    for way, option in cells(in_processes=False):
        if WAYS[way].runs_here:
            try:
                run_cell(way, option)
                errors[way, option] = ""
            except Exception as error:
                errors[way, option] = str(error)
    for (way, option), error in errors.items():
        if error:
            print(f"{way} / {option}: {error}", file=sys.stderr)
    if any(errors.values()):
        sys.exit("The page is not written.")
    page.write()
    print(f"{len(errors)} cells; wrote {page.PAGE}")


if __name__ == "__main__":
    main()
