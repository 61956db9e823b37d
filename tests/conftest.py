"""What every test shares."""

import os

# Before anything imports transformers: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before anything imports triton: its kernels run on the CPU here.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import settings

# Models here are tiny: a second thread costs more than it computes.
torch.set_num_threads(1)

settings.register_profile("dymu", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("dymu")


@pytest.fixture(autouse=True)
def _inference() -> None:
    """One seed for each test, and no graph of gradients unless a test asks for it."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
