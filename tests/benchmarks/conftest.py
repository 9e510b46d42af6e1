import pytest
import torch
from estimates import no_memory_estimate  # noqa: F401
from interpreter import patch_once_a_launch

patch_once_a_launch()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
