"""Recorded attention calls of every family, replayed through the override without the host.

The recordings come from `scripts/record_contracts.py`: one evaluation of a tiny model of each architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.config.recipes import all_recipes
from comfyui_paro.paro_runtime.host.claims import OPTIONS_KEY, HostEvaluation
from comfyui_paro.paro_runtime.host.families import FAMILIES, Place
from comfyui_paro.paro_runtime.host.override import make_override

FILES = sorted((Path(__file__).parent / "contracts").glob("*.json"))
CONTRACTS = [json.loads(path.read_text(encoding="utf-8")) for path in FILES]
RUNS = [pytest.param(c["family"], run, id=f"{c['case']}-{n}") for c in CONTRACTS for n, run in enumerate(c["runs"])]


class Stream:
    """Stands for the session's evaluation of one layout: exact attention, and a list of the sites it was asked for."""

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout
        self.sites: list[str] = []
        self.abandoned: list[str] = []

    def attend(self, site, q, k, v, *, scale, key_bias, dense, plain, blocks=None):
        self.sites.append(site.name)
        mask = None if key_bias is None else key_bias[:, None, None].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    def abandon(self, reason: str) -> None:
        self.abandoned.append(reason)

    def end(self, attempt: int) -> bool:
        return False


def host_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """The host's contract over torch's attention."""
    if not skip_reshape:
        q, k, v = (t.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    while mask is not None and mask.dim() < 4:
        mask = mask.unsqueeze(0 if mask.dim() == 2 else 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def tensor(recorded: dict) -> torch.Tensor:
    """A tensor of the recorded shape and strides."""
    extent = 1 + sum((n - 1) * s for n, s in zip(recorded["shape"], recorded["stride"], strict=True))
    return torch.randn(extent).as_strided(recorded["shape"], recorded["stride"])


def plain(value: Any) -> Any:
    """What a recorded argument stands for; masks let everything pass."""
    if not isinstance(value, dict):
        return value
    dtype = getattr(torch, value["dtype"])
    if "tensor" not in value:
        return dtype
    return torch.ones(value["tensor"], dtype=dtype) if dtype == torch.bool else torch.zeros(value["tensor"])


@pytest.mark.parametrize("family, run", RUNS)
def test_replay(family, run):
    family = next(f for f in FAMILIES if f.name == family)
    streams = [Stream(TokenLayout(prefix, tuple(grid), suffix)) for prefix, grid, suffix in run["layouts"]]
    declined: list[str] = []
    session = SimpleNamespace(decline=declined.append)
    evaluation = HostEvaluation(session, family, *streams, counts=run["counts"])
    override = make_override(None)
    for call in run["calls"]:
        tensors = [tensor(call[name]) for name in "qkv"]
        positional = [plain(value) for value in call["positional"]]
        keywords = {name: plain(value) for name, value in call["keywords"].items()}
        options = {**call["options"], OPTIONS_KEY: evaluation}
        before = [list(stream.sites) for stream in streams]
        out = override(host_attention, *tensors, *positional, **keywords, transformer_options=options)
        new = [name for stream, old in zip(streams, before, strict=True) for name in stream.sites[len(old) :]]
        assert new == ([] if call["site"] is None else [call["site"]])
        torch.testing.assert_close(out, host_attention(*tensors, *positional, **keywords))
    evaluation.end()
    assert not declined and not any(stream.abandoned for stream in streams)


def test_every_family_is_recorded_and_has_a_recipe():
    names = {family.name for family in FAMILIES}
    assert names == {contract["family"] for contract in CONTRACTS}
    assert names == set(all_recipes())
    assert len(names) == len(FAMILIES)


def test_counted_sites_have_the_same_names_where_the_host_tells_the_block():
    family = next(f for f in FAMILIES if f.name == "ltx_video")
    counted = [family.site(Place({}, 0, n, 6 * n)).name for n in range(3)]
    told = [family.site(Place({"block_index": n})).name for n in range(3)]
    assert counted == told == ["video.0.0", "video.1.0", "video.2.0"]
    assert "second" in family.site(Place({"block_index": 0}, earlier=1))
