import os
import signal
from pathlib import Path
from typing import Any

import pytest

# Tests and what they start run beside each other, and bit-for-bit comparisons need one order of summation.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts what runs in its background with Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with PACS, mini_pacs and DomainBed's own sweep, named by DOMAINBED_HP_DATA."""
    folder = os.environ.get("DOMAINBED_HP_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DOMAINBED_HP_DATA names no folder with PACS, mini_pacs and domainbed_sweep")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each class of ShapesDG in three environments, as folder:mine."""
    from PIL import Image

    from domainbed_hp.datasets.shapes.shapes_dg import CLASS_NAMES, draw_environment

    folder = tmp_path_factory.mktemp("drawn")
    for env in "ACS":
        for i, image in enumerate(draw_environment(env, 2)):
            path = folder / "mine" / env / CLASS_NAMES[i // 2] / f"{i % 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def feature_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where features go in this test."""
    monkeypatch.setenv("DOMAINBED_HP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each batch that a tower encoded."""
    from domainbed_hp.networks.vit import VisionTower

    sizes: list[int] = []
    forward = VisionTower.forward

    def counting(self: VisionTower, x: Any, *args: Any) -> Any:
        sizes.append(len(x))
        return forward(self, x, *args)

    monkeypatch.setattr(VisionTower, "forward", counting)
    return sizes
