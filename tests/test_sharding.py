"""DTensors in one process: errors, and what tests/compatibility does not cross."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from cross_entropy import cross_entropy


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def operands(mesh, dtype=torch.float32):
    logits, target = torch.randn(5, 9, device="cpu").to(dtype), torch.randint(9, (5,), device="cpu")
    return distribute_tensor(logits, mesh, [Shard(0)]).requires_grad_(), distribute_tensor(target, mesh, [Shard(0)])


def test_torch_distributed_tensor_is_imported_with_the_first_dtensor():
    code = "import sys, cross_entropy; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("plain", ["logits", "target"])
def test_tensors_beside_dtensors(mesh, plain):
    logits, target = operands(mesh)
    if plain == "logits":
        logits = logits.full_tensor()
    else:
        target = target.full_tensor()
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        cross_entropy(logits, target)


def test_shapes_are_those_of_the_whole(mesh):
    logits, target = operands(mesh)
    with pytest.raises(ValueError, match=r"Expected input batch_size \(5\) to match target batch_size \(4\)"):
        cross_entropy(logits, target[:4])


def test_target_out_of_bounds(mesh):
    logits, target = operands(mesh)
    with pytest.raises(IndexError, match="Target 12 is out of bounds"):
        cross_entropy(logits, target + (12 - target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_partial_logits_are_added_first(mesh, reduction):
    logits, target = operands(mesh)
    whole = logits.detach().full_tensor().requires_grad_()
    partial = DTensor.from_local(whole, mesh, [Partial()])
    loss = cross_entropy(partial, target, reduction=reduction)
    expected = F.cross_entropy(whole, target.full_tensor(), reduction=reduction)
    torch.testing.assert_close(loss.full_tensor(), expected)
    grads = [torch.autograd.grad(value.sum(), whole)[0] for value in (loss.full_tensor(), expected)]
    torch.testing.assert_close(*grads)
    with pytest.raises(
        RuntimeError, match="inplace=True needs DTensor logits that are replicated or sharded over rows"
    ):
        cross_entropy(partial * 1, target, reduction=reduction, inplace=True).sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_autocast_with_a_weight(mesh, reduction):
    logits, target = operands(mesh, torch.bfloat16)
    weight = distribute_tensor(torch.rand(9, device="cpu"), mesh, [Replicate()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(logits, target, weight, reduction=reduction)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    x = logits.detach().full_tensor().double().requires_grad_()
    expected = F.cross_entropy(x, target.full_tensor(), weight.full_tensor().double(), reduction=reduction)
    torch.testing.assert_close(loss.full_tensor().double(), expected, rtol=1e-6, atol=0)
    expected_grad = torch.autograd.grad(expected.sum(), x)[0]
    torch.testing.assert_close(logits.grad.full_tensor().double(), expected_grad, rtol=2**-7, atol=2**-9)
