"""Plan files from strangers: damaged, of older versions, with wrong content."""

import json
import random
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_paro.kernels.core.block_mask import pack_bits
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.plan import file as plan_file_module
from comfyui_paro.paro_runtime.plan.file import LIMITS, file_digest, load_plan, read_header, save_plan
from comfyui_paro.paro_runtime.plan.plan import PER_GROUP, ModelIdentity, Plan, PlanError, Site, SitePlan
from comfyui_paro.tests.mutated_plans import IDENTITY, make_plan, mutate, same, without_masks
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.mark.parametrize("groups", [1, 3])
def test_a_plan_comes_back_as_it_was_saved(groups, tmp_path):
    plan = make_plan(groups)
    save_plan(plan, tmp_path / "p.safetensors")
    loaded = load_plan(tmp_path / "p.safetensors")
    assert same(loaded, plan) and loaded.groups == groups == len(loaded.densities)
    entry = loaded.sites[Site("double", 1)]
    for group in range(groups):
        assert torch.equal(entry.mask(group=group).float().mean((1, 2)), plan.sites[Site("double", 1)].density[group])
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_plan_from_before_rotations_rotates_nothing(tmp_path, monkeypatch):
    plan, path = make_plan(), tmp_path / "p.safetensors"
    dumps = json.dumps

    def without(header):
        for entry in header["sites"]:
            del entry["rotate"]
        return dumps(header)

    monkeypatch.setattr(json, "dumps", without)
    save_plan(plan, path)
    assert not any(entry.rotate for entry in load_plan(path).sites.values())


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("seed", [*range(4), None])
def test_mutated_plans_are_refused_in_one_line(seed, masks, tmp_path):
    """Two thousand in all; the last seed is fresh in every run and named on failure."""
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    chance, path = random.Random(seed), tmp_path / "p.safetensors"
    plan = make_plan() if masks else without_masks(make_plan())
    save_plan(plan, path)
    data = path.read_bytes()
    for number in range(200):
        path.write_bytes(mutate(data, chance))
        try:
            loaded = load_plan(path)
        except PlanError as error:
            assert str(error).startswith("plan p.safetensors: ") and "\n" not in str(error) and len(str(error)) < 400
        else:
            # White space in the file's own header may change without changing anything.
            assert same(loaded, plan), f"seed {seed}, mutation {number}"


def test_a_plan_without_masks_is_read_as_it_was_written(tmp_path):
    for name, plan in (("with", make_plan()), ("without", without_masks(make_plan()))):
        save_plan(plan, tmp_path / name)
        assert same(load_plan(tmp_path / name), plan)
    assert (tmp_path / "without").stat().st_size < (tmp_path / "with").stat().st_size


@pytest.mark.parametrize("value, told", [(0.0, "is no share of the blocks"), (1.5, "is no share of the blocks")])
def test_what_a_plan_without_masks_asks_for_is_checked(value, told, tmp_path):
    plan = without_masks(make_plan())
    site = Site("double", 1)
    plan.sites[site] = replace(plan.sites[site], density=torch.full((3, 4), value))
    save_plan(plan, tmp_path / "p.safetensors")
    with pytest.raises(PlanError, match=told):
        load_plan(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    "bad, told",
    [
        ({"tail_bias": torch.full((4,), 99.0)}, "beyond 20"),
        ({"tail_bias": torch.full((4,), float("nan"))}, "not finite"),
        ({"density": torch.zeros(4)}, "is no share of the blocks"),
        ({"density": torch.full((4,), 0.99)}, "does not have the density"),
        ({"mass_kept": torch.full((4,), 1e30)}, "mass_kept is no share"),
        ({"mass_kept": torch.full((4,), -1.0)}, "mass_kept is no share"),
        ({"rotate": "yes"}, "rotate of 'double.1.0' is 'yes'"),
        ({"rotate": 1}, "expected true or false"),
        ({"packed": torch.zeros(13, dtype=torch.uint8)}, "keeps no block"),
    ],
)
@pytest.mark.parametrize("group", range(3))
def test_a_consistent_file_with_wrong_content_is_refused(bad, told, group, tmp_path):
    """The checksum is right in these: whoever writes a file can also sign it. One wrong group is enough."""
    plan = make_plan()
    entry = plan.sites[Site("double", 1)]
    for name, value in bad.items():
        if name in PER_GROUP:
            value = torch.stack([value if g == group else its for g, its in enumerate(getattr(entry, name))])
        plan.sites[Site("double", 1)] = replace(entry, **{name: value})
    save_plan(plan, tmp_path / "p.safetensors")
    with pytest.raises(PlanError, match=told):
        load_plan(tmp_path / "p.safetensors")


