"""tiny-Wan: a 4.84 M-parameter trained video model with Wan 2.1 T2V keys, used as test fixture and demo.

The weights are in `paro-tiny-wan.safetensors`, the model card in `README.md`.
"""
