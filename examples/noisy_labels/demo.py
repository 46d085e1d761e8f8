"""The demo of the README: ``cifar.py --dataset digits --compare``, under a shorter name."""

from __future__ import annotations

import sys

from examples.noisy_labels import cifar

if __name__ == "__main__":
    sys.exit(cifar.main(["--dataset", "digits", "--compare", *sys.argv[1:]]))
