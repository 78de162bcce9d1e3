"""Why calls were not sparse, in plain words, and what a user can do about each: one table for every reason there is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..compiling.readiness import COMPILING
from .sentences import Sentence, clipped, say

NOTHING = "nothing to do"
NO_CALL = "no self-attention call was seen"
NOT_FINITE_SITE = "the result is not finite"
SKIPPED = "another node, such as a cache of steps, answered without the model"
OFF = "PARO is switched off"
NOT_ON_IT = "PARO is not on this model, or is switched off"


@dataclass(frozen=True)
class Reason:
    """pattern: of the reason as it is counted, from its beginning; hint: what to do; words: said instead of it."""

    pattern: str
    hint: str
    words: str | None = None


_REPORT_IT = "see the console, and report it"
_OTHER_NODE = "another node may have changed the model"
_SHORT = f"{NOTHING}: so short a sequence gains little"
_OTHER_INT8 = "set precision to int8 in PARO Settings"
_STEPS = "lower dense_steps in PARO Settings"
_UPDATE = "update torch and Triton, or report it with your GPU's name"
_NO_TEXT = "connect a text prompt to the sampler"

# The first pattern that fits counts.
REASONS = (
    # What the user chose, or how a run goes.
    Reason("dense step", _STEPS, "steps at the beginning are dense"),
    Reason("dense block", "take blocks out of dense_blocks in PARO Settings", "blocks that the settings keep dense"),
    Reason("calibrating", f"{NOTHING}: it is what the run is for", "watched by PARO Calibrate"),
    Reason("no plan yet", f"{NOTHING}: later steps use it", "the plan was still being made"),
    Reason(re.escape(COMPILING), f"{NOTHING}: the next run is faster"),
    Reason(r"every block kept: \d+ grid tokens", f"{NOTHING}, or set a density (preset custom) to drop blocks anyway"),
    Reason(
        "no plan and calibration is off",
        "switch calibrate on in PARO Settings, or give a plan",
        "there is no plan, and calibrate is off",
    ),
    Reason(r"no plan: it was dropped", _OTHER_NODE),
    Reason(r"no plan: it could not be made", "see the notes and the console"),
    Reason(OFF, "switch enabled on in PARO Patch Model"),
    Reason("the settings ask for the PyTorch reference", "set backend to auto in PARO Settings"),
    Reason(NOT_ON_IT, "put PARO Patch Model before the sampler, enabled"),
    # Sizes.
    Reason(r"\d+ grid tokens do not fill two blocks", _SHORT),
    Reason(r"\d+ grid tokens, below the minimum", f"{NOTHING}: it would gain little (min_tokens in PARO Settings)"),
    # The machine.
    Reason("triton is not installed", "install Triton (on Windows triton-windows)"),
    Reason("triton does not run on", f"{NOTHING}: PARO is fast on NVIDIA GPUs only"),
    Reason("triton's interpreter cannot", "load the model in fp16 or fp32"),
    Reason("dtype .* is not supported", "load the model in bf16 or fp16"),
    Reason("head dimension", f"{NOTHING}: PARO has no kernels for such heads"),
    Reason("fp8 (is not supported|needs compute)", _OTHER_INT8),
    Reason("compute capability", f"{NOTHING}: this GPU is too old for PARO"),
    Reason("rotation at head dimension", _OTHER_INT8),
    Reason("self-check:", _UPDATE),
    # The model, and what is done to it.
    Reason(r"the model class .* is not supported", f"{NOTHING}: docs/models.md lists what is"),
    Reason("the Wan variant .* is not supported", f"{NOTHING}: docs/models.md lists what is"),
    Reason("the autoregressive Wan attends", f"{NOTHING} for this model"),
    Reason("of the U-Nets only SDXL", f"{NOTHING}: docs/models.md lists what is supported"),
    Reason("MiniMax H3 weights made for VSA", f"{NOTHING} for these weights"),
    Reason(r"the model could not be read", f"{_OTHER_NODE}; else report it"),
    Reason("an evaluation of another model", f"{NOTHING}, or patch that model too"),
    Reason(r"an evaluation whose results were not finite", "set precision to 16bit in PARO Settings"),
    Reason("the token layout could not be read", f"{_OTHER_NODE}; else report it"),
    Reason(SKIPPED, NOTHING),
    Reason("no self-attention over the", f"{_OTHER_NODE}; else report it"),
    Reason(NO_CALL, f"{_OTHER_NODE}, or it skipped every step"),
    Reason(r"\d+ self-attention calls where", _OTHER_NODE),
    Reason("this ComfyUI does not tell", "update ComfyUI"),
    Reason("another node replaces blocks", "take away the node that replaces blocks"),
    Reason("the run could not begin", _REPORT_IT),
    Reason("a second attention of the same length", f"{NOTHING}: it is left to ComfyUI"),
    Reason("cross-attention to a text", f"{NOTHING}: it is left to ComfyUI"),
    Reason("the model asks for (full precision|float32)", f"{NOTHING}: the model wants it exact"),
    Reason("a mask of (shape|type)", f"{NOTHING}: PARO has no kernel for such a mask"),
    Reason("gradients are being recorded", f"{NOTHING}: PARO is for sampling, not for training"),
    Reason(".*: no (Llama )?text conditioning", _NO_TEXT),
    Reason(r".*: expected (a|an) (video|image) latent|.*: expected a latent", "connect an empty latent for this model"),
    Reason(".*: the latent .* does not fit", "choose a size that the model's patches divide"),
    Reason(r".*(cannot be told apart|as long as the video)", "change the length of the video or of the text a little"),
    Reason("Krea 2: several frames", "make one picture at a time"),
    Reason("LTX: spatio-temporal guidance", f"{NOTHING}, or do without this guidance"),
    Reason("LTX: .* guide tokens are not whole frames", f"{NOTHING} with these guides"),
    Reason("LTX: a mask takes tokens out", f"{NOTHING} with this mask"),
    Reason("MiniMax H3: (the host|expected a video)", "update ComfyUI, or report it"),
    Reason("Wan Animate 2 attends frame by frame", f"{NOTHING} while a pose is on"),
    Reason("Wan: frames of another size", "give reference frames of the video's size"),
    # Calls that should have been sparse.
    Reason(NOT_FINITE_SITE, "set precision to 16bit in PARO Settings"),
    Reason("is not in the plan", "make the plan anew with PARO Calibrate, or set plan_file to auto"),
    Reason(r"(calibration: )?\w*OutOfMemory\w*:", "use less memory: a smaller size, or fewer frames"),
    Reason("calibration: ", _REPORT_IT),
    Reason(
        r"(a call could not be told apart|the end of an evaluation|standing before another attention): ",
        f"{_OTHER_NODE}; else report it",
    ),
    Reason(r"\w+: ", _REPORT_IT),
)

_SITE = re.compile(r"\b([a-z_]+)\.(\d+)\.(\d+)\b")
_OF_SITE = (
    re.compile(r"^(?P<rest>calibration) of (?P<site>[a-z_]+\.\d+\.\d+|dense attention)(?P<end>: .*)$"),
    re.compile(r"^(?P<site>[a-z_]+\.\d+\.\d+|dense attention):? (?P<end>.*)$"),
)


def layer_words(name: str) -> str:
    """`double.0.0` -> `double block 0`; a second attention in one block says so."""
    found = _SITE.fullmatch(name)
    if found is None:
        return name
    kind, index, call = found.groups()
    block = say("{kind} block {index}", kind=kind, index=index)
    if kind == "block":
        block = say("block {index}", index=index)
    return block if call == "0" else say("{block}, attention {number}", block=block, number=int(call) + 1)


def plain(text: str) -> str:
    """Text with the names of its layers in plain words."""
    return _SITE.sub(lambda found: layer_words(found[0]), text) if _SITE.search(text) else text


def without_layer(reason: str) -> tuple[str, str | None]:
    """A reason, and the layer that it names first, if any: many layers share one reason."""
    for form in _OF_SITE:
        found = form.match(reason)
        if found:
            rest = found.groupdict().get("rest") or ""
            return f"{rest}{found['end']}", layer_words(found["site"])
    return reason, None


def known(reason: str) -> Reason | None:
    """The table's entry for a reason."""
    text, _ = without_layer(reason)
    return next((entry for entry in REASONS if re.match(entry.pattern, text)), None)


