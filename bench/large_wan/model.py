"""The model: tests/tiny_wan's Wan 2.1 transformer at width 512, with 8 layers of 4 heads of 128."""

from pathlib import Path

import torch
from torch import nn

from ...tests.tiny_wan.model import TinyWan, TinyWanConfig
from .words import TEXT_DIM, WORD_SIZE, WORDS

CONFIG = TinyWanConfig(dim=512, layers=8, ffn_dim=768, text_dim=TEXT_DIM)


def new_model(config: TinyWanConfig = CONFIG) -> TinyWan:
    """A model to train, its first text layer a table of word embeddings of unit variance (see `words.WORD_SIZE`)."""
    model = TinyWan(config)
    table = model.text_embedding[0].weight
    with torch.no_grad():
        table.zero_()
        nn.init.normal_(table[:, :WORDS], std=1 / WORD_SIZE)
    return model


def config_of(state: dict[str, torch.Tensor]) -> TinyWanConfig:
    """The sizes of a state dict's model; toy ones are trained too, in tests."""
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    ffn, dim = state["blocks.0.ffn.0.weight"].shape
    return TinyWanConfig(dim=dim, layers=layers, ffn_dim=ffn, text_dim=state["text_embedding.0.weight"].shape[1])


def load_large_wan(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TinyWan:
    """The model of packed weights (see `pack`), in evaluation mode with gradients off."""
    from .pack import unpack

    state = unpack(path)[0]
    model = TinyWan(config_of(state))
    model.load_state_dict(state)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
