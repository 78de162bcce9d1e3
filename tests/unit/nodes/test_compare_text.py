"""What PARO Compare says: the sentence, and a hint wherever the figures would mislead."""

import math
from types import SimpleNamespace

import pytest
from comfyui_paro.nodes.compare.compare import Figures
from comfyui_paro.nodes.compare.text import PLAIN, TWO_MODELS, Timed, labels, sentence, text, why_not_sparse
from comfyui_paro.paro_runtime.compiling.readiness import COMPILING

FIGURES = Figures(False, 38.21, (40.0,) * 11 + (35.1,) + (40.0,) * 17, 0.9813, 1.04)
SIZE = (1, 29, 192, 192)


def report(**changes):
    """As much of a report as the text looks at."""
    values = {"sites": 4, "sites_sparse": 4, "steps": 8, "calls": {"sparse": 20, "dense step": 12}, "passed": []}
    values |= {"fallbacks": [], "notes": [], "why_dense": "", "backend": "triton"} | changes
    return SimpleNamespace(**values, status=lambda: "1.9x faster per step", attention_error=(0.03, 0.05))


def runs(first=62.2, second=32.5, steps=(3.1,) * 20, other="none", **changes):
    return Timed(first, steps, other), Timed(second, steps, report(**changes))


def said(*timed, names=PLAIN, figures=FIGURES, size=SIZE, **more):
    first, *facts = text(names, *timed, figures, compared="8 steps", size=size, **more).splitlines()
    assert all(fact.startswith("- ") for fact in facts)  # plain lines are run together by the page
    return [first, *(fact.removeprefix("- ") for fact in facts)]


def test_the_sentence():
    assert sentence(PLAIN, *runs(), FIGURES, False) == (
        "1.9x as fast: 62.2 s without PARO, 32.5 s with it; PSNR 38.2 dB, worst frame 35.1 dB (frame 12 of 29), "
        "SSIM 0.981."
    )
    two = sentence(TWO_MODELS, *runs(9.5, 10), Figures(False, 30.0, (30.0,), None), True)
    assert two == "0.95x as fast: 9.50 s with the other model, 10.0 s with the model; PSNR 30.0 dB."
    several = sentence(PLAIN, *runs(), Figures(False, 30.0, (math.inf, 27.0), 0.9), True)
    assert "worst image 27.0 dB (image 2 of 2)" in several


def test_the_sentence_without_figures():
    plain = "1.9x as fast: 62.2 s without PARO, 32.5 s with it"
    assert sentence(PLAIN, *runs(), None, False) == plain + "."
    assert sentence(PLAIN, *runs(), Figures(True, math.inf, (math.inf,), 1.0, 1.0), False) == (
        plain + "; the two results are identical."
    )
    assert sentence(PLAIN, *runs(), Figures(False, flicker=1.2, missing="why"), False) == plain + "."
    assert sentence(PLAIN, *runs(0.0, 0.0), None, False) == "0.00 s without PARO, 0.00 s with it."


def test_the_lines():
    lines = said(*runs())
    assert lines[1] == "flicker: 1.04 times that without PARO (1: alike, above 1: it flickers more)"
    assert lines[2:] == [
        "PARO: 1.9x faster per step",
        "PARO: attention error 3.0 %, in the worst layer 5.0 % "
        "(against exact attention, relative L2, on a sample of the rows)",
        "compared: 8 steps; 29 frames of 192 x 192",
        "timed: the sampling alone, not loading and decoding; first without PARO, then with it",
        "picture: without PARO | with PARO | difference, 8 times as bright",
    ]
    assert "2 images of 64 x 32" in "\n".join(said(*runs(), size=(2, 1, 32, 64)))
    assert labels(PLAIN, *runs()) == ["without PARO  62.2 s", "with PARO  32.5 s", "difference x8"]


def test_what_is_missing_is_said_first():
    assert said(*runs(), figures=None, size=None, trouble="no picture: why")[1] == "no picture: why"
    assert said(*runs(), figures=Figures(False, missing="kornia is not there"))[1] == "kornia is not there"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"passed": [("too few tokens", 9)]}, "too few tokens"),
        ({"fallbacks": [("no memory", 9)]}, "no memory"),
        ({"calls": {"sparse": 0, "dense step": 4, COMPILING: 9}}, COMPILING),
        ({"calls": {"sparse": 0, "dense step": 8}, "why_dense": "the first 4 of 20 are"}, "the first 4 of 20 are"),
        ({"calls": {"sparse": 0}, "sites": 0}, "no self-attention call was seen"),
        ({"calls": {"sparse": 0, "dense step": 8}}, "all 8 steps were dense"),
    ],
)
def test_nothing_sparse_has_a_reason(changes, why):
    assert why in why_not_sparse(report(sites_sparse=0, **changes))
    assert said(*runs(sites_sparse=0, **changes))[1].startswith("hint: nothing was sparse (PARO): ")


def test_no_hint_without_a_reason_for_one():
    assert not any("hint" in line for line in said(*runs()))
    assert why_not_sparse(report()) == ""


def test_compiling_is_told():
    for changes in ({"calls": {"sparse": 9, COMPILING: 4}}, {"notes": ["it is compiled anew"]}):
        assert said(*runs(**changes))[1].startswith("hint: this run (PARO) included compiling")


def test_a_slow_first_step_is_told():
    (hint,) = [line for line in said(*runs(steps=(9.0, 3.0, 3.0, 3.1))) if "hint" in line]
    assert hint.startswith("hint: the first step without PARO took 9.00 s, later ones 3.00 s")
    for steps in ((), (9.0,), (9.0, 3.0), (4.0, 3.0, 3.0)):
        assert not any("hint" in line for line in said(*runs(steps=steps)))


def test_the_reference_is_told():
    assert "PyTorch reference" in said(*runs(backend="reference"))[1]


def test_of_two_models_both_are_reported_where_paro_is_on_both():
    first, second = runs()
    alone = "\n".join(said(first, second, names=TWO_MODELS))
    assert "model: 1.9x" in alone and "other: 1.9x" not in alone and "hint" not in alone
    both = "\n".join(said(Timed(1.0, (), report()), second, names=TWO_MODELS))
    assert "other: 1.9x" in both and "other: attention error" in both and "without PARO" not in both
