"""Compositions with nodes that stand on the model: compilation, attention, guidance, weights, caches."""

from __future__ import annotations

from typing import Any

import torch

from .compositions import DENSE, UNTESTED, node, row, sampled

SLOT = "optimized_attention_override"


def compiled(bed: Any, model: Any, **more: Any) -> Any:
    """As core's node does, with a backend that needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    options = {"guard_filter_fn": bed.extra("nodes_torch_compile").skip_torch_compile_dict}
    set_torch_compile_wrapper(model=clone, backend="eager", options=options, **more)
    return clone


COMPILE = "torch.compile"
EAGER = "dynamo's eager backend in the tests; inductor needs a GPU to mean anything"
node(COMPILE, "core `TorchCompileModel`", "the whole model", why=EAGER, changes=False)(compiled)


@node(COMPILE, "block by block", "one `torch.compile` for each block, as packs for large models do", changes=False)
def compiled_blocks(bed: Any, model: Any) -> Any:
    return compiled(bed, model, keys=[f"diffusion_model.blocks.{n}" for n in range(bed.sites)])


row(
    COMPILE,
    "after a run that was compiled without PARO",
    "the same model, compiled and sampled before PARO was put on it",
    why="its graph is dropped once, and a note says so",
    elsewhere="test_rim.py::test_a_model_that_was_compiled_without_paro_is_compiled_anew",
)


ATTENTION = "attention of others"


def counting(bed: Any) -> Any:
    """Another node's attention: the host's own, counted."""

    def theirs(func: Any, *args: Any, **kwargs: Any) -> Any:
        bed.seen.append(1)
        return func(*args, **kwargs)

    return theirs


@node(ATTENTION, "Sage-style override", "a node that puts its function into the slot and chains nothing", changes=False)
def override(bed: Any, model: Any) -> Any:
    clone, theirs = model.clone(), counting(bed)
    clone.model_options["transformer_options"][SLOT] = lambda func, *args, **kwargs: theirs(func, *args, **kwargs)
    return clone


@node(ATTENTION, "core `ModelAttentionBackend`", "set to PyTorch attention", changes=False)
def backend(bed: Any, model: Any) -> Any:
    return bed.extra("nodes_model_advanced").ModelAttentionBackend().patch(model, "pytorch attention")[0]


row(
    ATTENTION,
    "core `ModelAttentionBackend`, comfy-kitchen",
    "set to INT8 attention, or the host started with `--use-ck-attention`",
    expected=UNTESTED,
    why="its kernels need a GPU; `bench/whole_run.py` runs it beside PARO, not under it",
)
row(
    ATTENTION,
    "an override that chains PARO's",
    "a later node calls what was in the slot",
    elsewhere="test_run.py::test_an_override_that_wraps_paros_is_not_asked_twice",
)
row(
    ATTENTION,
    "containers",
    "an override with a `container_function`, which gets q, k and v to use up (MiniMax H3)",
    elsewhere="../unit/host/test_override.py::test_containers",
)


def with_override(bed: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, SLOT: counting(bed)}


def _set_while_sampling(kind: str) -> Any:
    """A node whose wrapper of `kind` sets an override."""

    def add(bed: Any, model: Any) -> Any:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            if kind in ("apply_model", "diffusion_model"):
                return executor(*(with_override(bed, a) if _are_options(a) else a for a in args), **kwargs)
            given = executor.class_obj if kind == "outer_sample" else None
            options = _model_options(kind, given, args)
            options["transformer_options"] = with_override(bed, options["transformer_options"])
            return executor(*args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(kind, "theirs", wrapper)
        return clone

    return add


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and "sample_sigmas" in value


def _model_options(kind: str, guider: Any, args: tuple) -> dict[str, Any]:
    """The model options among the arguments of a wrapper."""
    if kind == "outer_sample":
        return guider.model_options
    if kind == "sampler_sample":
        return args[2]["model_options"]
    return args[{"predict_noise": 2, "calc_cond_batch": 4}[kind]]


for _kind in ("outer_sample", "sampler_sample", "predict_noise", "calc_cond_batch", "apply_model", "diffusion_model"):
    made = "a wrapper puts an override into the slot while sampling"
    node(ATTENTION, f"an override set in `{_kind.upper()}`", made, changes=False)(_set_while_sampling(_kind))


@node(
    ATTENTION,
    "an override set in `model_function_wrapper`",
    "the single slot that older packs use",
    changes=False,
)
def function_wrapper(bed: Any, model: Any) -> Any:
    def wrapper(apply_model: Any, given: dict[str, Any]) -> Any:
        c = {**given["c"], "transformer_options": with_override(bed, given["c"]["transformer_options"])}
        return apply_model(given["input"], given["timestep"], **c)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


@node(
    ATTENTION,
    "an override set in `DIFFUSION_MODEL`, compiled",
    "the same behind core `TorchCompileModel`: both wrappers are in the graph",
    changes=False,
)
def compiled_override(bed: Any, model: Any) -> Any:
    return compiled(bed, _set_while_sampling("diffusion_model")(bed, model))


@node(
    ATTENTION,
    "the model's own methods replaced",
    "an object patch on each `self_attn.forward` that calls torch's attention itself",
    expected=DENSE,
    why="no attention comes by the host's hook",
    passed="no self-attention over the",
    changes=False,
)
def object_patches(bed: Any, model: Any) -> Any:
    from comfy.ldm.flux.math import apply_rope1

    clone = model.clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):

        def forward(x: torch.Tensor, freqs: torch.Tensor, its: Any = block.self_attn, **_: Any) -> torch.Tensor:
            shape = (*x.shape[:2], its.num_heads, its.head_dim)
            q, k = (
                apply_rope1(norm(of(x)).view(shape), freqs) for of, norm in ((its.q, its.norm_q), (its.k, its.norm_k))
            )
            heads = (t.transpose(1, 2) for t in (q, k, its.v(x).view(shape)))
            return its.o(torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

        clone.add_object_patch(f"diffusion_model.blocks.{index}.self_attn.forward", forward)
    return clone


row(
    ATTENTION,
    "packs with model classes of their own",
    "another class in the place of the host's (nunchaku and the like)",
    expected=DENSE,
    why="the class is not known, and the node says so",
    elsewhere="test_run.py::test_unknown_model_passes_through",
)


GUIDANCE = "guidance"


@node(GUIDANCE, "core `SkipLayerGuidanceDiT`", "Wan, a third evaluation without its first block", model="wan")
def slg(bed: Any, model: Any) -> Any:
    return bed.extra("nodes_slg").SkipLayerGuidanceDiT.execute(
        model, scale=2.0, start_percent=0.0, end_percent=1.0, double_layers="0", single_layers=""
    )[0]


@node(GUIDANCE, "core `SkipLayerGuidanceDiTSimple`", "Flux, the negative prompt without one block", model="flux")
def slg_simple(bed: Any, model: Any) -> Any:
    return bed.extra("nodes_slg").SkipLayerGuidanceDiTSimple.execute(
        model, start_percent=0.0, end_percent=1.0, double_layers="", single_layers="1"
    )[0]


node(
    GUIDANCE,
    "core `SkipLayerGuidanceDiT`, counted family",
    "LTX, whose blocks have no names",
    why="the evaluation without its block is the host's, the others are sparse",
    model="ltxv",
    passed="another node replaces blocks",
)(slg)
row(
    GUIDANCE,
    "blocks replaced in a counted family",
    "`set_model_patch_replace` on LTX",
    expected=DENSE,
    why="calls cannot be told apart where a block may be left out",
    elsewhere="test_families.py::test_counted_calls_are_not_trusted_when_blocks_are_replaced",
)


@node(GUIDANCE, "core `NAGuidance`", "Flux, on the output of every block's attention", model="flux")
def nag(bed: Any, model: Any) -> Any:
    return bed.extra("nodes_nag").NAGuidance.execute(model, 5.0, 0.5, 1.5)[0]


@node(
    GUIDANCE,
    "core `PerturbedAttentionGuidance`",
    "SDXL, a third evaluation with one attention replaced",
    model="sdxl",
)
def pag(bed: Any, model: Any) -> Any:
    return bed.extra("nodes_pag").PerturbedAttentionGuidance.execute(model, 2.0)[0]


@node(GUIDANCE, "core `RescaleCFG`", "a function of the two predictions")
def rescale(bed: Any, model: Any) -> Any:
    return bed.extra("nodes_model_advanced").RescaleCFG().patch(model, 0.7)[0]


@sampled(
    GUIDANCE,
    "core `HyperTile`",
    "SDXL, attention within tiles",
    expected=DENSE,
    why="tiles are sequences of another length than the grid",
    model="sdxl",
    passed="no self-attention over the",
)
def hypertile(bed: Any, paro: Any) -> torch.Tensor:
    model = bed.extra("nodes_hypertile").HyperTile.execute(paro(bed.model), 64, 2, 4, False)[0]
    return bed.sample(model, latent=torch.zeros(1, 4, 48, 64))


WEIGHTS = "weights"


@node(WEIGHTS, "LoRA", "`LoraLoaderModelOnly`")
def lora(bed: Any, model: Any) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, bed.lora(), 1.0, 0.0)[0]


@node(WEIGHTS, "core `ModelMergeSimple`", "with a second model")
def merged(bed: Any, model: Any) -> Any:
    other = bed.another()
    with torch.inference_mode():
        for value in other.model.diffusion_model.parameters():
            value.mul_(1.1)
    return bed.extra("nodes_model_merging").ModelMergeSimple().merge(model, other, 0.5)[0]


def _loaded(bed: Any, paro: Any, weights: dict[str, torch.Tensor] | None = None, **options: Any) -> torch.Tensor:
    import comfy.sd
    from safetensors.torch import load_file

    weights = load_file(bed.files["wan"]) if weights is None else weights
    return bed.sample(paro(comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)))


@sampled(WEIGHTS, "FP8 weights", "`UNETLoader` with `fp8_e4m3fn`, cast where they are used")
def fp8(bed: Any, paro: Any) -> torch.Tensor:
    return _loaded(bed, paro, dtype=torch.float8_e4m3fn)


def in_scaled_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint whose attention is in FP8 with one scale per layer."""
    for name in [n for n in weights if n.endswith((".q.weight", ".k.weight", ".v.weight", ".o.weight"))]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".scale_weight")] = scale
    weights["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return weights


@sampled(WEIGHTS, "FP8 weights with scales", "a checkpoint with one scale per layer")
def fp8_scaled(bed: Any, paro: Any) -> torch.Tensor:
    from safetensors.torch import load_file

    return _loaded(bed, paro, in_scaled_fp8(load_file(bed.files["wan"])))


@sampled(WEIGHTS, "GGUF-style weights", "custom operations that unpack a layer's weights when it runs")
def gguf(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.ops

    class Packed(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                bed.seen.append(1)
                scale = self.weight.abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
                weight = (self.weight / scale).round().to(torch.int8).to(input.dtype) * scale
                return torch.nn.functional.linear(input, weight, self.bias)

    return _loaded(bed, paro, custom_operations=Packed)


CACHES = "step caches and windows"


def _cache(bed: Any, model: Any, name: str) -> Any:
    cache = getattr(bed.extra("nodes_easycache"), name)
    return cache.execute(model, reuse_threshold=1.0, start_percent=0.0, end_percent=1.0, verbose=False)[0]


SKIPS = "steps that the cache skips have no attention at all"


@node(
    CACHES,
    "core `EasyCache`",
    "Wan, batch of three",
    why=SKIPS,
    steps=10,
    skips=True,
    passed="another node, such as a cache",
)
def easy_cache(bed: Any, model: Any) -> Any:
    return _cache(bed, model, "EasyCacheNode")


@node(CACHES, "core `LazyCache`", "Wan", why=SKIPS, steps=10, skips=True)
def lazy_cache(bed: Any, model: Any) -> Any:
    return _cache(bed, model, "LazyCacheNode")


def _windows(bed: Any, model: Any, schedule: str, **more: Any) -> Any:
    length = {"context_length": 3, "context_overlap": 1, "context_schedule": schedule, "context_stride": 1}
    return bed.extra("nodes_context_windows").ContextWindowsManualNode.execute(
        model, **length, closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False, **more
    )[0]


@node(CACHES, "core context windows", "`ContextWindowsManual`, the same windows in every step")
def windows(bed: Any, model: Any) -> Any:
    return _windows(bed, model, "standard_static")


@node(CACHES, "core context windows that move", "`ContextWindowsManual`, others in every step")
def moving_windows(bed: Any, model: Any) -> Any:
    return _windows(bed, model, "standard_uniform")
