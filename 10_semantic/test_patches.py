"""patches.py, typos.py and the study of bytes: causality, boundaries, round trips, typos, costs."""

import bytes_study
import draw_bytes
import pytest
import torch
from blocks import AdamW, TransformerConfig, TransformerLM
from patches import (
    PatchConfig,
    PatchLM,
    entropy_patches,
    fixed_patches,
    generate_bytes,
    hash_ngrams,
    ids_to_text,
    lm_flops,
    next_byte_entropy,
    patch_flops,
    text_to_ids,
    threshold_for,
    trunk_flops,
)
from typos import recase, typos

import common

VERSE = "To-morrow, and to-morrow, and to-morrow,\nCreeps in this petty pace from day to day,\n" * 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes):
    shape = dict(context_length=64, d_local=32, d_model=48, n_layers=2, window=6, ngram_rows=512)
    return PatchLM(PatchConfig(**shape | changes))


def guesser():
    """A byte model with sharp, varied predictions, so that boundaries move with the bytes."""
    model = TransformerLM(TransformerConfig(256, 64, 32, 1, 2, window=8, tie_embeddings=False))
    with torch.no_grad():
        model.output.weight.mul_(4)
    return model


def ends_of(model, size=3.0):
    ids = torch.randint(256, (8, 64))
    threshold = threshold_for(next_byte_entropy(model, ids), size)
    return lambda ids: entropy_patches(next_byte_entropy(model, ids), threshold)


def test_nothing_before_a_byte_sees_it():
    find_ends, model = ends_of(guesser()), small()
    ids = torch.randint(256, (4, 40))
    before, ends = model(ids, find_ends(ids)), find_ends(ids)
    moved = 0
    for t in (1, 7, 20, 39):
        other = ids.clone()
        other[:, t] = (ids[:, t] + 101) % 256
        other_ends = find_ends(other)
        after = model(other, other_ends)
        assert torch.equal(other_ends[:, :t], ends[:, :t])
        moved += (other_ends != ends).sum().item()
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-4, atol=1e-5)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # and all behind it does
    assert moved > 0  # boundaries did change, or half of the test was idle


def test_the_large_model_is_heard_from_the_end_of_a_patch_on():
    # A window of 1 and one block: what is behind the boundary can hear byte 0 through patches only.
    model = small(window=1, ngrams=(), n_layers=1)
    ids, ends = torch.randint(256, (1, 12)), torch.zeros(1, 12, dtype=torch.bool)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 256
    apart = (model(ids, ends) - model(other, ends)).abs().amax(-1)[0]
    assert apart[0] > 1e-4 and apart[1:].max() == 0  # without patches each byte is alone
    ends[0, [0, 5]] = True
    apart = (model(ids, ends) - model(other, ends)).abs().amax(-1)[0]
    assert apart.min() > 1e-5
    ends[0, 0] = False  # now byte 0 ends no patch, and byte 5 alone stands for the first one
    apart = (model(ids, ends) - model(other, ends)).abs().amax(-1)[0]
    assert apart[1:].max() == 0


def test_rows_with_fewer_patches_are_not_changed_by_the_padding():
    model, ids = small(), torch.randint(256, (2, 30))
    ends = torch.stack([fixed_patches(30, 2), fixed_patches(30, 9)])
    both = model(ids, ends)
    for i in range(2):
        torch.testing.assert_close(model(ids[i : i + 1], ends[i : i + 1])[0], both[i])
    none = torch.zeros(2, 30, dtype=torch.bool)
    assert model(ids, none).isfinite().all()


def test_fixed_patches_by_hand():
    assert fixed_patches(8, 3).tolist() == [False, False, True, False, False, True, False, False]
    assert fixed_patches(3, 1).all() and not fixed_patches(3, 4).any()


def test_entropy_patches_by_hand():
    entropy = torch.tensor([[0.5, 2.0, 1.9, 0.1, 1.0]])
    assert entropy_patches(entropy, 1.5).tolist() == [[False, True, True, False, False]]
    # The rise keeps the first of two hard bytes in a row, and finds a small one after an easy one.
    assert entropy_patches(entropy, 0.8, "rise").tolist() == [[False, True, False, False, True]]


