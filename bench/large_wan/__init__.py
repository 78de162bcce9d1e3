"""large-Wan: a 27.6 M-parameter video model with Wan 2.1 T2V keys, trained on procedural clips, for real sizes.

The model card is `README.md`; `bench/large_bed.py` trains, packs and records. Nothing in the node pack imports this.
"""
