"""Options, seeds and fixtures shared by every test."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("deterministic")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device the tests run on: cpu (default) or cuda")
    parser.addoption("--update-readme", action="store_true", help="write the support table into README.md")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device chosen by `--device`."""
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this torch sees no CUDA device")
    return chosen


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same random state, on one thread: small shapes gain nothing from more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    assert torch.get_default_dtype() == torch.float32
