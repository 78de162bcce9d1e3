"""Attention kernels: what one call is (`core.pattern`), a readable PyTorch reference, and Triton kernels beside it.

Nothing here knows ComfyUI, plans on disk or sampling; nothing here imports Triton until a kernel is launched.
"""
