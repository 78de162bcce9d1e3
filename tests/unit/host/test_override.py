"""The attention override against every call form of the host, without the host: a stub stands for its attention."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.host.attention_call import key_bias, read_call
from comfyui_paro.paro_runtime.host.claims import OPTIONS_KEY, HostEvaluation
from comfyui_paro.paro_runtime.host.families import ModelCall, family_of, flux, wan
from comfyui_paro.paro_runtime.host.override import is_override, make_override, without_paro
from comfyui_paro.paro_runtime.host.wrappers import HostRun, Lifecycle
from comfyui_paro.paro_runtime.plan.plan import Site
from comfyui_paro.paro_runtime.run.attempt import Attempt
from comfyui_paro.paro_runtime.run.run_log import RunLog

B, H, L, D = 2, 3, 24, 16
LAYOUT = TokenLayout(0, (2, 3, 4))


def host_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """The host's contract over torch's attention; it refuses to run outside the wrapper, as the real one recurses."""
    assert kwargs.get("_inside_attn_wrapper")
    if not skip_reshape:
        q = q.unflatten(2, (heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(2, (-1, q.shape[3])).transpose(1, 2) for t in (k, v))
    while mask is not None and mask.dim() < 4:
        mask = mask.unsqueeze(0 if mask.dim() == 2 else 1)
    gqa = kwargs.get("enable_gqa", False)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"), enable_gqa=gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Container:
    """The host's single-owner tensor container."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "taken twice"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


class Recorder:
    """Stands for the session and its evaluation: answers every call with attention over its views, plus a mark."""

    def __init__(self, layout=LAYOUT, ask_host=False):
        self.layout, self.ask_host = layout, ask_host
        self.sites, self.reasons, self.blocks, self.plain = [], [], [], []

    def decline(self, reason):
        self.reasons.append(reason)

    def attend(self, site, q, k, v, *, scale, key_bias, dense, plain, blocks=None):
        self.sites.append(site)
        self.plain.append(plain)
        self.blocks.append(blocks)
        assert q.shape[2] == k.shape[2] == v.shape[2] == self.layout.length
        if self.ask_host:
            return dense()
        mask = None if key_bias is None else key_bias[:, None, None].to(q.dtype)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)

    def end(self):
        pass


def evaluation(recorder: Recorder, family=wan.FAMILY) -> HostEvaluation:
    return HostEvaluation(recorder, family, recorder)


def options(recorder, index=0, **more):
    return {OPTIONS_KEY: evaluation(recorder), "block_type": "double", "block_index": index, "total_blocks": 2, **more}


def flat(heads=H, length=L):
    return torch.randn(B, length, heads * D)


def apart(heads=H, length=L):
    """`[B, H, L, D]` with strides of its own."""
    return torch.randn(B, length, heads, D).transpose(1, 2)


# Call forms of the host's models: name, positional arguments after q, k, v, keywords, tensors.
FORMS = [
    ("Wan", (), {"heads": H}, (flat, flat, flat)),
    ("Flux", (H,), {"skip_reshape": True, "mask": None}, (apart, apart, apart)),
    ("Qwen", (H, None), {"skip_reshape": True}, (apart, apart, apart)),
    ("LTX", (H,), {"attn_precision": None}, (flat, flat, flat)),
    ("Cosmos", (H,), {"skip_reshape": True, "skip_output_reshape": True}, (apart, apart, apart)),
    ("scaled", (H,), {"skip_reshape": True, "scale": 0.3}, (apart, apart, apart)),
    ("positional flags", (H, None, None, True, True), {}, (apart, apart, apart)),
    ("Krea 2", (H,), {"skip_reshape": True, "enable_gqa": True}, (apart, lambda: apart(1), lambda: apart(1))),
    ("grouped, flat", (H,), {"enable_gqa": True}, (flat, lambda: flat(1), lambda: flat(1))),
    ("unknown keyword", (H,), {"preferred_attention": "x"}, (flat, flat, flat)),
]
MASKS = {
    "none": lambda: None,
    "bool [B,1,1,L]": lambda: torch.rand(B, 1, 1, L) > 0.3,
    "bool [B,1,L]": lambda: torch.rand(B, 1, L) > 0.3,
    "float [1,1,1,L]": lambda: torch.randn(1, 1, 1, L),
    "float [1,L]": lambda: torch.randn(1, L),
}


