"""What a run takes of the process's memory, as the benchmark sees it."""

import time
from pathlib import Path

import pytest
import torch
from comfyui_paro.bench.paro_bench.timeline import HostMemory

STATUS = Path("/proc/self/status")
on_linux = pytest.mark.skipif(not STATUS.is_file(), reason="the system does not tell what is resident")


@on_linux
def test_host_memory_tells_files_apart(tmp_path):
    """The highest it was, although it is given back, and pages of a file by themselves."""
    path = tmp_path / "pages"
    path.write_bytes(bytes(24 << 20))
    with HostMemory() as memory:
        mapped = torch.from_file(str(path), size=24 << 20, dtype=torch.uint8)
        mapped.sum()
        held = torch.ones(40 << 20, dtype=torch.uint8)
        for _ in range(4):
            time.sleep(HostMemory.INTERVAL)
        del mapped, held
    assert memory.grown_gb > 0.06 and 0.02 < memory.of_files_gb < 0.04
