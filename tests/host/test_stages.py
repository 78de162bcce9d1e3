"""Steps and stages in the real host: one schedule over several samplers, and samplers with their own idea of steps."""

import pytest
import torch

GRID = (5, 7, 9)
SPARSE = {"preset": "custom", "density": 0.4}
HIGH, LOW = "high", "low"


@pytest.fixture(scope="module")
def low_file(comfy, tmp_path_factory):
    """A tiny Wan that is another model than `wan`, as the expert for low noise is."""
    return comfy.build_wan(tmp_path_factory.mktemp("low") / "low.safetensors", ffn_dim=256)


# Stages (model, first step, end), steps, and sparse steps: as many as in one sampler, whether or not a plan is found.
TABLE = {
    "4": ([(HIGH, 0, 4)], 4, 3),
    "2+2": ([(HIGH, 0, 2), (LOW, 2, 4)], 4, 3),
    "2+2, one model": ([(HIGH, 0, 2), (HIGH, 2, 4)], 4, 3),
    "2+2+2": ([(HIGH, 0, 2), (HIGH, 2, 4), (LOW, 4, 6)], 6, 5),
    "1+1+1+1": ([(HIGH, n, n + 1) for n in range(4)], 4, 3),
    "1+1+1+1, two models": ([(HIGH, 0, 1), (HIGH, 1, 2), (LOW, 2, 3), (LOW, 3, 4)], 4, 3),
    "1+3+4": ([(HIGH, 0, 1), (HIGH, 1, 4), (LOW, 4, 8)], 8, 7),
    "20": ([(HIGH, 0, 20)], 20, 16),
    "10+10": ([(HIGH, 0, 10), (LOW, 10, 20)], 20, 16),
    "2+18": ([(HIGH, 0, 2), (HIGH, 2, 20)], 20, 16),
}


def _sample_stages(comfy, models, stages, steps, scheduler, store):
    """Every stage by the host's advanced sampler; returns the reports."""
    pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")
    import nodes

    latent, reports = {"samples": comfy.latent(GRID)}, []
    for number, (name, first, end) in enumerate(stages):
        model = comfy.patched(models[name], store=store, **SPARSE)
        fixed = (steps, 1.0, "euler", scheduler, comfy.text(1), comfy.text(2))
        noise, rest = ("disable", "enable")[number == 0], ("disable", "enable")[end < steps]
        with torch.inference_mode():
            latent = nodes.KSamplerAdvanced().sample(model, noise, 0, *fixed, latent, first, end, rest)[0]
        reports.append(comfy.report(model))
    return reports


def _check_stages(comfy, wan, low_file, store, stages, steps, sparse, scheduler):
    models = {HIGH: wan, LOW: comfy.load(low_file) if any(name == LOW for name, *_ in stages) else None}
    for its in (None, store, store):
        reports = _sample_stages(comfy, models, stages, steps, scheduler, its)
        calls = sum(report.calls.get("sparse", 0) for report in reports)
        assert (calls, sum(r.dense_steps for r in reports)) == (sparse * comfy.LAYERS, steps - sparse)
        assert sum(sum(report.calls.values()) for report in reports) == steps * comfy.LAYERS
        for report in reports:
            # A stage without a sparse step, or with a dense one that the whole schedule would not have, says why.
            assert report.sites_sparse or ("No gain: " in report.status() and ", the first " in report.status())
            assert not report.fallbacks and not report.passed
    assert all(report.plan_source == "plan found" and "no plan" not in report.text() for report in reports)


@pytest.mark.parametrize("stages, steps, sparse", TABLE.values(), ids=TABLE)
def test_stages_have_the_sparse_calls_of_the_whole_schedule(comfy, wan, low_file, store, stages, steps, sparse):
    _check_stages(comfy, wan, low_file, store, stages, steps, sparse, "simple")


