"""Options, seeds and fixtures shared by every test."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device the tests run on: cpu (default) or cuda")
    parser.addoption("--cuda-on-cpu", action="store_true", help="run the CUDA kernels, on the CPU (csrc/harness)")
    parser.addoption("--update-readme", action="store_true", help="write the support table into README.md")


def pytest_configure(config):
    if config.getoption("--cuda-on-cpu"):
        import helpers
        import operators_on_harness

        helpers.every_kernel_is_slow = True
        operators_on_harness.swap_in()


def pytest_collection_modifyitems(config, items):
    """On a GPU only the tests that depend on the device: the others would repeat what they do on the CPU."""
    if config.getoption("--device") != "cpu":
        dependent = [item for item in items if "device" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(dependent)])
        items[:] = dependent
    # The files that compile kernels last longest: parallel workers start with them, and end at about the same time.
    items.sort(key=lambda item: not item.path.stem.endswith(("_kernel", "_on_cpu")))


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device chosen by `--device`."""
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this torch sees no CUDA device")
    torch.backends.cudnn.allow_tf32 = False  # the layers' forward passes are compared with float64
    return chosen


@pytest.fixture(autouse=True, scope="module")
def extensions_of_one_file():
    """What a file's tests define and register makes modules keep their tensors: not in the files after it."""
    yield
    from backpack_cuda import authored

    authored._module_classes.clear()
    authored._unused.clear()
    authored._anything = False


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same random state, on one thread: small shapes gain nothing from more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    assert torch.get_default_dtype() == torch.float32
