"""What our ops ask of a device is pinned to the least: a pass over the logits, or a launch, that is added fails here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rlhf_fast
from rlhf_fast.bench import audit, roofline, traffic
from rlhf_fast.bench.cases import advantages, ppo_loss
from rlhf_fast.bench.command import main
from rlhf_fast.bench.traffic import Count

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def ours(counts, label=""):
    (found,) = [c for c in counts if c.name == "rlhf_fast" and label in c.shape]
    return found


@pytest.fixture(scope="module")
def recorded():
    """The committed counts: {title: [Count]}."""
    document = json.loads((RESULTS / "traffic.json").read_text())
    return {title: [Count(**c) for c in counts] for title, counts in document["counts"].items()}


@pytest.fixture
def mine(monkeypatch):
    """Only our own formulations are counted."""
    monkeypatch.setattr(audit.peers, "attempt", lambda load: "left out")
    monkeypatch.setattr(audit.inductor, "count", lambda name, shape, *rest: Count(name, shape, 1, 1, 1, 1))


@pytest.mark.parametrize("rows, vocab", audit.SHAPES)
def test_logits_are_read_once_forward_and_read_and_written_once_backward(rows, vocab, mine):
    found = audit.from_logits(rows, vocab)
    forward = ours([c for c in found if c.shape.endswith(", forward")])
    both = ours([c for c in found if c.shape.endswith("backward")])
    logits = rows * vocab * 2
    assert forward.launches == 1 and forward.ratio <= 1.02 and logits <= forward.moved < 1.001 * logits
    assert both.launches == 2 and both.ratio <= 1.02 and 3 * logits <= both.moved < 3.001 * logits
    assert forward.peak < 0.001 * logits and both.peak < 1.001 * logits  # the gradient


def test_advantages_take_two_launches_and_the_ppo_loss_one_with_its_backward(mine):
    found = audit.from_tokens()
    scan = ours(found, "advantages")
    # 29 bytes a token in and out; whitening needs all advantages first, and reads and writes 9 more.
    assert scan.launches == 2 and scan.ratio > 1.3 and scan.moved <= 1.01 * (29 + 9) * 512 * 2048
    loss = ours(found, "ppo_loss")
    # One launch finds loss, gradients and statistics; PyTorch's backward makes a 1 and scales the gradients by it, in place.
    assert loss.launches == 3 and loss.ratio <= 1.5 and loss.peak <= 8 * 512 * 2048 + 1000


def test_advantages_that_are_not_whitened_take_one_launch():
    x = {n: torch.empty(512, 2048, device="meta") for n in ("values", "logprobs", "ref_logprobs")}
    scores, mask = torch.empty(512, device="meta"), torch.empty(512, 2048, dtype=torch.bool, device="meta")
    with traffic.Traffic() as counted, audit.direct(counted):
        rlhf_fast.advantages(scores, x.pop("values"), mask, **x, kl_coef=0.1, whiten=False)
    assert counted.launches == 1 and counted.read + counted.written <= 1.01 * 29 * 512 * 2048


def test_the_loss_has_its_gradients_after_one_launch():
    x = {n: torch.empty(512, 2048, device="meta") for n in ("old_logprobs", "advantages", "old_values", "returns")}
    x["mask"] = torch.empty(512, 2048, dtype=torch.bool, device="meta")
    logprobs, values = (torch.empty(512, 2048, device="meta", requires_grad=True) for _ in range(2))
    with traffic.Traffic() as counted, audit.direct(counted):
        loss = ppo_loss.ours(logprobs, values, x)
    tokens = 512 * 2048
    assert loss.requires_grad and counted.launches == 1
    assert 33 * tokens <= counted.read + counted.written < 33.01 * tokens


def test_a_pass_that_is_added_is_found(mine, monkeypatch):
    """The pins above are no tautology: a formulation with one more pass over the logits breaks them."""

    def twice(logits, ids):
        rlhf_fast.token_logprobs(logits, ids)
        out = rlhf_fast.token_logprobs(logits, ids)
        return out.logprobs, out.entropy

    monkeypatch.setattr(audit.tokens, "ours", twice)
    found = ours([c for c in audit.from_logits(64, 1000) if c.shape.endswith("forward")])
    assert found.ratio > 1.9 and found.launches == 2


def test_the_committed_counts_of_our_ops_are_those_of_today(recorded, mine):
    fresh = [c for rows, vocab in audit.SHAPES for c in audit.from_logits(rows, vocab)] + audit.from_tokens()
    known = {(c.name, c.shape): c for counts in recorded.values() for c in counts}
    compared = [c for c in fresh if c.name == "rlhf_fast"]
    assert len(compared) == 6
    for c in compared:
        assert c == known[c.name, c.shape], "run `rlhf-fast bench --traffic` and commit what it writes"


def test_the_committed_table_has_every_formulation(recorded):
    text = (RESULTS / "traffic.md").read_text()
    assert text == audit.tables(list(recorded.items()))
    names = {c.name for counts in recorded.values() for c in counts}
    assert {"rlhf_fast", "eager", "torch.compile", "TRL, PyTorch path", "TRL, its Triton kernels", "verl"} <= names


def test_others_move_more_than_ours(recorded):
    """A sanity check of the counting: nothing moves less than the least, and ours is at it."""
    for counts in recorded.values():
        for c in counts:
            assert c.moved >= 0.99 * c.minimum or "advantages" in c.shape, c  # others have two results there, not four
            if c.name.startswith("rlhf_fast"):
                assert c.flops or c.ratio < 1.6


def test_stages_of_advantages_in_plain_pytorch_are_those_of_our_op():
    x = advantages.make(6, 300)
    with torch.no_grad():
        expected = advantages.ours(x)
        for scan in (advantages.gae.loop, advantages.gae.chunked):
            for got, want in zip(advantages.stages(scan, *(x[k] for k in advantages.TENSORS)), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_peers_triton_kernels_are_counted_by_their_arguments():
    """TRL's own kernels on a GPU: the logits once forward, read and written once backward."""
    module = audit.peers.attempt(audit.peers.trl_kernels)
    if isinstance(module, str):
        pytest.skip(module)
    found = [c for c in audit.from_logits(64, 5000) if c.name == "TRL, its Triton kernels"]
    logits = 64 * 5000 * 2
    assert [c.launches for c in found] == [1, 2]
    assert logits <= found[0].moved < 1.02 * logits and 3 * logits <= found[1].moved < 3.03 * logits


