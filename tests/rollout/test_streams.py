from __future__ import annotations

import torch

from rlhf_fast.rollout.streams import counter_uniform, philox


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v]) for v in values)


def test_philox_gives_the_known_answers_of_its_authors():
    """kat_vectors of Random123 1.14, philox4x32 10."""
    ones = 0xFFFFFFFF
    cases = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((ones,) * 4, (ones,) * 2): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
        ): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (counter, key), expected in cases.items():
        assert " ".join(f"{int(x):08x}" for x in philox(words(*counter), words(*key))) == expected


def test_a_stream_depends_on_its_seed_and_place_alone():
    seeds = torch.tensor([0, 1, -1, 2**62, 2**32, -(2**63)])
    whole = counter_uniform(seeds, 50)
    assert torch.equal(counter_uniform(seeds[3:4], 9)[0], whole[3, :9])
    assert len(set(whole[:, 0].tolist())) == 6
    assert whole.dtype == torch.float64 and whole.min() >= 0 and whole.max() < 1


def test_numbers_are_uniform_and_streams_uncorrelated():
    x = counter_uniform(torch.arange(400), 500)
    cells = torch.bincount((x.flatten() * 100).long(), minlength=100).double()
    chi = ((cells - 2000) ** 2 / 2000).sum()
    assert 99 - 5 * (2 * 99) ** 0.5 < chi < 99 + 5 * (2 * 99) ** 0.5
    centred = x - 0.5
    between_streams = (centred[:-1] * centred[1:]).mean() * 12
    along = (centred[:, :-1] * centred[:, 1:]).mean() * 12
    assert abs(between_streams) < 5 / (399 * 500) ** 0.5 and abs(along) < 5 / (400 * 499) ** 0.5
