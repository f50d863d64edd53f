"""The numbers behind the views, each compared with a slow reference; and a new view."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stage1_tokenizer.diagnostics.report import tokenizer as report_tokenizer
from stage1_tokenizer.diagnostics.report.run_folder import open_run
from stage1_tokenizer.diagnostics.views import VIEWS
from stage1_tokenizer.diagnostics.views.atlas import atlas_of, mean_patches, nearest_codes, short_percent
from stage1_tokenizer.diagnostics.views.base import Subject, View, encode_images, encoded_images, once
from stage1_tokenizer.diagnostics.views.curves import smooth
from stage1_tokenizer.diagnostics.views.holes import count_kept, depth_kept, find_holes, hole_masks
from stage1_tokenizer.diagnostics.views.latent_maps import latent_colours
from stage1_tokenizer.diagnostics.views.masked_latents import change_by_distance, masked, masks_of
from stage1_tokenizer.diagnostics.views.projection import pca
from stage1_tokenizer.diagnostics.views.random_codes import shuffled, uniform_codes, unigram_codes
from stage1_tokenizer.diagnostics.views.reconstructions import groups_by_psnr
from stage1_tokenizer.diagnostics.views.sheet import TOP, Sheet
from stage1_tokenizer.engine.log_file import read_curves
from tests.helpers.artefacts import shapes, write_tokenizer
from tests.helpers.commands import names_of, run
from tests.helpers.report_runs import Page


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_and_codes() -> tuple[Tensor, Tensor]:
    """Return images (5, 3, 8, 12) and codes (5, 2, 3) below 9, some of them unused."""
    x = torch.rand(5, 3, 8, 12, generator=generator()) * 2 - 1
    codes = torch.randint(0, 9, (5, 2, 3), generator=generator(1))
    codes[codes == 4] = 7
    return x, codes


def test_a_new_view_is_in_both_outputs_and_its_numbers_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few functions and an entry in VIEWS: analyze.py draws its PNG, and the page has its section."""
    asked: list[Subject] = []

    @once
    def brightness(subject: Subject) -> float:
        asked.append(subject)
        return float(encoded_images(subject).x.mean())

    def draw(subject: Subject) -> Sheet:
        return Sheet(TOP, "Brightness", f"{brightness(subject) + brightness(subject):.3f}", "")

    def show(subject: Subject) -> str:
        return f"The mean value is {brightness(subject):.4f}."

    added = (*VIEWS, View("brightness", "How bright", draw, show, json=lambda subject: str(brightness(subject))))
    monkeypatch.setattr(report_tokenizer, "VIEWS", added)
    loaded = write_tokenizer(tmp_path)
    names = names_of("stage1_tokenizer/analyze.py")
    names["VIEWS"] = added
    ended = run(names["main"], "--tokenizer", tmp_path)
    assert ended.code == 0, ended.err
    assert (tmp_path / "analysis/brightness.png").is_file()
    assert len(asked) == 1
    wanted = float(encode_images(loaded, shapes()).x.mean())
    assert float((tmp_path / "analysis/brightness.json").read_text()) == pytest.approx(wanted)
    page = Page(report_tokenizer.tokenizer_page(open_run(tmp_path), torch.device("cpu")))
    assert len(asked) == 2
    assert f"The mean value is {wanted:.4f}." in page.text
    assert "#brightness" in [each["href"] for each in page.all("a")]


