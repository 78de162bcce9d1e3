"""cuDNN's attention against the reference, in the layouts that the host gives."""

import pytest
import torch
from comfyui_paro.kernels.attention.cudnn import cudnn_attention, cudnn_serves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: cuDNN's attention is not tested"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch, heads, length", [(1, 3, 4097), (2, 5, 1531), (1, 2, 16_897)])
def test_it_is_exact_to_rounding(dtype, dim, batch, heads, length):
    generator = torch.Generator("cuda").manual_seed(length + dim)
    wide = [torch.randn(batch, length, heads * dim, device="cuda", generator=generator).to(dtype) for _ in range(3)]
    q, k, v = (x.view(batch, length, heads, dim).transpose(1, 2) for x in wide)
    if not cudnn_serves(q, k, v):
        pytest.skip("torch has no cuDNN attention for this GPU")
    for scale in (None, 0.2):
        out = cudnn_attention(q, k, v, scale=scale)
        assert out.dtype == dtype and out.transpose(1, 2).flatten(2).is_contiguous()
        rows = torch.linspace(0, length - 1, 300, device="cuda").long()
        weights = (q[:, :, rows].double() @ k.double().mT * (dim**-0.5 if scale is None else scale)).softmax(-1)
        exact = weights @ v.double()
        error = (out[:, :, rows].double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps


def test_what_it_does_not_serve():
    q, k = torch.zeros(1, 4, 128, 64, device="cuda").half(), torch.zeros(1, 2, 128, 64, device="cuda").half()
    assert not cudnn_serves(q, k, k) and not cudnn_serves(q.float(), q.float(), q.float())
    assert not cudnn_serves(q[..., :32], q[..., :32], q[..., :32]) and not cudnn_serves(q.cpu(), q.cpu(), q.cpu())
