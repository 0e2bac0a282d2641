import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with PACS, mini_pacs and DomainBed's own sweep, named by DOMAINBED_HP_DATA."""
    folder = os.environ.get("DOMAINBED_HP_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DOMAINBED_HP_DATA names no folder with PACS, mini_pacs and domainbed_sweep")
    return Path(folder).resolve()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run beside each other on small machines, and bit-for-bit comparisons need one order of summation."""
    import torch

    torch.set_num_threads(1)
