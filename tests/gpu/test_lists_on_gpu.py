"""Lists of kept blocks on hardware, where a row is a warp's, against torch."""

import pytest
import torch
from comfyui_paro.kernels.attention.block_list_layout import list_shape
from comfyui_paro.kernels.attention.block_lists import block_list
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.pattern import SparsePattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels on hardware are not tested"),
]


@pytest.mark.parametrize("grid, block_q", [((21, 45, 80), 128), ((3, 16, 24), 64), ((3, 13, 11), 64)])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_lists(grid, block_q, density):
    from comfyui_paro.kernels.attention.triton_block_lists import write_lists

    g, heads = Geometry(0, grid, 0, block_q), 6
    mask = torch.rand(heads, g.q_blocks, g.k_blocks, device="cuda") < density
    mask[:, :, 0] = True
    tables, index = torch.zeros(1, g.grid_tokens).int().cuda(), torch.zeros(heads).int().cuda()
    pattern = SparsePattern.from_mask(g, tables, index, mask)
    assert torch.equal(pattern.mask, mask)
    lists = block_list(pattern)
    blocks = torch.full(list_shape(g, heads), -7, dtype=torch.int16, device="cuda")
    write_lists(pattern.kept_words, g, blocks)
    there = torch.arange(blocks.shape[2], device="cuda") < lists.count[..., None]
    # Without context the ragged block is the last of a row that keeps it, as it is in the mask.
    assert torch.equal(blocks[:, :-1][there[:, :-1]].long(), mask.nonzero()[:, 2])
    assert (blocks[:, -1, : g.k_blocks] == torch.arange(g.k_blocks, device="cuda")).all()
    assert torch.equal(lists.count[:, :-1].long(), mask.sum(2))
    assert lists.blocks is None or torch.equal(lists.blocks[there], blocks[there])