def add_falloffs(path: Path, falloff: torch.Tensor) -> None:
    """Make of a plan file one as they were when plans held how attention falls off with distance."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["paro"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for number, entry in enumerate(header["sites"]):
        entry["falloff"] = True
        tensors[f"{number:04d}.falloff"] = falloff.clone()
    text = json.dumps(header)
    save_file(tensors, path, metadata={"paro": text, "paro_sha256": file_digest(text, tensors)})


def test_a_plan_that_has_falloffs_opens_as_one_without(tmp_path):
    plan, path, again = make_plan(), tmp_path / "p.safetensors", tmp_path / "again.safetensors"
    save_plan(plan, path)
    new = path.read_bytes()
    assert b"falloff" not in new
    add_falloffs(path, torch.randint(0, 256, (4, 17), dtype=torch.uint8))
    loaded = load_plan(path)
    assert same(loaded, plan) and path.stat().st_size > len(new)
    save_plan(loaded, again)
    # The bytes may differ: the order of two entries of the header is not fixed.
    assert same(load_plan(again), plan) and again.stat().st_size == len(new)
    # The checksum is over them too.
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlanError, match="checksum"):
        load_plan(path)


@pytest.mark.parametrize(
    "falloff, told",
    [
        (torch.zeros(4, 17), r"0000\.falloff is F32"),
        (torch.zeros(3, 17, dtype=torch.uint8), r"0000\.falloff is U8 \[3, 17\], expected U8 \[4, 17\]"),
        (torch.zeros(1, 4, 17, dtype=torch.uint8), r"0000\.falloff is U8"),
        (torch.zeros((), dtype=torch.uint8), r"0000\.falloff is U8"),
        (torch.zeros(4, 8006, dtype=torch.uint8), r"0000\.falloff is U8 \[4, 8006\], expected U8 \[4, 8005\]"),
    ],
)
def test_falloffs_of_a_wrong_shape_are_refused_unread(falloff, told, tmp_path):
    save_plan(make_plan(), tmp_path / "p.safetensors")
    add_falloffs(tmp_path / "p.safetensors", falloff)
    with pytest.raises(PlanError, match=told):
        load_plan(tmp_path / "p.safetensors")


def test_falloffs_count_towards_what_a_file_may_hold(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    save_plan(make_plan(), path)
    monkeypatch.setitem(LIMITS, "mask_bytes", 3 * 4 * (3 * 25 // 8 + 8005) - 1)
    load_plan(path)
    add_falloffs(path, torch.zeros(4, 17, dtype=torch.uint8))
    with pytest.raises(PlanError, match="masks over"):
        load_plan(path)


@pytest.mark.parametrize(
    "groups, told",
    [
        (0, "0 groups of steps, expected 1 to 8"),
        (9, "9 groups"),
        (2, r"0000.density is F32 \[3, 4\], expected F32 \[2"),
        (True, "whole"),
    ],
)
def test_the_number_of_groups_is_checked(groups, told, tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "groups", groups)
    plan = make_plan()
    save_plan(plan, tmp_path / "p.safetensors")
    with pytest.raises(PlanError, match=told):
        load_plan(tmp_path / "p.safetensors")


def test_the_limit_counts_the_masks_of_every_group(tmp_path, monkeypatch):
    monkeypatch.setitem(LIMITS, "mask_bytes", 3 * 4 * (2 * 25 // 8))
    for groups in (2, 3):
        save_plan(make_plan(groups), tmp_path / f"{groups}.safetensors")
    load_plan(tmp_path / "2.safetensors")
    with pytest.raises(PlanError, match="masks over"):
        load_plan(tmp_path / "3.safetensors")


def test_a_header_tells_all_but_the_sites(tmp_path):
    plan, path = make_plan(), tmp_path / "p.safetensors"
    save_plan(plan, path)
    header = read_header(path)
    assert header.sites == {} and same(replace(header, sites=plan.sites), plan)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PlanError, match="not a complete safetensors file"):
        read_header(path)


@pytest.mark.parametrize("heads", [1, 8, 13])
def test_kept_blocks_are_counted_by_heads_and_rows(heads):
    mask = torch.rand(heads, 5, 77) < 0.3
    mask[:, :, 3] = True
    mask[heads - 1, 4] = False
    mask[heads - 1, 4, 76] = True
    kept, least = plan_file_module._kept_blocks(pack_bits(mask), mask.shape)
    assert torch.equal(kept, mask.sum((1, 2))) and least == mask.sum(2).min() == 1
    mask[heads - 1, 4] = False
    assert plan_file_module._kept_blocks(pack_bits(mask), mask.shape)[1] == 0


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that torch makes while this is on and that are alive at once, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self._known.discard(key)
        self.now -= size


def test_reading_takes_a_few_times_the_file(tmp_path):
    """Of one site of 40 heads at 480p."""
    layout, shape = TokenLayout(0, (13, 30, 52)), (40, 159, 317)
    masks = [torch.rand(shape) < 0.3 for _ in range(3)]
    for mask in masks:
        mask[:, :, 0] = True
    entry = SitePlan.joined([SitePlan.create(("FHW",) * 40, mask, None, torch.ones(40)) for mask in masks])
    path = tmp_path / "p.safetensors"
    save_plan(Plan(IDENTITY, layout, 128, {Site("a", 0): entry}), path)
    with LiveBytes() as live:
        load_plan(path)
    assert live.most < 2.5 * path.stat().st_size


def test_a_row_that_keeps_nothing_is_refused_even_with_a_right_checksum(tmp_path):
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[1, 3] = False
    entry = SitePlan.create(("FHW", "HWF"), mask, None, torch.ones(2))
    layout = TokenLayout(0, (4, 8, 10))
    save_plan(Plan(ModelIdentity("wan", "a", "b"), layout, 64, {Site("double", 0): entry}), tmp_path / "x.safetensors")
    with pytest.raises(PlanError, match=r"0000\.mask has a row that keeps no block"):
        load_plan(tmp_path / "x.safetensors")


@pytest.mark.parametrize("target", ["much", None, [1], True, -1, 1.5, 10**30])
def test_a_target_that_is_no_share_is_refused(target, tmp_path):
    """A report compares it with what is kept."""
    save_plan(replace(make_plan(1), settings={"mass_target": target}), tmp_path / "p.safetensors")
    with pytest.raises(PlanError, match="a mass_target of"):
        read_header(tmp_path / "p.safetensors")
