"""The suite as on other processors: ``make variations``, or ``python tests/variations.py [options of pytest]``.

Contract 11 promises the same numbers everywhere. Another processor is another choice of kernels, which sum in another
order; the libraries below torch let this processor make the choices of simpler ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

# What each choice of torch's kernels goes with in the libraries for matrix products (MKL) and convolutions (oneDNN).
# A library that a build of torch lacks ignores its name.
KERNELS = {
    "DEFAULT": {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX512": {},
}
THREADS = (1, 2)
WHICH = "not (environment or mutation or slow or gpu)"  # all that computes


def capabilities(best: str) -> list[str]:
    """Choices that a processor can carry out; one that is not in the list (ARM's, say) has itself and the plain one."""
    names = list(KERNELS)
    return names[: names.index(best) + 1] if best in names else [names[0], best]


def environment(capability: str, threads: int) -> dict[str, str]:
    """What is set for one run."""
    chosen = {"ATEN_CPU_CAPABILITY": capability.lower(), **KERNELS.get(capability, {})}
    return {**chosen, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def main(options: list[str]) -> int:
    """Run the suite once for each choice; return how many runs failed."""
    ends = []
    for capability in capabilities(torch.backends.cpu.get_cpu_capability()):
        for threads in THREADS:
            begin = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-q", "-m", WHICH, *options]
            chosen = environment(capability, threads)
            code = subprocess.run(command, cwd=Path(__file__).parent.parent, env={**os.environ, **chosen}).returncode
            ends.append((code, f"{capability:8} threads {threads}  {time.monotonic() - begin:5.0f} s"))
    for code, name in ends:
        print(name, "passed" if code == 0 else f"FAILED (exit {code})")
    return sum(code != 0 for code, _ in ends)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
