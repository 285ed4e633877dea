"""What tests in several processes and of other frameworks share: their own warnings are no errors,
no hub is asked.
"""

import os

import pytest

# Before anything imports huggingface_hub. Inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    # Importing torch.distributed.optim warns of torch.jit; frameworks warn of each other's and
    # their own future.
    config.addinivalue_line("filterwarnings", "default")
