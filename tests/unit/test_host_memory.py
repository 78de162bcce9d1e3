"""What a run's masks and tables leave behind in the process's memory."""

import gc
import time
from pathlib import Path

import pytest
import torch
from comfyui_paro.bench.paro_bench.timeline import HostMemory
from comfyui_paro.paro_runtime.tables import PINNED_BYTES, empty_on_host

MASK = 10_478_430  # bytes of a site's masks at 720p: 40 heads, three groups of steps
STATUS = Path("/proc/self/status")
on_linux = pytest.mark.skipif(not STATUS.is_file(), reason="the system does not tell what is resident")


@pytest.mark.parametrize("size", [16, PINNED_BYTES - 4, PINNED_BYTES, PINNED_BYTES + 4])
def test_it_is_an_ordinary_tensor(size):
    x = empty_on_host((2, size // 8), torch.float32)
    assert x.shape == (2, size // 8) and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()
    x.fill_(3)
    assert torch.equal(x.clone(), torch.full_like(x, 3)) and not x.is_pinned()


def anonymous() -> int:
    """Bytes of memory that no file stands behind, shared or not."""
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(("RssAnon", "RssShmem"))]
    return 1024 * sum(int(line.split()[1]) for line in lines)


@on_linux
def test_masks_that_are_replaced_leave_no_holes():
    """As in a run: larger tables are freed first, then every site's masks are replaced, small tensors in between."""
    tables = [empty_on_host((28_000_000,), torch.uint8).fill_(1) for _ in range(3)]
    del tables
    gc.collect()
    before = anonymous()
    masks, between = [], []
    for _ in range(12):
        masks.append(empty_on_host((MASK,), torch.uint8).fill_(1))
        between.append(torch.zeros(120))
    for site in range(12):
        part = empty_on_host((MASK // 3,), torch.uint8).fill_(2)
        fresh = empty_on_host((MASK,), torch.uint8).fill_(2)
        fresh[: part.numel()] = part
        masks[site] = fresh
        between.append(torch.zeros(120))
        del part, fresh
    assert anonymous() - before < 12 * MASK + (4 << 20)
    masks.clear()
    assert anonymous() - before < 4 << 20


@on_linux
def test_host_memory_tells_files_apart(tmp_path):
    """The highest it was, although it is given back, and pages of a file by themselves."""
    path = tmp_path / "pages"
    path.write_bytes(bytes(24 << 20))
    with HostMemory() as memory:
        mapped = torch.from_file(str(path), size=24 << 20, dtype=torch.uint8)
        mapped.sum()
        held = empty_on_host((40 << 20,), torch.uint8).fill_(1)
        for _ in range(4):
            time.sleep(HostMemory.INTERVAL)
        del mapped, held
    assert memory.grown_gb > 0.06 and 0.02 < memory.of_files_gb < 0.04
