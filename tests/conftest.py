import pytest
import torch

from tests.device import DEVICE

torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
