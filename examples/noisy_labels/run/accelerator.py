"""What is set once for a run on CUDA: which kernels are allowed, and with how many digits they multiply.

A resumed run repeats the numbers of one that never stopped only if every kernel does. cuDNN's backward convolutions
add in any order unless told otherwise, and its benchmark mode picks kernels by a stopwatch, so another process may
pick others. Hence the default: deterministic kernels, no benchmark. On the CPU nothing has to be set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from examples.noisy_labels.run.settings import Training


@contextmanager
def prepared(settings: Training, device: torch.device) -> Iterator[None]:
    """Set torch's global switches as the settings say, and put them back afterwards."""
    if device.type != "cuda":
        yield
        return
    # Read when cuBLAS starts, which is at the first product on the device.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = _switches()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        # With warn_only an operation that has no deterministic kernel says its name instead of ending the run.
        _switch(settings.deterministic, not settings.deterministic, settings.tf32, settings.tf32)
        torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
        # It would write NaN into every new tensor, a kernel each, to catch who reads memory that nobody wrote.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    finally:
        *switches, deterministic, warn_only = before
        _switch(*switches)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _switches() -> tuple[bool, bool, bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return (
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _switch(deterministic: bool, benchmark: bool, tf32_convolutions: bool, tf32_products: bool) -> None:
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = deterministic, benchmark, tf32_convolutions
    torch.backends.cuda.matmul.allow_tf32 = tf32_products
