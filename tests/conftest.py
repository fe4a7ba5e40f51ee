import gc
import os

# Tests never ask the Hub, and two test processes share two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    # Every training run collects garbage, which takes most of a short run when it has to look at all that was imported.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """A test may set another number of threads; the next one's sums would have other bits."""
    yield
    torch.set_num_threads(1)


def pytest_unconfigure():
    gc.unfreeze()  # so that the interpreter can clear away what extensions hold
