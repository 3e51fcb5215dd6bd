"""What holds for every test: threads, seeds, hypothesis profiles, and where CUDA tests run."""

from __future__ import annotations

import os
import random
import signal

# Before anything can import matplotlib or wandb: no display, no network.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import hypothesis
import numpy as np
import pytest
import torch

# Two test workers on two cores: a second thread in each only waits for the other's.
torch.set_num_threads(1)

# No deadline: the first example pays for torch's lazy initialization.
hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
# Derandomized, so that a change that fails CI fails it again on the author's machine.
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# A shell lets what it starts in the background ignore interrupts, and some tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
