"""What the loss has to work with: a table of ways of using PyTorch and options of the loss.

Each of its cells compares the loss with torch.nn.functional.cross_entropy in float64. tests/test_compatibility.py runs
them; `python -m tests.compatibility` does too and writes docs/compatibility.md.
"""

from tests.compatibility import autograd, compiling, cuda, distributed, modes, transforms

__all__ = ["autograd", "compiling", "cuda", "distributed", "modes", "transforms"]