def words_of(reason: str) -> str:
    """The reason in plain words, without the layer it names."""
    entry = known(reason)
    return (entry and entry.words) or plain(without_layer(reason)[0])


def hint_of(reason: str) -> str:
    """What to do about it."""
    entry = known(reason)
    return entry.hint if entry else _REPORT_IT


LINE = 120
"""Characters that a status may take: what is longer is cut on the node."""


def with_reason(before: str, reason: str, hint: str | None = None) -> Sentence:
    """`before: reason; hint`, the reason cut where one line cannot hold it: it is whole further down in a report."""
    hint = hint_of(reason) if hint is None else hint
    cut = clipped(words_of(reason), max(40, LINE - len(before) - len(hint) - 4))
    return say("{before}: {reason}; {hint}", before=before, reason=cut, hint=hint)


def not_used(reason: str) -> Sentence:
    """The verdict on a run in which nothing was PARO's."""
    return with_reason(say("Not used"), reason)


def stopped(step: int, steps: int) -> Sentence:
    """Of a sampling that ended early, in its step `step` counted from 0; below 0: before its first one."""
    if step < 0:
        return say("Not finished: the sampling was stopped before its first step; sample again for a report")
    return say(
        "Not finished: the sampling was stopped in step {step} of {steps}; sample again for a report",
        step=step + 1,
        steps=steps,
    )
