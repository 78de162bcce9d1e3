"""The method: token orders, block statistics, plans, schedules and the session of one run. Knows torch, not ComfyUI."""

VERSION = "0.1.0"