def test_entropy_is_that_of_the_next_byte():
    model = guesser()
    ids = torch.randint(256, (2, 20))
    probs = model(ids).double().softmax(-1)
    by_hand = torch.distributions.Categorical(probs=probs).entropy().float()
    torch.testing.assert_close(next_byte_entropy(model, ids), by_hand, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.output.weight.zero_()
    assert next_byte_entropy(model, ids)[0, 0].item() == pytest.approx(8 * 0.693147, rel=1e-5)


@pytest.mark.parametrize("rule", ["global", "rise"])
@pytest.mark.parametrize("size", [1.5, 4.5, 10])
def test_threshold_gives_the_wanted_size(rule, size):
    entropy = torch.rand(20, 512)
    ends = entropy_patches(entropy, threshold_for(entropy, size, rule), rule)
    assert 1 / ends.float().mean().item() == pytest.approx(size, rel=0.01)


def test_ngram_rows_depend_on_their_bytes_only():
    ids = text_to_ids("xxabcd..abcd")[None]
    rows = hash_ngrams(ids, (2, 4), 1000)[0]  # (12, 2)
    assert torch.equal(rows[5], rows[11])  # "cd" and "abcd" both times
    assert rows[4, 0] == rows[10, 0]  # "bc"
    assert rows[4, 1] != rows[10, 1]  # "xabc" is not ".abc"
    assert (rows[:, 0] < 1000).all() and (rows[:, 1] >= 1000).all() and (rows < 2000).all()
    padded = hash_ngrams(torch.tensor([[0, 0]]), (2,), 1000)[0]
    assert padded[0] != padded[1]  # what stands before the text is not a byte 0
    many = hash_ngrams(torch.randint(256, (1, 20_000)), (3,), 1000)
    counts = torch.bincount(many.flatten(), minlength=1000)
    assert counts.min() > 0 and counts.max() < 60  # 20 each, about: the hash spreads


def test_ngrams_reach_the_logits():
    # Without attention beyond itself a byte has only its n-gram to know its neighbour by.
    model, ids = small(window=1, ngrams=(2,)), torch.randint(256, (1, 9))
    ends, other = torch.zeros(1, 9, dtype=torch.bool), ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % 256
    apart = (model(ids, ends) - model(other, ends)).abs().amax(-1)[0]
    assert (apart > 1e-4).tolist() == [t in (3, 4) for t in range(9)]


def test_learns_a_handful_of_lines_by_heart():
    ids = text_to_ids(VERSE)[:61][None]
    model, ends = small(), fixed_patches(60, 4)[None]
    optimizer = AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    first = model(ids[:, :-1], ends, ids[:, 1:]).item()
    for _ in range(60):
        loss = model(ids[:, :-1], ends, ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first > 5 and loss.item() < 0.02
    said = generate_bytes(model, lambda ids: fixed_patches(ids.shape[1], 4)[None], ids[:, :20], 40)
    assert ids_to_text(said[0]) == VERSE[:60]


def test_generation_is_the_full_forward():
    find_ends, model = ends_of(guesser()), small()
    said = generate_bytes(model, find_ends, torch.randint(256, (2, 5)), 30)
    logits = model(said, find_ends(said))
    assert said.shape == (2, 35) and torch.equal(logits[:, 4:-1].argmax(-1), said[:, 5:])
    assert find_ends(said)[:, 5:].any()
    long = generate_bytes(model, find_ends, torch.randint(256, (1, 64)), 3)  # beyond the context
    assert model(long[:, 2:66], find_ends(long[:, 2:66]))[0, -1].argmax() == long[0, 66]
    with pytest.raises(ValueError, match="at least one byte"):
        generate_bytes(model, find_ends, torch.zeros(1, 0, dtype=torch.int64), 1)


@pytest.mark.parametrize("text", ["", "To be", "naïve café", "漢字", "👩‍👩‍👧 🤦🏽", "\0\r\n\x7f"])
def test_bytes_round_trip(text):
    ids = text_to_ids(text)
    assert ids_to_text(ids) == text and len(ids) == len(text.encode()) and ids.dtype == torch.int64


def test_half_a_character_is_not_an_error():
    assert ids_to_text(text_to_ids("a👩")[:3]) == "a\ufffd"


def test_flops_by_hand():
    config = TransformerConfig(256, 8, 8, 1, 2, d_ff=16)
    # qkv 8 x 24, out 8 x 8, gate and up 8 x 32, down 16 x 8; 10 pairs of 4 vectors, 2 x 2 x 8 each
    assert trunk_flops(config, 4) == 2 * 4 * (192 + 64 + 256 + 128) + 10 * 32
    assert lm_flops(config, 4) == trunk_flops(config, 4) + 2 * 4 * 8 * 256
    narrow = TransformerConfig(256, 8, 8, 1, 2, d_ff=16, window=2)
    assert trunk_flops(narrow, 4) == 2 * 4 * 640 + 7 * 32  # 1 + 2 + 2 + 2 pairs
    shared = TransformerConfig(256, 8, 8, 3, 2, n_kv_heads=1, d_ff=16)
    assert trunk_flops(shared, 4) == 3 * (2 * 4 * (128 + 64 + 256 + 128) + 10 * 32)
    c = small().config
    parts = trunk_flops(c.encoder, 60) + trunk_flops(c.decoder, 60) + trunk_flops(c.large, 15)
    assert patch_flops(c, 60, 15) == parts + 2 * 15 * 2 * 32 * 48 + 2 * 60 * 32 * 256


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = small(window=64), torch.randint(256, (1, 60))
    with FlopCounterMode(display=False) as counter:
        model(ids, fixed_patches(60, 4)[None])
    # Torch counts attention to all keys, ours to those in sight: the rest is the same.
    c = model.config
    unseen = sum(
        4 * (T * T - T * (T + 1) // 2) * config.d_model * config.n_layers
        for config, T in ((c.encoder, 60), (c.decoder, 60), (c.large, 15))
    )
    counted = counter.get_total_flops()
    attention = sum(
        4 * T * T * config.d_model * config.n_layers
        for config, T in ((c.encoder, 60), (c.decoder, 60), (c.large, 15))
    )
    assert patch_flops(c, 60, 15) + unseen in (counted, counted + attention)


@pytest.mark.parametrize(
    "bad, why",
    [
        (dict(d_local=30, local_heads=4), "not divisible"),
        (dict(d_model=0), "d_model is 0"),
        (dict(window=0), "window 0"),
        (dict(ngrams=(1, 3)), "at least 2 bytes"),
        (dict(ngram_rows=0), "ngram_rows is 0"),
    ],
)
def test_bad_shapes(bad, why):
    with pytest.raises(ValueError, match=why):
        PatchConfig(**bad)


def test_bad_input():
    model, ids = small(), torch.zeros(1, 65, dtype=torch.int64)
    with pytest.raises(ValueError, match="65 bytes do not fit into 64"):
        model(ids, ids > 0)
    with pytest.raises(ValueError, match="bool"):
        model(ids[:, :9], ids[:, :8] > 0)
    with pytest.raises(ValueError, match="bool"):
        model(ids[:, :9], ids[:, :9])
    for call in (lambda: fixed_patches(4, 0), lambda: threshold_for(torch.rand(9), 1.0)):
        with pytest.raises(ValueError, match="the size must be"):
            call()
    with pytest.raises(ValueError, match="neither global nor rise"):
        entropy_patches(torch.rand(3), 0.5, "both")
    for bad in (dict(flops=0), dict(context_length=4), dict(entropy_share=1.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            bytes_study.BytesOptions(**bad)


# ---- typos


def test_typos():
    text = VERSE * 20
    for rate in (0.1, 0.3):
        noised = typos(text, rate, seed=1)
        assert noised == typos(text, rate, seed=1) != typos(text, rate, seed=2)
        words = [(a, b) for a, b in zip(text.split(), noised.split(), strict=True)]
        # to-morrow is two words with a chance each: count by the parts that hyphens leave
        parts = [p for a, b in words for p in zip(a.split("-"), b.split("-"), strict=True)]
        changed = sum(a != b for a, b in parts) / len(parts)
        assert changed == pytest.approx(rate, abs=0.04)
        assert all(abs(len(a) - len(b)) <= 1 for a, b in parts)
    assert typos(text, 0.0, 0) == text
    assert typos("a I 12 3,", 1.0, 0) == "a I 12 3,"  # nothing here is a word of two letters
    every = {typos("oath", 1.0, s) for s in range(300)}
    assert {"aoth", "oth", "ooath", "osth"} <= every and "oath" not in every
    assert "oo" not in {typos("oo", 1.0, s) for s in range(50)}
    assert {t[0].isupper() for t in {typos("Qw", 1.0, s) for s in range(50)}} == {True, False}
    with pytest.raises(ValueError, match="between 0 and 1"):
        typos(text, 1.5, 0)


def test_recase():
    assert recase("To Be, ï", "lower") == "to be, ï" and recase("To Be", "upper") == "TO BE"
    mixed = recase(VERSE, "random", 3)
    assert mixed == recase(VERSE, "random", 3) != recase(VERSE, "random", 4)
    assert mixed.lower() == VERSE.lower()
    letters = [c for c in mixed if c.isalpha()]
    assert sum(c.isupper() for c in letters) / len(letters) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="title"):
        recase("x", "title")


# ---- the study


def test_score_counts_each_byte_once():
    # A model that knows nothing: 8 bits a byte, whatever the windows, and the tail counts, too.
    model = TransformerLM(TransformerConfig(256, 16, 32, 1, 2, tie_embeddings=False))
    with torch.no_grad():
        model.output.weight.zero_()
    one = torch.ones(256, dtype=torch.int64)
    contender = bytes_study.Contender(model, text_to_ids, one)
    for text in ("ab", "abc" * 5 + "ab", VERSE, "naïve 👩"):
        assert contender.score(text) == pytest.approx(8, rel=1e-5)
    # With tokens of 2 bytes each the same bits spread over twice the bytes.
    double = bytes_study.Contender(model, text_to_ids, one * 2)
    assert double.score(VERSE) == pytest.approx(4, rel=1e-5)
    with pytest.raises(ValueError, match="two bytes"):
        contender.score("a")


def test_the_five_are_compared_at_equal_flops(tmp_path):
    text = VERSE * 8
    o = bytes_study.BytesOptions(flops=2.5e9, context_length=32, sample=200)
    both = [bytes_study.compare(text, VERSE + common.EOT + VERSE, common.Tokenizer(), o)]
    both.append(bytes_study.compare(text, VERSE + common.EOT + VERSE, common.Tokenizer(), o))
    assert set(both[0]["results"]) == {"bpe", "bytes", "ngrams", "fixed", "entropy"}
    for name, row in both[0]["results"].items():
        assert 0.9 * o.flops < row["flops"] <= o.flops
        assert row["clean"] < 8 and all(row[key] > 0 for key in draw_bytes.TITLES)
        again = both[1]["results"][name]
        assert all(row[key] == again[key] for key in draw_bytes.TITLES)  # seeded
    draw_bytes.draw_scores(both[0]["results"], tmp_path / "scores.png")
    assert len(both[0]["lines"]) > 0
    for line, entropy, ends in both[0]["lines"]:
        assert len(line) == len(entropy) == len(ends)
    draw_bytes.draw_patches(both[0]["lines"], both[0]["threshold"], tmp_path / "patches.png")
    assert all((tmp_path / f"{n}.png").stat().st_size > 10_000 for n in ("scores", "patches"))
    with pytest.raises(ValueError, match="too short"):
        bytes_study.compare("short", VERSE, common.Tokenizer(), o)
    o.flops = 1e3
    with pytest.raises(ValueError, match="do not pay for one step"):
        bytes_study.compare(text, VERSE, common.Tokenizer(), o)
