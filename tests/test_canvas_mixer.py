"""Convolutions over the canvas: what they join, what they leave alone."""

import pytest
import torch

from vlmslice.canvas_mixer import CanvasMixer
from vlmslice.sheets import lay_out_sheets

WIDTH = 16
# An overview of 2 x 2 patches and four slices of 2 x 3; and an image of one view.
SIZES = torch.tensor([[2, 2], *[[2, 3]] * 5])
BOXES = torch.tensor([(0, 0, 4, 6), (0, 0, 2, 3), (0, 3, 2, 6), (2, 0, 4, 3), (2, 3, 4, 6), (0, 0, 2, 3)])
NUM_VIEWS = torch.tensor([5, 1])
SHEETS = lay_out_sheets(SIZES, 6, BOXES, NUM_VIEWS)


def trained_mixer(dilations=(1, 2)) -> CanvasMixer:
    torch.manual_seed(0)
    mixer = CanvasMixer(WIDTH, dilations)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def changed_by(mixer: CanvasMixer, view: int, patch: int) -> set[tuple[int, int]]:
    """Views and patches of the output that depend on one patch of the input."""
    features = torch.randn(6, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    other = features.clone()
    other[view, patch] = -other[view, patch]
    with torch.no_grad():
        difference = mixer(other, SHEETS) - mixer(features, SHEETS)
    return {tuple(place) for place in torch.nonzero(difference.abs().amax(-1) > 1e-6).tolist()}


def test_untrained_it_does_nothing():
    features = torch.randn(6, 6, WIDTH)
    assert torch.equal(CanvasMixer(WIDTH, (1, 2))(features, SHEETS), features)


def test_a_patch_reaches_over_the_seam_as_far_as_the_dilations_go():
    """The last patch in the first row of the first slice lies at (0, 2) of the canvas."""
    places = changed_by(trained_mixer((1,)), view=1, patch=2)
    assert places == {(1, 1), (1, 2), (2, 0), (1, 4), (1, 5), (2, 3)}
    reached = changed_by(trained_mixer((1, 2)), view=1, patch=2)
    assert reached > places
    assert {view for view, _ in reached} == {1, 2, 3, 4}
    assert (2, 2) in reached  # (0, 5), three patches further
    assert changed_by(trained_mixer((1,)), view=5, patch=0) == {(5, 0), (5, 1), (5, 3), (5, 4)}


def test_the_overview_is_spread_over_the_slices_and_stays_what_it_is():
    mixer = trained_mixer((1,))
    reached = changed_by(mixer, view=0, patch=0)
    assert (1, 0) in reached and (0, 0) in reached
    assert not any(view == 5 for view, _ in reached)
    features = torch.randn(6, 6, WIDTH)
    with torch.no_grad():
        assert torch.equal(mixer(features, SHEETS)[0], features[0])


def test_images_of_a_batch_do_not_touch():
    """Alike or not in shape."""
    mixer, features = trained_mixer(), torch.randn(6, 6, WIDTH)
    twice = torch.cat([features, features.flip(1)])
    sheets = lay_out_sheets(torch.cat([SIZES, SIZES]), 6, torch.cat([BOXES, BOXES]), NUM_VIEWS.repeat(2))
    with torch.no_grad():
        got = mixer(twice, sheets)
        expected = [mixer(half, SHEETS) for half in twice.split(6)]
    torch.testing.assert_close(got, torch.cat(expected))


@pytest.mark.parametrize("views", [[5], [0, 1, 2, 3, 4]])
def test_every_weight_has_a_gradient(views):
    """Also where no image has an overview: processes that train together wait for each of them."""
    mixer = trained_mixer()
    number = torch.tensor([len(views)])
    sheets = lay_out_sheets(SIZES[views], 6, BOXES[views], number)
    mixer(torch.randn(len(views), 6, WIDTH), sheets).sum().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())
    assert bool(mixer.overview.weight.grad.abs().sum() > 0) == (len(views) > 1)