@pytest.mark.parametrize("scheduler", ["normal", "sgm_uniform", "beta"])
@pytest.mark.parametrize("name", ["2+2", "1+1+1+1"])
def test_other_schedulers(comfy, wan, low_file, store, name, scheduler):
    stages, steps, sparse = TABLE[name]
    _check_stages(comfy, wan, low_file, store, stages, steps, sparse, scheduler)


def _custom(comfy, model, sigmas, sampler, start=None):
    """The host's custom sampling without guidance."""
    empty = comfy.latent(GRID)
    noise = comfy.comfy.sample.prepare_noise(empty, 0)
    texts = comfy.text(1), comfy.text(2)
    with torch.inference_mode():
        given = (noise, 1.0, sampler, sigmas, *texts, empty if start is None else start)
        return comfy.comfy.sample.sample_custom(model, *given, disable_pbar=True, seed=0)


def _euler(comfy):
    return comfy.comfy.samplers.ksampler("euler")


def _sigmas(comfy, model, steps):
    return comfy.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def test_a_second_sampler_from_half_the_noise_has_no_dense_step(comfy, wan, store):
    """denoise below 1: the schedule is the end of a longer one. With a plan and without."""
    for _ in range(2):
        model = comfy.patched(wan, store=store, **SPARSE)
        _custom(comfy, model, _sigmas(comfy, wan, 20)[-11:], _euler(comfy))
        report = comfy.report(model)
        assert (report.dense_steps, report.steps, report.plan.made["criterion"]) == (0, 10, "error")
        assert report.calls == {"sparse": 10 * comfy.LAYERS}


def test_rising_sigmas(comfy, wan, store):
    """Unsampling: its own first steps are dense, and the second run is the first once more."""
    rising, start, outs = torch.linspace(0.02, 0.9, 11), torch.randn(comfy.latent(GRID).shape), []
    for _ in range(2):
        model = comfy.patched(wan, store=store, **SPARSE)
        outs.append(_custom(comfy, model, rising, _euler(comfy), start))
        report = comfy.report(model)
        assert (report.dense_steps, report.steps) == (2, 10)
        assert report.calls == {"sparse": 8 * comfy.LAYERS, "dense step": 2 * comfy.LAYERS}
    assert report.plan_source == "plan found" and torch.equal(*outs)


