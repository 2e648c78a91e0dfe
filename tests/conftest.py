"""What holds for all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, by whichever test comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MODA_AUTOTUNE", "0")  # the first tile that fits: no result of a test depends on a timing

torch.set_num_threads(1)  # tiny tensors, and one test process a core: more threads would only wait for each other


@pytest.fixture(autouse=True)
def no_default_device() -> Iterator[None]:
    """OLMo-core's set-up sets a default device for the whole process; the next test shall not find it."""
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def no_log_of_a_run() -> Iterator[None]:
    """A run logs to its folder until its process ends; the next test in this process shall not find its handlers."""
    for handler in list(logging.getLogger().handlers):  # of a fixture that lives longer, too
        if isinstance(handler, logging.FileHandler) and handler.baseFilename != os.devnull:  # which is pytest's own
            logging.getLogger().removeHandler(handler)
            handler.close()
    yield
