"""What this build of the package is."""

from typing import NamedTuple

from cross_entropy import _C

__all__ = ["BuildInfo", "build_info"]
__version__ = "0.1.0"


class BuildInfo(NamedTuple):
    """How the compiled part was built, and what it uses here; see :func:`build_info`."""

    version: str
    torch: str
    compiler: str
    cuda: str | None
    cuda_architectures: list[str]
    emulated: bool
    cpu: str


def build_info() -> BuildInfo:
    """How the compiled part of the package was built, and the CPU kernels that it uses on this processor.

    Returns:
        A named tuple of

        - ``version``: the package's,
        - ``torch``: the version it was compiled against,
        - ``compiler``: of the C++ code,
        - ``cuda``: the version of nvcc that compiled the CUDA kernels, None without them,
        - ``cuda_architectures``: those that the CUDA kernels were compiled for, such as ``"9.0"`` or, with code that
          later ones can translate, ``"12.0+PTX"``,
        - ``emulated``: whether the CUDA kernels were compiled for the processor, to test them,
        - ``cpu``: ``"avx512"``, ``"avx2"`` or ``"portable"``.

    >>> build_info()  # doctest: +ELLIPSIS
    BuildInfo(version='...', torch='...', compiler='...', cuda=..., cuda_architectures=[...], emulated=..., cpu='...')
    """
    return BuildInfo(__version__, *_C.build_info())
