"""What the denoising losses share."""

from __future__ import annotations

import torch

from shoestring.interfaces import Batch
from shoestring.objectives.denoising import (
    batch_starts,
    draw_keep,
    drop_captions,
    in_eval_mode,
    kept_patches,
    mean_over_patches,
)


def make_batch(count: int, *, masked: bool = True, first: int = 0) -> Batch:
    mask = torch.tensor([[True, True, False]]).expand(count, -1) if masked else None
    return Batch(
        index=torch.arange(first, first + count),
        latents=torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(first)),
        text=torch.ones(count, 3, 5),
        text_mask=mask,
        captions=tuple("abcdefgh"[:count]),
    )


def test_the_share_of_dropped_captions_is_the_one_asked_for() -> None:
    dropped = drop_captions(make_batch(4000), 0.1, seed=0).text.abs().sum(dim=(1, 2)) == 0
    assert 0.085 < dropped.float().mean() < 0.115


def test_a_dropped_caption_is_one_zero_token_with_a_mask_and_all_zero_without() -> None:
    masked = drop_captions(make_batch(4), 0.9999, seed=0)
    assert masked.text_mask is not None
    assert masked.text.abs().max() == 0
    assert masked.text_mask.tolist() == [[True, False, False]] * 4
    plain = drop_captions(make_batch(4, masked=False), 0.9999, seed=0)
    assert plain.text_mask is None
    assert plain.text.shape == (4, 3, 5)
    assert plain.text.abs().max() == 0


def test_draws_belong_to_images_not_to_batches() -> None:
    """Two batches of 4 keep and drop what one batch of 8 does."""
    whole = make_batch(8)
    parts = list(whole.parts(2))
    keep = draw_keep(whole, 2, 0.75, seed=3)
    assert keep is not None
    halves = [draw_keep(part, 2, 0.75, seed=3) for part in parts]
    assert torch.equal(keep, torch.cat([half for half in halves if half is not None]))
    text = [drop_captions(part, 0.5, seed=3).text for part in parts]
    assert torch.equal(drop_captions(whole, 0.5, seed=3).text, torch.cat(text))


def test_a_mask_keeps_the_stated_number_of_distinct_patches() -> None:
    keep = draw_keep(make_batch(50), 2, 0.75, seed=0)
    assert keep is not None
    assert keep.shape == (50, 4)
    assert all(len(set(row)) == 4 and row == sorted(row) for row in keep.tolist())
    counts = torch.bincount(keep.flatten(), minlength=16)
    assert counts.min() > 0, "every patch is kept by some image"
    assert draw_keep(make_batch(2), 2, 0.0, seed=0) is None


def test_the_smallest_scores_are_kept() -> None:
    assert kept_patches(torch.tensor([[0.9, 0.1, 0.5, 0.2]]), 0.5).tolist() == [[1, 3]]


def test_the_mean_is_over_kept_patches_alone() -> None:
    error = torch.arange(16.0).view(1, 1, 4, 4)
    keep = torch.tensor([[0, 3]])  # top left and bottom right of a 2 x 2 grid of 2 x 2 patches
    assert mean_over_patches(error, keep, 2).item() == (0 + 1 + 4 + 5 + 10 + 11 + 14 + 15) / 8
    assert mean_over_patches(error, None, 2).item() == 7.5


def test_images_of_a_batch_share_the_position_it_starts_at() -> None:
    index = torch.arange(10, 22)
    assert batch_starts(index, 5, start=10).tolist() == [10] * 5 + [15] * 5 + [20] * 2
    assert batch_starts(index[3:7], 5, start=10).tolist() == [10, 10, 15, 15]


def test_evaluation_mode_ends_as_it_began_part_by_part() -> None:
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    network[1].eval()
    with in_eval_mode(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == [True, True, False, False]
