import os

import pytest
import torch

from tests.device import DEVICE

if DEVICE == "cuda":  # a default device makes every call slower
    torch.set_default_device(DEVICE)
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # which share the cores
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    # As torch.manual_seed, which spends milliseconds on devices that are not there.
    torch.default_generator.manual_seed(0)
    if DEVICE == "cuda":
        torch.cuda.manual_seed_all(0)
