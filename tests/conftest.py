import pytest
import torch

from tests.device import DEVICE

torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
