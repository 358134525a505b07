from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-device", default="0", help="index of the CUDA device that tests marked gpu use")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # Tests with real daemons need both cores: with --dist loadgroup they share a worker and run one at a time.
        if item.get_closest_marker("e2e") or item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.xdist_group("daemons"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and (why := _why_no_gpu(int(config.getoption("--gpu-device")))):
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=why))


def _why_no_gpu(device: int) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    if device >= torch.cuda.device_count():
        return f"there is no CUDA device {device}"
    return None


@pytest.fixture
def gpu_device(request: pytest.FixtureRequest) -> str:
    """The device that tests marked gpu run on, as torch names it."""
    return f"cuda:{request.config.getoption('--gpu-device')}"