@pytest.mark.parametrize("told", [[1.0, 0.0], [1.0, 0.9, 0.5, 0.0]])
def test_a_sampler_with_sigmas_of_its_own(comfy, wan, store, told):
    """It says so where the host keeps the sigmas that are sampled."""
    real = _sigmas(comfy, wan, 10)

    def own(model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra_args["model_options"]["transformer_options"]["sample_sigmas"] = real
        return comfy.comfy.k_diffusion.sampling.sample_euler(model, x, real.to(x), extra_args=extra_args, disable=True)

    model = comfy.patched(wan, store=store, **SPARSE)
    _custom(comfy, model, torch.tensor(told), comfy.comfy.samplers.KSAMPLER(own))
    report = comfy.report(model)
    assert (report.dense_steps, report.steps, report.plan.made["criterion"]) == (2, 10, "mass")
    assert report.calls == {"sparse": 8 * comfy.LAYERS, "dense step": 2 * comfy.LAYERS}


@pytest.mark.parametrize("told", [[1.0, float("nan"), 0.0], [float("inf"), 0.5, 0.0], [[1.0, 0.5, 0.0]], [0.5], None])
def test_sigmas_that_cannot_be_a_schedule_are_not_followed(comfy, wan, told):
    def own(model, x, sigmas, extra_args=None, callback=None, disable=None):
        given = None if told is None else torch.tensor(told)
        extra_args["model_options"]["transformer_options"]["sample_sigmas"] = given
        return comfy.comfy.k_diffusion.sampling.sample_euler(model, x, sigmas, extra_args=extra_args, disable=True)

    model = comfy.patched(wan, **SPARSE)
    _custom(comfy, model, _sigmas(comfy, wan, 10), comfy.comfy.samplers.KSAMPLER(own))
    report = comfy.report(model)
    assert (report.dense_steps, report.steps) == (2, 10) and not report.passed
    assert report.calls == {"sparse": 8 * comfy.LAYERS, "dense step": 2 * comfy.LAYERS}


@pytest.mark.parametrize("sampler, evaluations, dense", [("euler", 8, 2), ("heun", 15, 3)])
def test_noise_that_a_sampler_adds_before_each_step(comfy, wan, store, sampler, evaluations, dense):
    """s_churn: every step is evaluated above its own sigma. heun's second evaluation counts as the next step."""
    churned = comfy.comfy.samplers.ksampler(sampler, {"s_churn": 3.0})
    model = comfy.patched(wan, store=store, dense_steps=2, **SPARSE)
    _custom(comfy, model, _sigmas(comfy, wan, 8), churned)
    report = comfy.report(model)
    assert (report.dense_steps, report.steps) == (2, 8)
    assert report.calls == {"sparse": (evaluations - dense) * comfy.LAYERS, "dense step": dense * comfy.LAYERS}


def test_a_sampler_that_goes_back(comfy, wan, store):
    """Restarts: what is done again is dense again, and counted."""

    def restarting(model, x, sigmas, extra_args=None, callback=None, disable=None):
        euler = comfy.comfy.k_diffusion.sampling.sample_euler
        x = euler(model, x, sigmas[:6], extra_args=extra_args, disable=True)
        return euler(model, x + torch.randn_like(x) * 0.1, sigmas[1:], extra_args=extra_args, disable=True)

    for _ in range(2):
        model = comfy.patched(wan, store=store, dense_steps=2, **SPARSE)
        _custom(comfy, model, _sigmas(comfy, wan, 8), comfy.comfy.samplers.KSAMPLER(restarting))
        report = comfy.report(model)
        assert (report.dense_steps, report.steps) == (3, 12)
        assert report.calls == {"sparse": 9 * comfy.LAYERS, "dense step": 3 * comfy.LAYERS}


def test_a_schedule_is_placed_by_the_models_own_scale(comfy, wan, flux):
    """What share of the time is over, for every step of the host's even schedule, shifted or not."""
    from comfy.model_sampling import ModelSamplingContinuousEDM, ModelSamplingDiscrete
    from comfyui_paro.paro_runtime.host.noise import time_gone

    scales = [model.get_model_object("model_sampling") for model in (wan, flux)]
    for scale in (*scales, ModelSamplingDiscrete(), ModelSamplingContinuousEDM()):
        sigmas = comfy.comfy.samplers.calculate_sigmas(scale, "simple", 8)
        shares = [time_gone(scale)(float(sigma)) for sigma in sigmas]
        assert shares == pytest.approx([n / 8 for n in range(9)], abs=2e-3) and shares[0] < 1e-6
    assert time_gone(object()) is None


@pytest.mark.parametrize("shift", [1.0, 12.0])
@pytest.mark.parametrize("steps, first, end", [(20, 0, 6), (8, 2, 8)])
def test_a_schedule_of_a_node_behind_paro(comfy, wan, shift, steps, first, end):
    """Another shift puts a stage elsewhere in the whole schedule; before PARO or after it is the same."""
    pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    import nodes

    def shifted(model):
        return ModelSamplingSD3().patch(model, shift)[0]

    outs, latent = [], {"samples": comfy.latent(GRID)}
    for model in (comfy.patched(shifted(wan), **SPARSE), shifted(comfy.patched(wan, **SPARSE))):
        fixed = (steps, 1.0, "euler", "simple", comfy.text(1), comfy.text(2))
        with torch.inference_mode():
            found = nodes.KSamplerAdvanced().sample(model, "enable", 0, *fixed, latent, first, end, "enable")[0]
        outs.append((found["samples"], comfy.report(model).calls))
    assert torch.equal(outs[0][0], outs[1][0]) and outs[0][1] == outs[1][1]
    assert outs[0][1].get("dense step", 0) == {0: 4, 2: 0}[first] * comfy.LAYERS