@pytest.mark.parametrize("ask_host", [False, True])
@pytest.mark.parametrize("positional, keywords, make", [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_every_form_of_call(positional, keywords, make, ask_host):
    """Same result, layout and dtype as the host's function, whether PARO computes or asks the host back."""
    recorder = Recorder(ask_host=ask_host)
    tensors = [f() for f in make]
    kwargs = {**keywords, "transformer_options": options(recorder), "_inside_attn_wrapper": True}
    out = make_override(None)(host_attention, *tensors, *positional, **kwargs)
    torch.testing.assert_close(out, host_attention(*tensors, *positional, **kwargs))
    assert recorder.sites == [Site("double", 0)] and recorder.blocks == [2] and not recorder.reasons


@pytest.mark.parametrize("mask", MASKS)
def test_masks_per_key(mask):
    recorder, value = Recorder(), MASKS[mask]()
    tensors = [flat(), flat(), flat()]
    kwargs = {"mask": value, "transformer_options": options(recorder), "_inside_attn_wrapper": True}
    out = make_override(None)(host_attention, *tensors, H, **kwargs)
    torch.testing.assert_close(out, host_attention(*tensors, H, **kwargs))
    assert len(recorder.sites) == 1


@pytest.mark.parametrize(
    "keywords, reason",
    [
        ({"mask": torch.zeros(L, L)}, "a mask of shape [24, 24]"),
        ({"mask": torch.zeros(B, H, 1, L)}, "a mask of shape [2, 3, 1, 24]"),
        ({"mask": torch.zeros(B, 1, 1, L, dtype=torch.long)}, "a mask of type int64"),
        ({"low_precision_attention": False}, "full precision"),
    ],
)
def test_declined_calls_reach_the_host_untouched(keywords, reason):
    recorder, seen = Recorder(), []
    kwargs = {**keywords, "transformer_options": options(recorder), "_inside_attn_wrapper": True}
    tensors = (flat(), flat(), flat())

    def func(*args, **given):
        seen.append((args, given))
        return "the host's"

    assert make_override(None)(func, *tensors, H, **kwargs) == "the host's"
    ((args, given),) = seen
    assert all(a is b for a, b in zip(args, (*tensors, H), strict=True)) and given == kwargs
    assert reason in recorder.reasons[0] and not recorder.sites


def test_float32_request_of_half_precision():
    recorder = Recorder()
    tensors = [flat().half() for _ in range(3)]
    kwargs = {"attn_precision": torch.float32, "transformer_options": options(recorder), "_inside_attn_wrapper": True}
    make_override(None)(host_attention, *tensors, H, **kwargs)
    assert recorder.reasons == ["the model asks for float32 attention"]


@pytest.mark.ordinary_tensors
def test_gradients_are_declined():
    recorder = Recorder()
    tensors = [flat().requires_grad_() for _ in range(3)]
    kwargs = {"transformer_options": options(recorder), "_inside_attn_wrapper": True}
    assert make_override(None)(host_attention, *tensors, H, **kwargs).requires_grad
    assert recorder.reasons == ["gradients are being recorded"]


def test_cross_attention_and_foreign_lengths_pass_in_silence():
    recorder = Recorder()
    override, kwargs = make_override(None), {"_inside_attn_wrapper": True, "transformer_options": options(recorder)}
    override(host_attention, flat(), flat(length=7), flat(length=7), H, **kwargs)
    override(host_attention, flat(length=9), flat(length=9), flat(length=9), H, **kwargs)
    assert not recorder.sites and not recorder.reasons


def test_only_the_first_call_of_a_block_is_self_attention():
    recorder = Recorder()
    shared = options(recorder)
    for index in (0, 1):
        kwargs = {"_inside_attn_wrapper": True, "transformer_options": {**shared, "block_index": index}}
        for _ in range(2):
            make_override(None)(host_attention, flat(), flat(), flat(), H, **kwargs)
    assert recorder.sites == [Site("double", 0), Site("double", 1)]
    assert recorder.reasons == ["a second attention of the same length in one block"] * 2


def test_a_host_without_block_keys():
    recorder = Recorder()
    kwargs = {"_inside_attn_wrapper": True, "transformer_options": {OPTIONS_KEY: evaluation(recorder)}}
    make_override(None)(host_attention, flat(), flat(), flat(), H, **kwargs)
    assert "0.5.0 or newer" in recorder.reasons[0]


@pytest.mark.parametrize("transformer_options", [None, {}, {OPTIONS_KEY: HostRun(None, None)}, {OPTIONS_KEY: {}}])
def test_outside_an_evaluation_nothing_happens(transformer_options):
    kwargs = {"_inside_attn_wrapper": True, "transformer_options": transformer_options}
    tensors = (flat(), flat(), flat())
    out = make_override(None)(host_attention, *tensors, H, **kwargs)
    assert torch.equal(out, host_attention(*tensors, H, **kwargs))


def test_chaining_both_ways():
    """An earlier override computes what PARO declines; one that wraps PARO's does not make PARO answer twice."""
    log, recorder = [], Recorder(ask_host=True)

    def earlier(func, *args, **kwargs):
        log.append("earlier")
        return func(*args, **kwargs)

    inner = make_override(earlier)

    def later(func, *args, **kwargs):
        log.append("later")
        return inner(func, *args, **kwargs)

    kwargs = {"_inside_attn_wrapper": True, "transformer_options": options(recorder)}
    make_override(later)(host_attention, flat(), flat(), flat(), H, **kwargs)
    assert log == ["later", "earlier"] and len(recorder.sites) == 1
    assert is_override(inner) and not is_override(later)
    assert without_paro(make_override(inner)) is earlier and without_paro(None) is None


def attention_pytorch(*args, **kwargs):
    """By its name torch's attention, as the host's."""
    return host_attention(*args, **kwargs)


def test_it_is_told_whether_the_host_would_run_torchs_attention():
    """Not where another function was chosen, or another node's override would have the call."""

    def other(func, *args, **kwargs):
        return func(*args, **kwargs)

    found = []
    for func in (attention_pytorch, host_attention):
        for override in (make_override(None), make_override(make_override(None)), make_override(other)):
            recorder = Recorder(ask_host=True)
            kwargs = {"_inside_attn_wrapper": True, "transformer_options": options(recorder)}
            override(func, flat(), flat(), flat(), H, **kwargs)
            found += recorder.plain
    assert found == [True, True, False, False, False, False]


@pytest.mark.parametrize("ask_host", [False, True])
def test_containers(ask_host):
    """Only an earlier container function makes PARO offer one; what PARO declines keeps its containers."""
    assert not hasattr(make_override(None), "container_function")
    assert not hasattr(make_override(lambda func, *a, **k: func(*a, **k)), "container_function")
    log = []

    def earlier(func, *args, **kwargs):
        raise AssertionError("containers must not be unwrapped for it")

    def earlier_container(q, k, v, heads, **kwargs):
        log.append("container")
        return host_attention(q.take(), k.take(), v.take(), heads, **kwargs)

    earlier.container_function = earlier_container
    override, recorder = make_override(earlier), Recorder(ask_host=ask_host)
    kwargs = {"_inside_attn_wrapper": True, "transformer_options": options(recorder)}
    tensors = (flat(), flat(), flat())
    out = override.container_function(*map(Container, tensors), H, **kwargs)
    torch.testing.assert_close(out, host_attention(*tensors, H, **kwargs))
    assert len(recorder.sites) == 1 and log == ["container"] * ask_host
    cross = (flat(), flat(length=7), flat(length=7))
    out = override.container_function(*map(Container, cross), H, **kwargs)
    torch.testing.assert_close(out, host_attention(*cross, H, **kwargs))
    assert log == ["container"] * (ask_host + 1)


def test_views_are_views():
    q = flat()
    call = read_call(q, flat(), flat(), heads=H)
    assert call.q.shape == (B, H, L, D) and call.q.data_ptr() == q.data_ptr()
    assert read_call(1, 2, 3) is None
    assert read_call(flat(), flat(), flat(length=7), H) is None
    assert key_bias(torch.ones(B, L, dtype=torch.bool), B, L).eq(0).all()


def _model(path: str, **values):
    module, _, name = path.rpartition(".")
    return type(name, (SimpleNamespace,), {"__module__": module, "__qualname__": name})(**values)


WAN = _model("comfy.ldm.wan.model.WanModel", patch_size=(1, 2, 2), ref_conv=None)
FLUX = _model("comfy.ldm.flux.model.Flux", patch_size=2, params=SimpleNamespace(global_modulation=False))


def test_families():
    assert family_of(WAN) is wan.FAMILY and family_of(FLUX) is flux.FAMILY
    assert "CacheWanModel" in family_of(_model("comfy.ldm.wan.model.CacheWanModel"))
    assert family_of(_model("comfy.ldm.wan.model.VaceWanModel")).name == "wan_vace"
    assert (
        family_of(_model("comfy.ldm.flux.model.Flux", params=SimpleNamespace(global_modulation=True))).name == "flux2"
    )
    assert family_of(_model("comfy.ldm.x.Other")) == "the model class Other is not supported"


@pytest.mark.parametrize(
    "call, expected",
    [
        (ModelCall((1, 16, 5, 30, 52)), TokenLayout(0, (5, 15, 26))),
        (ModelCall((2, 16, 5, 29, 51)), TokenLayout(0, (5, 15, 26))),
        (
            ModelCall((1, 16, 5, 8, 8), extra={"time_dim_concat": torch.zeros(1, 16, 2, 8, 8)}),
            TokenLayout(0, (7, 4, 4)),
        ),
        (
            ModelCall((1, 16, 5, 8, 8), extra={"context_latents": [torch.zeros(1, 16, 1, 7, 8)]}),
            TokenLayout(0, (5, 4, 4), 16),
        ),
        (ModelCall((1, 16, 8, 8)), "Wan: expected a video latent [B, C, F, H, W], got [1, 16, 8, 8]"),
    ],
)
def test_layouts_of_wan(call, expected):
    assert wan.FAMILY.layout(WAN, call) == expected


def test_reference_frame_of_wan_stands_in_front():
    model = _model("comfy.ldm.wan.model.WanModel", patch_size=(1, 2, 2), ref_conv=object())
    call = ModelCall((1, 16, 5, 8, 8), extra={"reference_latent": torch.zeros(1, 16, 8, 8)})
    assert wan.FAMILY.layout(model, call) == TokenLayout(16, (5, 4, 4))


def test_layouts_of_flux():
    references = {"ref_latents": [torch.zeros(1, 16, 9, 14)]}
    assert flux.FAMILY.layout(FLUX, ModelCall((1, 16, 9, 8), (1, 256, 64))) == TokenLayout(256, (1, 5, 4))
    assert flux.FAMILY.layout(FLUX, ModelCall((1, 16, 9, 8), (1, 7, 64), references)) == TokenLayout(7, (1, 5, 4), 35)
    assert "no text" in flux.FAMILY.layout(FLUX, ModelCall((1, 16, 9, 8)))


def test_status_line(monkeypatch):
    """Text goes to the node where a server runs; nothing happens anywhere else."""
    from comfyui_paro.paro_runtime.host.status import status_line

    monkeypatch.setitem(sys.modules, "server", SimpleNamespace())
    status_line("7")("nobody listens")
    sent = []
    server = SimpleNamespace(send_progress_text=lambda text, node_id: sent.append((text, node_id)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    status_line("7")("hello")
    status_line(None)("no node")
    assert sent == [("hello", "7")]


def test_an_evaluation_runs_once_more_with_what_a_model_uses_up():
    seen = []

    def begin(**given):
        seen.append((given["layout"], given["sigma"]))
        return SimpleNamespace(layout=layout, end=lambda attempt: attempt == 0)

    layout = TokenLayout(0, (3, 4, 5))
    log = RunLog("auto")
    session = SimpleNamespace(begin=begin, attempt=partial(Attempt, log, lambda: None, False), calibrator=None, log=log)
    family = SimpleNamespace(layout=lambda model, call: layout, counts=lambda model: None, first_query=lambda its: 0)
    options = {OPTIONS_KEY: HostRun(session, family)}
    x = torch.zeros(2, 16, 3, 8, 10)
    control = {"input": [x], "middle": None}
    call = (x, torch.tensor([0.5]), None, torch.zeros(2, 7, 8), control, options)

    class Executor:
        class_obj = SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))

        def __call__(self, *arguments, **more):
            assert arguments[4]["input"].pop() is x  # a U-Net takes them out
            return arguments[0]

    assert Lifecycle(family, start=None, strict=True).apply_model(Executor(), *call) is x
    assert seen == [(layout, 0.5)] * 2


def test_an_evaluation_is_run_again_only_where_nobody_else_would_notice():
    from comfyui_paro.paro_runtime.host.wrappers import repeatable

    model = torch.nn.Linear(1, 1)

    def around(kind, *keys):
        return {"wrappers": {kind: {key: [print] for key in keys}}}

    assert repeatable(model, {}) and repeatable(torch.compile(model), around("apply_model", "paro", "torch.compile"))
    assert repeatable(model, around("outer_sample", "easycache"))
    assert not repeatable(model, around("diffusion_model", "easycache"))
    assert not repeatable(model, around("apply_model", "paro", None))
    model.forward = print  # as another node does it
    assert not repeatable(model, {}) and not repeatable(torch.compile(model), {})
