"""PARO Compare in the real host: both runs are the sampler's own to the bit, and nothing of it stays on the model."""

from __future__ import annotations

import io

import pytest
import torch
from comfyui_paro.scripts.comfy_server import ComfyError
from comfyui_paro.tests.host.test_server import SMALL, SPARSE, graph
from PIL import Image
from safetensors.torch import load_file

GRID = (5, 7, 9)
STEPS = 3


class Vae:
    """Decodes any latent: its first three channels, of a video's latent as `[B, F, H, W, C]`."""

    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).float().sigmoid()


class WrongVae:
    def decode(self, samples):
        raise RuntimeError("expected 4 channels, got 16\nmore of it")


@pytest.fixture
def compare(comfy):
    """The comparison as the node makes it, and the host's KSampler with the same inputs."""
    pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")
    from comfyui_paro.nodes.compare.in_host import compare
    from comfyui_paro.paro_runtime.host.calibration_run import Sampling

    import nodes

    def run(model, latent, vae=None, said=None, denoise=1.0, **more):
        sampling = Sampling(latent, 7, STEPS, 2.0, "euler", "simple", denoise)
        show = (lambda text: None) if said is None else said
        return compare(model, comfy.text(1), comfy.text(2), vae or Vae(), sampling, on_status=show, **more)

    def plain(model, latent, denoise=1.0):
        given = (7, STEPS, 2.0, "euler", "simple", comfy.text(1), comfy.text(2), latent, denoise)
        return nodes.KSampler().sample(model, *given)[0]["samples"]

    run.plain = plain
    return run


def sparse(comfy, model, **settings):
    return comfy.patched(model, preset="custom", density=0.4, dense_steps=1, **settings)


def footprint(model):
    """What a run could leave on a model."""
    return {kind: {key: list(its) for key, its in keys.items()} for kind, keys in model.wrappers.items() if keys}


@pytest.mark.host_on_gpu
def test_on_a_gpu(comfy, wan_file, compare):
    """As the CPU's tests, but for the bits: the kernels ran, and a run is the same beside another one's leftovers."""
    latent = {"samples": comfy.latent((9, 32, 32))}
    model = sparse(comfy, comfy.load(wan_file, torch.bfloat16))
    made, again = compare(model, latent), compare(model, latent)
    for one in (made, again):
        assert one.first["samples"].isfinite().all() and one.second["samples"].isfinite().all()
        assert not torch.equal(one.first["samples"], one.second["samples"])
    assert torch.equal(made.first["samples"], again.first["samples"])
    report = report_of(model)
    assert report.sites_sparse and not report.passed and not report.fallbacks, report.text()
    lines = again.text.splitlines()
    print(again.text)
    assert "as fast: " in lines[0] and any("PSNR" in line for line in lines)


@pytest.mark.host_on_cpu
@pytest.mark.parametrize("batch", [1, 2])
def test_both_runs_are_the_samplers_own(comfy, wan, compare, batch):
    latent = {"samples": comfy.latent(GRID, batch)}
    unpatched, patched = compare.plain(wan, latent), compare.plain(sparse(comfy, wan), latent)
    assert not torch.equal(unpatched, patched)
    model = sparse(comfy, wan)
    before = footprint(model)
    made = compare(model, latent)
    assert torch.equal(made.first["samples"], unpatched) and torch.equal(made.second["samples"], patched)
    assert footprint(model) == before and not any(footprint(wan).values())
    assert torch.equal(compare.plain(wan, latent), unpatched) and torch.equal(compare.plain(model, latent), patched)
    assert made.picture.shape[0] == batch * GRID[0] and made.video
    lines = [line.removeprefix("- ") for line in made.text.splitlines()]
    assert "as fast: " in lines[0] and " without PARO, " in lines[0]
    assert any(line.startswith("PARO: ") and "steps sparse" in line for line in lines)
    assert any(f"{STEPS} steps, euler, simple, cfg 2, denoise 1, seed 7" in line for line in lines)
    assert not any("nothing was sparse" in line for line in lines)
    sampled = report_of(model).attention_error is not None
    assert sampled == any(line.startswith("PARO: attention error ") and "%" in line for line in lines)


def report_of(model):
    from comfyui_paro.paro_runtime.host.patching import last_report

    report = last_report(model)
    assert not isinstance(report, str)
    return report


@pytest.mark.host_on_cpu
@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("step", [1, STEPS])
def test_cancel_in_each_run(comfy, wan, compare, run, step):
    """After the step the host's own exception comes out, and what is sampled afterwards is what it always was."""
    import comfy.model_management as management

    latent, said = {"samples": comfy.latent(GRID)}, []
    unpatched, model = compare.plain(wan, latent), sparse(comfy, wan)
    patched = compare.plain(sparse(comfy, wan), latent)

    def cancel(text):
        said.append(text)
        if text.startswith(f"run {run} of 2") and f"step {step}/" in text:
            management.interrupt_current_processing(True)

    with pytest.raises(management.InterruptProcessingException):
        compare(model, latent, said=cancel)
    assert f"run {run} of 2" in said[-1] and f"step {step}/{STEPS}" in said[-1]
    assert torch.equal(compare.plain(wan, latent), unpatched) and torch.equal(compare.plain(model, latent), patched)


