"""What tests in several processes share: torch's own warnings are no errors."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Importing torch.distributed.optim warns of torch.jit.
    config.addinivalue_line("filterwarnings", "default")