def test_mean_patches_are_those_of_a_loop() -> None:
    x, codes = images_and_codes()
    ids, counts, patches = mean_patches(x, codes)
    assert ids.tolist() == sorted(set(codes.flatten().tolist()))
    assert counts.tolist() == [c for c in np.bincount(codes.flatten().numpy()).tolist() if c]
    for code, patch in zip(ids.tolist(), patches, strict=True):
        under = [
            x[n, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            for n in range(5) for i in range(2) for j in range(3) if codes[n, i, j] == code
        ]  # fmt: skip
        torch.testing.assert_close(patch, torch.stack(under).mean(dim=0))


def test_the_atlas_is_ordered_by_use_and_its_nearest_codes_are_those_of_brute_force() -> None:
    x, codes = images_and_codes()
    codebook = torch.randn(11, 6, generator=generator(2))
    atlas = atlas_of(x, codes, codebook, neighbours=3)
    assert 4 not in atlas.ids
    assert atlas.counts.sum() == codes.numel()
    keys = [(-count, code) for count, code in zip(atlas.counts.tolist(), atlas.ids.tolist(), strict=True)]
    assert keys == sorted(keys)
    for code, nearest, distances in zip(atlas.ids.tolist(), atlas.nearest, atlas.distances, strict=True):
        apart = {other: float((codebook[code] - codebook[other]).norm()) for other in range(11) if other != code}
        assert nearest.tolist() == sorted(apart, key=lambda other: apart[other])[:3]
        assert distances.tolist() == pytest.approx([apart[other] for other in nearest.tolist()], rel=1e-5)
    written = json.loads(atlas.json())
    assert written["codebook_size"] == 11
    assert [entry["id"] for entry in written["codes"]] == atlas.ids.tolist()
    assert sum(entry["share"] for entry in written["codes"]) == pytest.approx(1.0, abs=1e-6)


def test_a_codebook_of_one_or_two_has_fewer_neighbours() -> None:
    assert nearest_codes(torch.zeros(1, 4), torch.tensor([0]), 3)[0].shape == (1, 0)
    assert nearest_codes(torch.eye(2), torch.tensor([1]), 3)[0].tolist() == [[0]]


def test_pca_is_that_of_a_singular_value_decomposition_with_signs_of_its_own() -> None:
    vectors = torch.randn(40, 5, generator=generator()) @ torch.randn(5, 5, generator=generator(1)) + 3.0
    found = pca(vectors, 3)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    for component in range(3):
        axis = found.axes[:, component].numpy()
        assert abs(axis @ axes[component]) == pytest.approx(1.0, abs=1e-8)
        assert axis[np.abs(axis).argmax()] > 0
    np.testing.assert_allclose(found.explained, (singular**2 / (singular**2).sum())[:3], rtol=1e-8)
    np.testing.assert_allclose(found(vectors).mean(dim=0), 0.0, atol=1e-9)
    mirrored = pca(vectors.flip(0), 3)  # the same set in another order
    torch.testing.assert_close(mirrored.axes, found.axes)


@pytest.mark.parametrize("vectors", [torch.full((7, 4), 2.5), torch.randn(1, 4), torch.randn(6, 1)])
def test_pca_of_too_few_dimensions_has_components_of_zero(vectors: Tensor) -> None:
    """A tokenizer with one used code; one with a single channel."""
    found = pca(vectors, 3)
    assert found(vectors).shape == (len(vectors), 3)
    assert torch.isfinite(found(vectors)).all()
    assert (found(vectors)[:, 1:] == 0).all()


def test_equal_latents_have_equal_colours_and_a_constant_one_is_grey() -> None:
    z_q = torch.randn(6, 8, generator=generator())[torch.randint(0, 6, (4, 3, 5), generator=generator(1))]
    colours, explained = latent_colours(z_q.permute(0, 3, 1, 2))
    assert colours.shape == (4, 3, 5, 3)
    assert 0 <= float(colours.min()) < float(colours.max()) <= 1
    assert float(explained.sum()) <= 1 + 1e-9
    same = (z_q[0, 0, 0] == z_q).all(dim=-1)
    assert (colours[same] == colours[0, 0, 0]).all()
    assert (latent_colours(torch.ones(2, 4, 3, 3))[0] == 0.5).all()


def test_uniform_codes_take_the_whole_range_evenly() -> None:
    codes = uniform_codes(torch.Size((50, 4, 5, 2)), 16, generator())
    counts = torch.bincount(codes.flatten(), minlength=16)
    assert len(counts) == 16
    assert (counts - 125).abs().max() < 50  # four to five standard deviations


def test_unigram_codes_follow_the_counts_of_their_own_codebook() -> None:
    counts = torch.tensor([[0, 30, 10, 0], [5, 0, 0, 15]])
    codes = unigram_codes(counts, torch.Size((100, 4, 5, 2)), generator())
    for k in range(2):
        drawn = torch.bincount(codes[..., k].flatten(), minlength=4).double()
        assert ((drawn == 0) == (counts[k] == 0)).all()
        np.testing.assert_allclose(drawn / drawn.sum(), counts[k] / counts[k].sum(), atol=0.05)


def test_shuffled_latents_are_whole_vectors_of_real_ones() -> None:
    z_q = torch.arange(4 * 3 * 2 * 5).reshape(4, 3, 2, 5).float()
    anywhere, in_place = shuffled(z_q, 6, generator())
    assert anywhere.shape == in_place.shape == (6, 3, 2, 5)
    vectors = {tuple(vector) for vector in z_q.permute(0, 2, 3, 1).flatten(0, 2).tolist()}
    assert {tuple(vector) for vector in anywhere.permute(0, 2, 3, 1).flatten(0, 2).tolist()} <= vectors
    for i in range(2):
        for j in range(5):
            assert {tuple(v) for v in in_place[:, :, i, j].tolist()} <= {tuple(v) for v in z_q[:, :, i, j].tolist()}


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (8, 8), (7, 4)])
def test_masks_change_the_latent_where_they_are_true_and_nowhere_else(grid: tuple[int, int]) -> None:
    z_q = torch.randn(3, 4, *grid, generator=generator())
    by = torch.randn(4, generator=generator(1))
    masks = masks_of(*grid, seed=0)
    for mask in masks.values():
        assert mask.any()
        changed = masked(z_q, mask, by)
        assert (changed[:, :, ~mask] == z_q[:, :, ~mask]).all()
        assert (changed[:, :, mask] == by[:, None]).all()
    assert int(masks["half at random"].sum()) == -(-grid[0] * grid[1] // 2)
    again, other = masks_of(8, 8, seed=0)["half at random"], masks_of(8, 8, seed=1)["half at random"]
    assert (masks_of(8, 8, seed=0)["half at random"] == again).all()
    assert (again != other).any()


def test_change_by_distance_is_that_of_a_loop() -> None:
    change = torch.rand(2, 8, 12, generator=generator())
    mask = torch.tensor([[True, False, False], [False, False, False]])
    means = change_by_distance(change, mask, factor=4)
    rings: dict[int, list[Tensor]] = {}
    for row in range(8):
        for column in range(12):
            rings.setdefault(max(0, row - 3, column - 3), []).append(change[:, row, column])
    assert means == pytest.approx([float(torch.stack(rings[distance]).mean()) for distance in range(9)])
    assert len(change_by_distance(change, torch.ones(2, 3, dtype=torch.bool), factor=4)) == 1


def test_smoothing_is_its_closed_form() -> None:
    values, weight = [3.0, -1.0, 4.0, 1.5, 9.0], 0.7
    for t, smoothed in enumerate(smooth(values, weight)):
        weights = [weight ** (t - i) for i in range(t + 1)]
        wanted = sum(w * value for w, value in zip(weights, values, strict=False)) / sum(weights)
        assert smoothed == pytest.approx(wanted)
    assert smooth([2.0] * 9) == pytest.approx([2.0] * 9)  # no pull to zero at the start


def test_a_log_that_was_cut_off_gives_the_entries_before(tmp_path: Path) -> None:
    lines = ['{"step": 1, "train/l2": 0.5}', '{"step": 2, "train/l2": NaN, "x": 1}', '{"step": 3, "train/l2": 0.25}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "tra', "7"]))
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves == {"train/l2": ([1, 3], [0.5, 0.25]), "x": ([2], [1.0])}
    assert read_curves(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 11, 40])