@pytest.mark.host_on_cpu
def test_other_takes_the_place_of_the_run_without_paro(comfy, wan, compare):
    latent = {"samples": comfy.latent(GRID)}
    other = comfy.patched(wan, preset="custom", density=0.2, dense_steps=1)
    made = compare(sparse(comfy, wan), latent, other=other)
    assert torch.equal(made.first["samples"], compare.plain(other, latent))
    assert torch.equal(made.second["samples"], compare.plain(sparse(comfy, wan), latent))
    assert " with the other model, " in made.text and "without PARO" not in made.text
    assert all(f"\n- {name}: " in made.text for name in ("other", "model")) and made.text.count("steps sparse") == 2


def test_images(comfy, flux, compare):
    """A batch of pictures: no flicker, images instead of frames."""
    made = compare(sparse(comfy, flux), {"samples": comfy.latent((1, 24, 24), 2, video=False)})
    assert not made.video and len(made.picture) == 2
    assert "flicker" not in made.text and "2 images of " in made.text


def test_nothing_sparse_and_nothing_sampled(comfy, wan, compare):
    latent = {"samples": comfy.latent(GRID)}
    dense = compare(comfy.patched(wan, min_tokens=100_000), latent)
    assert "the two results are identical" in dense.text and "hint: nothing was sparse (PARO): " in dense.text
    nothing = compare(sparse(comfy, wan), latent, denoise=0.0)
    assert torch.equal(nothing.first["samples"], nothing.second["samples"])
    assert "hint: nothing was sparse (PARO): " in nothing.text


def test_mistakes_are_one_sentence(comfy, wan, compare):
    from comfyui_paro.nodes.compare.in_host import CompareError

    latent, said = {"samples": comfy.latent(GRID)}, []
    with pytest.raises(CompareError, match="put PARO Patch Model before it"):
        compare(wan, latent, said=said.append)
    empty = Vae()
    empty.first_stage_model = None
    with pytest.raises(CompareError, match="connect the VAE"):
        compare(sparse(comfy, wan), latent, vae=empty, said=said.append)
    assert not said  # before anything ran
    # The wrong VAE is noticed when both runs are made: they are kept.
    made = compare(sparse(comfy, wan), latent, vae=WrongVae())
    assert made.picture is None and not made.video and made.second["samples"].any()
    assert "connect the VAE that belongs to the model: expected 4 channels, got 16\n" in made.text


def node_graph(**changes) -> dict:
    """The node on the server, and what the sampler makes of the same inputs without PARO."""
    # A seed of its own: the server is shared, and remembers what it has made.
    nodes = graph(SMALL, seed=21, settings=SPARSE)
    sampler = nodes["sample"]["inputs"]
    nodes["vae"] = {"class_type": "PARODemoVAE", "inputs": {}}
    inputs = {**sampler, "model": ["paro", 0], "vae": ["vae", 0], **changes}
    nodes["compare"] = {"class_type": "PAROCompare", "inputs": inputs}
    nodes["unpatched"] = {"class_type": "KSampler", "inputs": {**sampler, "model": ["model", 0]}}
    for name, source in {"dense": ["compare", 2], "sparse": ["compare", 3], "bare": ["unpatched", 0]}.items():
        inputs = {"samples": source, "filename_prefix": name}
        nodes[f"save_{name}"] = {"class_type": "SaveLatent", "inputs": inputs}
    return nodes


def saved(server, history, node) -> torch.Tensor:
    (file,) = history["outputs"][node]["latents"]
    return load_file(server.folder / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def test_the_node_on_a_server(server):
    history = server.run(node_graph())
    dense, sparse, bare, sampled = (
        saved(server, history, f"save{name}") for name in ("_dense", "_sparse", "_bare", "")
    )
    assert torch.equal(dense, bare) and torch.equal(sparse, sampled) and not torch.equal(dense, sparse)
    text = server.text(history, "compare")
    assert "as fast: " in text and "\n- PARO: " in text and "steps sparse" in text
    (picture,) = server.images(history, "compare")
    shown = Image.open(io.BytesIO(picture))
    f, h, w = SMALL
    assert shown.format == "WEBP" and shown.n_frames == f and shown.width == 3 * 8 * w + 8 and shown.height > 8 * h


def test_the_node_refuses_an_unpatched_model_in_one_sentence(server):
    with pytest.raises(ComfyError, match="put PARO Patch Model before it") as error:
        server.run(node_graph(model=["model", 0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("run", [1, 2])
def test_the_page_can_cancel_each_run(server, run):
    """The page's cancel button, pressed while the log says which of the two runs it is."""
    nodes, sent = node_graph(steps=60), []
    for name in [name for name in nodes if name.startswith(("save", "sample", "unpatched", "report"))]:
        del nodes[name]
    before = server.log.read_text(errors="replace").count(" 0/60 ")

    def cancel(seconds: float) -> None:
        begun = server.log.read_text(errors="replace").count(" 0/60 ") - before
        if begun >= run and not sent:
            sent.append(server.json("/interrupt", {}))

    with pytest.raises(ComfyError) as error:
        server.run(nodes, waiting=cancel)
    kinds = [kind for kind, _ in error.value.details["status"]["messages"]]
    assert sent and "execution_interrupted" in kinds and "execution_error" not in kinds
