import subprocess
import sys

PAUSED = """
import gc
from domainbed_hp.scripts import pause_gc
with pause_gc():
    assert not gc.isenabled()
    import torch
assert gc.isenabled() and gc.get_freeze_count() > 50_000  # of torch's objects: none is searched at exit
frozen = gc.get_freeze_count()
with pause_gc():
    garbage = []
    garbage.append(garbage)
assert gc.get_freeze_count() <= frozen  # a second run in this process freezes no garbage
"""


def test_torch_is_imported_without_garbage_collection() -> None:
    subprocess.run([sys.executable, "-c", PAUSED], check=True)
