import os

import pytest
import torch

from tests.device import DEVICE

torch.set_default_device(DEVICE)
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # which share the cores
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