def test_best_median_and_worst_are_that_and_no_image_is_shown_twice(n: int) -> None:
    psnr = torch.randperm(n, generator=generator()).float()
    groups = groups_by_psnr(psnr, 4)
    shown = [place for places in groups.values() for place in places]
    assert len(shown) == len(set(shown)) == (min(n, 3) if n < 6 else 3 * min(4, n // 3))
    values = [float(psnr[place]) for place in shown]
    assert values == sorted(values, reverse=True)
    assert values[0] == n - 1
    assert n == 1 or values[-1] == 0
    if n == 40:
        assert groups["median"] == [int((psnr == rank).nonzero()) for rank in (21, 20, 19, 18)]


def test_holes_are_black_pixels_in_one_colour_and_their_depth_is_measured() -> None:
    x = torch.full((3, 3, 10, 12), -1.0)
    x[1, 0, 2:7, 3:9] = 0.8
    x[2, 1, 2:7, 3:9] = 0.8
    x[2, 0, 2:7, 6:9] = 0.8  # another colour
    x[1:, :, 4, 4] = x[1, :, 5, 7] = -1.0
    x[2, :, 4, 6] = -1.0  # neighbours of two colours
    masks = hole_masks(x)
    assert masks[0].sum() == 0
    assert masks[1].nonzero().tolist() == [[4, 4], [5, 7]]
    assert masks[2].nonzero().tolist() == [[4, 4]]
    rectangle = find_holes(x, torch.tensor([0, 1, 0]))
    most = find_holes(x, torch.tensor([0, 1, 1]))
    assert rectangle is not None
    assert most is not None
    assert (rectangle.image, most.image) == (2, 1)
    assert find_holes(x[:1], torch.tensor([0])) is None
    filled = x[1].clone()
    filled[0, 4, 4] = filled[0, 5, 7] = 0.8
    assert depth_kept(x[1], x[1], masks[1]) == pytest.approx(1.0)
    assert depth_kept(x[1], filled, masks[1]) == pytest.approx(0.0, abs=1e-6)
    assert depth_kept(x[1], (x[1] + filled) / 2, masks[1]) == pytest.approx(0.5)


@pytest.mark.parametrize(("depth", "kept"), [(1.0, 2), (0.6, 2), (0.4, 0), (0.0, 0)])
def test_a_hole_is_kept_if_it_is_darker_than_half_the_shape(depth: float, kept: int) -> None:
    """A hole at the shape's left border counts too; a reconstruction that is dark elsewhere does not help."""
    x = torch.full((2, 3, 10, 12), -1.0)
    x[:, 0, 2:7, 3:9] = 0.8
    x[1, :, 4, 4] = x[1, :, 5, 7] = -1.0
    x_hat = x.clone()
    for row, column in ((4, 4), (5, 7)):
        x_hat[1, 0, row, column] = 0.8 - depth * 1.8
    x_hat[0, 0, 3, 5] = -1.0  # no hole of the original
    assert count_kept(x, x_hat) == (2, kept)


def test_shares_fit_under_a_patch() -> None:
    shares = {1.0: "100%", 0.62: "62%", 0.0996: "10%", 0.034: "3.4%", 0.00996: "1.0%", 0.0056: ".56%", 1e-6: "<.01%"}
    assert {share: short_percent(share) for share in shares} == shares