def test_bounds_are_bytes_or_products_whichever_takes_longer():
    card = roofline.Card("card", bandwidth=1e9, products=1e12)
    assert card.seconds(Count("a", "s", 2 * 10**9, 1, 0, 10**9)) == pytest.approx(2.0)
    assert card.seconds(Count("a", "s", 10**9, 1, 0, 10**9, 3 * 10**12)) == pytest.approx(3.0)
    text = roofline.table([Count("a", "s", 10**9, 1, 0, 10**9, 3 * 10**12), Count("b", "s", 10**6, 1, 0, 1)], [card])
    lines = text.splitlines()
    assert "model prediction, not a measurement" in lines[0] and "card" in lines[0]
    assert lines[2] == "| s | b | 1 |" and lines[3] == "| s | a | 3e+03 products |"
    assert all(line.count("|") == 4 for line in lines)


def test_peak_rates_are_those_of_the_data_sheets():
    assert [(c.name[:4], c.bandwidth / 1e12) for c in roofline.CARDS] == [
        ("A100", 2.039),
        ("H100", 3.35),
        ("B200", 8.0),
    ]


def test_the_command_counts_writes_and_leaves_the_rest_of_a_readme(tmp_path, capsys, monkeypatch):
    later = "[{}, {}] bfloat16, forward".format(*audit.SHAPES[1])
    rows = [Count(name, shape, 10**9, 1, 2**30, 10**9) for name in ("rlhf_fast", "eager") for shape in ("[2]", later)]
    counts = [("title", rows)]
    monkeypatch.setattr(audit, "sections", lambda: counts)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- traffic -->\nold\n<!-- /traffic -->\nafter\n")
    files = [str(tmp_path / name) for name in ("new/t.json", "new/t.md")]
    assert main(["--traffic", "--json", files[0], "--markdown", files[1], "--readme", str(readme)]) == 0
    assert "| [2] | rlhf_fast | 1.00 | 1.00 x | 1 | 1.00 |" in capsys.readouterr().out
    assert json.loads(Path(files[0]).read_text())["counts"]["title"][0]["moved"] == 10**9
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    counted, bounds = text.split("not a measurement")
    assert "| [2] | eager |" in counted and later not in text and "| [2] | rlhf_fast | 0.49 |" in bounds
    assert "eager" not in bounds and f"| {later} | eager | " in Path(files[1]).read_text()
