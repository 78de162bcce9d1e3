"""Nodes for the tiny bundled model, which has neither a text encoder nor a VAE."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from .schema import CATEGORY, schema
from .storage import DEMO_MODEL

DEMO = f"{CATEGORY}/demo"
# The words of tests/tiny_wan/data.py; repeated here because a node's schema must not import the test folder.
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = ("right-down", "left-down", "left-up", "right-up")
CHANNELS = 16
BACKGROUNDS = ("flat", "horizontal", "vertical", "checker")


def _data():
    """The tiny model's data module; imported when a demo node runs, not with the pack."""
    from ..tests.tiny_wan import data

    return data


class PARODemoModel(io.ComfyNode):
    """The tiny model that comes with the pack, which is in no list of models: a workflow of somebody else's may take
    the first of a list."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PARODemoModel",
            display_name="PARO Demo Model",
            category=DEMO,
            search_aliases=["PARO demo"],
            description="Loads the tiny video model that comes with the pack: nothing has to be downloaded.",
            inputs=[],
            outputs=[io.Model.Output("model", tooltip="A video model of four layers that draws a moving shape.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        import comfy.sd

        return io.NodeOutput(comfy.sd.load_diffusion_model(str(DEMO_MODEL)))


class PARODemoConditioning(io.ComfyNode):
    """A prompt of three words for the tiny model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PARODemoConditioning",
            display_name="PARO Demo Prompt",
            category=DEMO,
            search_aliases=["PARO demo"],
            description="Prompts for the tiny video model that comes with the pack: no text encoder is needed.",
            inputs=[
                io.Combo.Input("shape", options=list(SHAPES), tooltip="The moving object."),
                io.Combo.Input("direction", options=list(DIRECTIONS), tooltip="Where it moves first."),
                io.Combo.Input("background", options=list(BACKGROUNDS), tooltip="The stripes behind it."),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The three words, for the sampler."),
                io.Conditioning.Output("negative", tooltip="The empty prompt, for the sampler."),
            ],
        )

    @classmethod
    def execute(cls, shape: str, direction: str, background: str) -> io.NodeOutput:
        data = _data()
        words, nothing = data.context_for(shape, direction, background), data.null_context()
        return io.NodeOutput([[words, {}]], [[nothing, {}]])


class PARODemoDecode(io.ComfyNode):
    """Latent of the tiny model -> frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PARODemoDecode",
            display_name="PARO Demo Decode",
            category=DEMO,
            search_aliases=["PARO demo"],
            description="Turns the tiny model's latent into grey frames: no VAE is needed.",
            inputs=[io.Latent.Input("samples", tooltip="The latent that the sampler made with the tiny model.")],
            outputs=[io.Image.Output("frames", tooltip="All frames of all clips, four pixels per latent cell.")],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        return io.NodeOutput(DemoVAE().decode(samples["samples"]).flatten(0, 1))


class DemoVAE:
    """What the host's nodes want of a VAE, for the tiny model: its latent is a rearrangement of pixels."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Latent `[B, 16, F, h, w]` -> grey clips `[B, F, 4h, 4w, 3]` in 0..1. Raises ValueError for another's."""
        if samples.dim() != 5 or samples.shape[1] != CHANNELS or not samples.numel():
            raise ValueError(f"samples: a latent of shape {list(samples.shape)} is not one of the tiny demo model's")
        data = _data()
        grey = (data.decode(data.from_host_latent(samples.float())) + 1) / 2
        return grey[..., None].expand(-1, -1, -1, -1, 3).contiguous()


class PARODemoVAE(io.ComfyNode):
    """The tiny model's decoder as a VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PARODemoVAE",
            display_name="PARO Demo VAE",
            category=DEMO,
            search_aliases=["PARO demo"],
            description="Stands where other models have a VAE: the tiny model's latent is a rearrangement of pixels.",
            inputs=[],
            outputs=[io.Vae.Output("vae", tooltip="Decodes latents of the tiny model, for PARO Compare; no others.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(DemoVAE())
