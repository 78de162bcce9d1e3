"""The only part of the runtime that knows ComfyUI: attention override, life of a run, model families."""
