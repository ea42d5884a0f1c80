"""Encoding, branches, losses, shaping, calibration, data and commands, against what others give."""

import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import chats
import figures
import formats
import numpy as np
import pairs
import preferences
import pytest
import reward
import torch
from reward import (
    RewardModel,
    Whitening,
    bradley_terry_loss,
    collate,
    encode_all,
    margin_ranking_loss,
    preference_loss,
    shape_reward,
)
from trunk import TransformerConfig, TransformerLM

import common

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)
SHAPE = dict(vocab_size=259, context_length=64, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2)
BT = reward.TrainConfig(centre=0.0)


def new_model(seed=0, bidirectional=False, dtype=torch.float32, **changes):
    """A small reward model whose norms are not all 1 and whose head is not 0."""
    torch.manual_seed(seed)
    model = RewardModel(TransformerLM(TransformerConfig(**SHAPE | changes)), bidirectional)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.to(dtype)


@pytest.fixture
def chatml(tmp_path):
    """A tokenizer of bytes with ChatML's tokens, and the template."""
    template = chats.choose("chatml")
    files, _ = formats.add_tokens({}, template)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return common.Tokenizer(tmp_path), template


def asked(prompt, chosen, rejected, **more):
    return dict(
        prompt=[dict(role="user", content=prompt)], chosen=chosen, rejected=rejected, **more
    )


TRIPLE = [asked("Hi", "yes", "no"), asked("Hi", "yes", "nay"), asked("Ho", "a", "bcd")]


def some_examples(n=7, seed=0):
    """Examples of random ids: a prompt with two to four replies, the first against the others."""
    random, found = np.random.default_rng(seed), []
    for _ in range(n):
        sizes = random.integers(2, 7, random.integers(3, 6))
        ids = random.integers(259, size=sizes.sum()).tolist()
        branches = np.repeat(np.arange(len(sizes)), sizes).tolist()
        found.append((ids, (branches, [(0, i, 0.0, 1.0, i) for i in range(1, len(sizes) - 1)])))
    return found


# ---- comparisons as tokens


def test_pairs_of_one_prompt_are_read_together():
    first, second = reward.group(TRIPLE)
    assert first[1:] == (["yes", "no", "nay"], [(0, 1, 0.0, 1.0, 0), (0, 2, 0.0, 1.0, 1)])
    assert second[1:] == (["a", "bcd"], [(0, 1, 0.0, 1.0, 2)])


def test_a_prompt_and_its_replies_by_hand(chatml):
    tokenizer, template = chatml
    begin, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    (first, second), report = encode_all(TRIPLE, tokenizer, template, 64)
    frame = [begin, *b"user\nHi", end, 10, begin, *b"assistant\n"]
    ids, (branches, comparisons) = first
    assert ids == [*frame, *b"yes", end, *b"no", end, *b"nay", end]  # each with what ends it
    assert branches == [0] * len(frame) + [1] * 4 + [2] * 3 + [3] * 4
    assert comparisons == [(0, 1, 0.0, 1.0, 0), (0, 2, 0.0, 1.0, 1)]
    assert report == dict(truncated=0, left_out=0, tokens=len(ids) + len(second[0]), pairs=3)
    (apart, _), _ = encode_all(TRIPLE, tokenizer, template, 128, shared=False)
    assert apart[0] == [*frame, *b"yes", end, *frame, *b"no", end, *frame, *b"nay", end]
    n = len(frame)
    assert apart[1][0] == [1] * (n + 4) + [2] * (n + 3) + [3] * (n + 4)


def test_what_does_not_fit_is_split_cut_or_left_out_and_counted(chatml):
    tokenizer, template = chatml
    begin, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    frame = len([begin, *b"user\nHi", end, 10, begin, *b"assistant\n"])
    assert len(encode_all(TRIPLE[:2], tokenizer, template, frame + 11)[0]) == 1  # just fits
    examples, report = encode_all(TRIPLE[:2], tokenizer, template, frame + 10)
    assert len(examples) == 2 and report["truncated"] == 0  # the second pair has one of its own
    assert [e[1][1][0][4] for e in examples] == [0, 1]
    assert examples[1][0][-8:] == [*b"yes", 258, *b"nay", 258]
    (example,), report = encode_all(TRIPLE[:1], tokenizer, template, 17)
    assert report["truncated"] == 1 and len(example[0]) == 17
    whole = encode_all(TRIPLE[:1], tokenizer, template, 64)[0][0][0]
    assert example[0] == whole[-17:]  # the prompt's end is kept, and the replies
    with pytest.raises(ValueError, match="none of the 1 pairs fits into 7 tokens"):
        encode_all(TRIPLE[:1], tokenizer, template, 7)
    _, report = encode_all([TRIPLE[0], TRIPLE[2]], tokenizer, template, 7)
    assert report["left_out"] == 1 and report["pairs"] == 1


def test_typed_special_tokens_stay_text(chatml):
    tokenizer, template = chatml
    evil = [asked("<|im_end|>", "<|im_end|>", "b")]
    ids = encode_all(evil, tokenizer, template, 99)[0][0][0]
    assert ids.count(tokenizer.special["<|im_end|>"]) == 3  # of the prompt and the two replies


def test_a_batch_by_hand():
    two = ([5, 6, 7, 8, 9], ([0, 0, 1, 2, 2], [(0, 1, 0.5, 1.0, 0)]))
    one = ([3, 4, 4], ([0, 1, 2], [(1, 0, 0.0, 0.25, 1)]))
    ids, layout, ends, comparisons = collate([[two, one], [one]])
    assert ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 4], [3, 4, 4] + [0] * 5]
    assert layout.positions.tolist()[0] == [0, 1, 2, 2, 3, 0, 1, 1]  # replies follow the prompt
    assert layout.documents.tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [-1] * 5]
    assert layout.branches.tolist()[0] == [0, 0, 1, 2, 2, 0, 1, 2]
    assert ends.tolist() == [[0, 2], [0, 4], [0, 6], [0, 7], [1, 1], [1, 2]]
    assert comparisons.tolist() == [[0, 1, 0.5, 1], [3, 2, 0, 0.25], [5, 4, 0, 0.25]]


# ---- the model


def alone(model, example):
    """Rewards of an example's replies, each computed from its own text and nothing else."""
    ids, (branches, _) = example
    found = []
    for branch in range(1, max(branches) + 1):
        text = [i for i, b in zip(ids, branches) if b in (0, branch)]
        found.append(model(torch.tensor([text]), torch.tensor([len(text)])))
    return torch.cat(found)


@pytest.mark.parametrize("changes", [{}, dict(window=3), dict(window=4, sinks=1, qk_norm=True)])
def test_replies_in_one_row_get_the_rewards_they_get_alone(changes):
    model, examples = new_model(dtype=torch.float64, **changes), some_examples()
    rows = reward.pack(examples, 64)
    assert len(rows) < len(examples)
    ids, layout, ends, _ = collate(rows)
    together = model.replies(ids, layout, ends)
    apart = torch.cat([alone(model, example) for row in rows for example in row])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    random = torch.randn(len(apart), dtype=torch.float64)
    names, params = zip(*model.named_parameters())
    for name, a, b in zip(
        names, torch.autograd.grad(together @ random, params, allow_unused=True),
        torch.autograd.grad(apart @ random, params, allow_unused=True),
    ):  # fmt: skip
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_prompts_shared_or_not_give_the_same(bidirectional, chatml):
    model = new_model(bidirectional=bidirectional).double()
    shared = encode_all(TRIPLE, *chatml, 64, shared=True)[0]
    apart = encode_all(TRIPLE, *chatml, 128, shared=False)[0]
    model.config.context_length = 128
    found = reward.score(model, apart)
    expected = [alone(model, example).tolist() for example in shared]
    assert np.allclose(sum(found, []), sum(expected, []), atol=1e-5)
    if not bidirectional:
        assert np.allclose(sum(reward.score(model, shared), []), sum(found, []), atol=1e-5)


def test_scores_come_in_the_order_of_the_examples():
    model, examples = new_model(), some_examples(6)
    sizes = [len(ids) for ids, _ in examples]
    assert sizes != sorted(sizes, reverse=True)
    expected = [alone(model, example).tolist() for example in examples]
    for batch_tokens in (1, 60, 8192):
        found = reward.score(model, examples, batch_tokens)
        assert [len(row) for row in found] == [len(row) for row in expected]
        assert np.allclose(sum(found, []), sum(expected, []), atol=1e-5)


def test_an_encoder_sees_what_follows_and_no_padding():
    text = torch.randint(259, (1, 9))
    changed = text.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 259
    padded = torch.cat([text, torch.randint(259, (1, 5))], dim=1)
    n = torch.tensor([9])
    for bidirectional in (False, True):
        model = new_model(bidirectional=bidirectional)
        torch.testing.assert_close(model(padded, n), model(text, n), atol=1e-6, rtol=0)
        layout = reward.Layout(torch.arange(9)[None], *torch.zeros(2, 1, 9, dtype=torch.int64))
        x, y = (model.trunk.hidden(ids, layout=layout) for ids in (text, changed))
        assert torch.equal(x[:, :2], y[:, :2]) != bidirectional  # does the first see the third?
        assert not torch.equal(x[:, 2:], y[:, 2:])


def test_a_new_head_is_undecided_and_learns(chatml):
    torch.manual_seed(0)
    model = RewardModel(TransformerLM(TransformerConfig(**SHAPE)))
    examples = encode_all(TRIPLE, *chatml, 64)[0]
    loss = preference_loss(model, [examples], 3, BT)
    assert loss.item() == pytest.approx(math.log(2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        preference_loss(model, [examples], 3, BT).backward()
        optimizer.step()
    rows = reward.evaluate(examples, reward.score(model, examples), TRIPLE)
    assert figures.accuracy(rows)[0] == 1.0
    assert [row["pair"] for row in rows] == [0, 1, 2] and rows[2]["lengths"] == [1, 3]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_what_we_write_and_the_other_way(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    model = new_model(tie_embeddings=tied).eval()
    model.trunk.token_ids["pad_token_id"] = 256
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert theirs.config.num_labels == 1
    ids, lengths = torch.randint(256, (3, 12)), torch.tensor([12, 4, 9])
    ids[torch.arange(12) >= lengths[:, None]] = 256
    ours = model(ids, lengths)
    found = theirs.eval()(ids, attention_mask=(ids != 256).long()).logits[:, 0]
    torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        again = RewardModel.from_pretrained(tmp_path / name)
        torch.testing.assert_close(again(ids, lengths), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, dict(window=3), dict(qk_norm=True)])
def test_new_blocks_change_nothing_and_learn(changes, tmp_path):
    trunk, ids = new_model(**changes).trunk, torch.randint(259, (2, 12))
    before = trunk(ids)
    reward.deepen(trunk, 2)
    assert len(trunk.blocks) == trunk.config.n_layers == 4
    assert torch.equal(trunk(ids), before)
    model, old = RewardModel(trunk), trunk.blocks[-1].attention.out.weight.clone()
    torch.nn.init.ones_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, torch.tensor([12, 7])).sum().backward()
        optimizer.step()
    assert not torch.equal(trunk.blocks[-1].attention.out.weight, old)
    assert trunk.blocks[-1].attention.qkv.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids, torch.tensor([12, 7])), model(ids, torch.tensor([12, 7])))


def test_frozen_weights_stay_to_the_bit_and_learn_later():
    model, ids = new_model(), torch.randint(259, (2, 12))
    old = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for frozen in (True, False):
        reward.freeze(model, 1, frozen)
        optimizer.zero_grad()
        model(ids, torch.tensor([12, 7])).sum().backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
        new = {name for name in old if re.match(r"head|trunk.norm|trunk.blocks.1", name)}
        assert moved == (new if frozen else set(old))


def test_an_encoder_is_loaded_as_one_and_a_language_model_refused(tmp_path):
    encoder, text = new_model(bidirectional=True), torch.randint(259, (1, 12))
    encoder.save_pretrained(tmp_path / "encoder")
    again = RewardModel.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again(text, torch.tensor([12])), encoder(text, torch.tensor([12])))
    encoder.trunk.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no reward model: make 08"):
        RewardModel.from_pretrained(tmp_path / "plain")


def test_rewards_are_float32_in_bfloat16_and_angles_stay_exact(tmp_path):
    new_model().save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.trunk.frequencies.dtype == torch.float32
    found = model(torch.randint(259, (1, 12)), torch.tensor([12]))
    assert found.dtype == torch.float32 and found.bfloat16().float() != found


def test_likelihoods_are_those_of_each_reply_alone():
    model, examples = new_model().trunk, some_examples(3)
    for (ids, (branches, _)), found in zip(examples, reward.likelihoods(model, examples)):
        n = branches.count(0)
        for branch, mean in enumerate(found, 1):
            text = torch.tensor([[i for i, b in zip(ids, branches) if b in (0, branch)]])
            loss = model(text[:, :-1], text[:, 1:])  # of all tokens: less that of the prompt's
            prompt = model(text[:, : n - 1], text[:, 1:n]) * (n - 1) if n > 1 else 0.0
            size = text.shape[1] - n
            expected = -(loss * (text.shape[1] - 1) - prompt) / size
            assert mean == pytest.approx(expected.item(), abs=1e-5)


# ---- losses


def test_bradley_terry_by_the_formula():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    p = [1 / (1 + math.exp(-d)) for d in (0.5, -3.0)]
    loss = bradley_terry_loss(chosen, rejected).item()
    assert loss == pytest.approx(-(math.log(p[0]) + math.log(p[1])) / 2)
    assert bradley_terry_loss(chosen, chosen).item() == pytest.approx(math.log(2))
    shifted = bradley_terry_loss(chosen + 7, rejected + 7).item()
    assert shifted == pytest.approx(loss, rel=1e-5)  # only differences mean something ...
    centred = [bradley_terry_loss(chosen + s, rejected + s, centre=0.1).item() for s in (0, 7)]
    assert centred[0] == pytest.approx(loss + 0.1 * (1.5**2 + 1.0) / 2)
    assert centred[1] > centred[0] + 1  # ... until they are centred
    margin = torch.tensor([0.2, 0.7])
    expected = bradley_terry_loss(chosen - margin, rejected).item()
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(expected)
    assert expected > loss


def test_soft_labels_are_a_cross_entropy():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.0], dtype=torch.float64)
    loss = bradley_terry_loss(chosen, rejected, label=label)
    expected = torch.nn.functional.binary_cross_entropy(torch.sigmoid(chosen - rejected), label)
    torch.testing.assert_close(loss, expected)
    turned = bradley_terry_loss(rejected, chosen, label=1 - label)
    torch.testing.assert_close(loss, turned)  # the same said the other way round
    best = torch.tensor([math.log(9.0)])  # a lead of log 9 claims 90%: right if 90% agree
    lead = best.clone().requires_grad_()
    bradley_terry_loss(lead, torch.zeros(1), label=0.9).backward()
    assert lead.grad.item() == pytest.approx(0, abs=1e-6)


def test_the_margin_loss_is_pytorchs():
    chosen, rejected = torch.randn(2, 20)
    for margin in (0.0, 1.0, 2.5):
        ours = margin_ranking_loss(chosen, rejected, margin)
        theirs = torch.nn.functional.margin_ranking_loss(
            chosen, rejected, torch.ones(20), margin=margin
        )
        torch.testing.assert_close(ours, theirs)


def test_gradients_in_float64():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64).unbind()
    margin, label = torch.rand(2, 6, dtype=torch.float64).unbind()
    both = (chosen.requires_grad_(), rejected.requires_grad_())
    for loss in (
        lambda a, b: bradley_terry_loss(a, b, margin, label, 0.1),
        lambda a, b: margin_ranking_loss(a, b, margin),
    ):
        assert torch.autograd.gradcheck(loss, both)


@pytest.mark.parametrize("loss", ["bradley_terry", "margin"])
def test_micro_batches_give_one_gradient(loss):
    config, grads = reward.TrainConfig(loss=loss, centre=0.1), []
    for micro_batch in (None, 1, 2, 4):
        model = new_model(dtype=torch.float64)
        loader = reward.ExampleLoader(
            some_examples(12), 32, 256, micro_batch, count=reward.compared
        )
        parts, total = next(loader)
        assert total == sum(reward.compared(e) for rows in parts for row in rows for e in row)
        assert micro_batch is None or len(parts) > 1
        for rows in parts:
            preference_loss(model, rows, total, config).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_margins_and_labels_of_the_data_reach_the_loss():
    ids, (branches, _) = some_examples(1)[0]
    model, losses = new_model(), {}
    for comparison in ((0, 1, 0.0, 1.0, 0), (0, 1, 1.5, 1.0, 0), (0, 1, 0.0, 0.2, 0)):
        rows = [[(ids, (branches, [comparison]))]]
        losses[comparison[2:4]] = preference_loss(model, rows, 1, BT).item()
    a, b = alone(model, (ids, (branches, [])))[:2].double()
    for (margin, label), found in losses.items():
        p = torch.sigmoid(a - b - margin)
        expected = -(label * p.log() + (1 - label) * (1 - p).log())
        assert found == pytest.approx(expected.item(), rel=1e-4)


# ---- shaping


def test_penalties_clipping_and_their_order():
    rewards = torch.tensor([5.0, -1.0, 0.5])
    lengths, ended = torch.tensor([10, 2, 4]), torch.tensor([True, False, True])
    assert shape_reward(rewards).tolist() == rewards.tolist()
    assert shape_reward(rewards, clip=1.0).tolist() == [1.0, -1.0, 0.5]
    found = shape_reward(rewards, lengths, length_penalty=0.1)
    assert found.tolist() == pytest.approx([4.0, -1.2, 0.1])
    found = shape_reward(rewards, ended=ended, missing_end_penalty=2.0)
    assert found.tolist() == [5.0, -3.0, 0.5]
    found = shape_reward(rewards, lengths, ended, 0.1, 2.0, clip=1.0)
    assert found.tolist() == pytest.approx([0.0, -3.2, 0.1])  # penalties are not clipped away


def test_whitening_is_over_all_that_was_seen():
    random, whitening, seen = torch.Generator().manual_seed(0), Whitening(), []
    for n in (4, 1, 9):
        part = torch.randn(n, generator=random) * 3 + 5
        seen.append(part)
        found = shape_reward(part, whitening=whitening)
        everything = torch.cat(seen).double()
        expected = (part - everything.mean()) / (everything.std(correction=0) + 1e-6)
        torch.testing.assert_close(found, expected, check_dtype=False, atol=1e-5, rtol=1e-5)
    again = Whitening(whitening.state)
    part = torch.randn(3, generator=random)
    assert torch.equal(whitening(part), again(part))
    assert torch.isfinite(Whitening()(torch.tensor([2.0]))).all()  # one alone has no spread


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_potentials_change_no_order_of_texts(gamma):
    """Every text of up to four tokens of an alphabet of three, ended by token 0 or by length."""
    texts = [t for n in (1, 2, 3, 4) for t in itertools.product((0, 1, 2), repeat=n)
             if 0 not in t[:-1] and (t[-1] == 0 or n == 4)]  # fmt: skip
    random = np.random.default_rng(0)
    value = {t: random.normal() for t in texts}  # any rewards
    potential = {t[:i]: random.normal() * 5 for t in texts for i in range(len(t))}  # and potentials
    rewards = torch.tensor([value[t] for t in texts])
    lengths = torch.tensor([len(t) for t in texts])
    potentials = torch.full((len(texts), 4), 9.0)  # what stands after the end does not matter
    for row, t in zip(potentials, texts):
        row[: len(t)] = torch.tensor([potential[t[:i]] for i in range(len(t))])
    shaped = shape_reward(rewards, lengths, potentials=potentials, gamma=gamma)
    discount = gamma ** torch.arange(4)
    returns = (shaped * discount).sum(1)
    plain = rewards * gamma ** (lengths - 1)
    torch.testing.assert_close(returns, plain - potential[()], check_dtype=False)  # one constant
    assert shaped[lengths < 4].abs()[:, -1].max() == 0
    # From every prefix on, too: the best next token stays the best.
    for prefix in potential:
        inside = [i for i, t in enumerate(texts) if t[: len(prefix)] == prefix]
        rest = (shaped * discount)[inside, len(prefix) :].sum(1)
        assert rest.argmax() == plain[inside].argmax()
    # A penalty on length is no such thing: it makes another text the best.
    penalised = shape_reward(rewards, lengths, length_penalty=5.0)
    assert penalised.argmax() != rewards.argmax() or lengths[rewards.argmax()] == 1


def test_shaping_refuses_what_makes_no_sense():
    rewards = torch.zeros(2)
    two = dict(potentials=torch.zeros(2, 3))
    for words, said in (
        (dict(rewards=rewards, lengths=torch.tensor([0, 2]), **two), "not from 1 to 3"),
        (dict(rewards=rewards, lengths=torch.tensor([1, 4]), **two), "not from 1 to 3"),
        (dict(rewards=torch.tensor([0.0, math.nan])), "not finite"),
        (dict(rewards=rewards, length_penalty=1.0), "need the lengths"),
        (dict(rewards=rewards, missing_end_penalty=1.0), "which replies have ended"),
        (dict(rewards=rewards, clip=0.0), "clip is above"),
    ):
        with pytest.raises(ValueError, match=said):
            shape_reward(**words)


# ---- data


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_three_forms_are_told_apart(tmp_path):
    user = [dict(role="user", content="Hi")]
    plain = write(tmp_path / "a.jsonl", [
        dict(prompt="Hi", chosen="yes", rejected=" no ", margin=0.5, label=0.9),
        dict(prompt=user, chosen=[*user, dict(role="assistant", content="yes")],
             rejected=[dict(role="assistant", content="no")]),
    ])  # fmt: skip
    form, found, left_out = pairs.read_pairs(plain)
    assert form == "prompt, chosen, rejected" and not left_out
    assert found[0] == asked("Hi", "yes", "no", margin=0.5, label=0.9)
    assert found[1] == asked("Hi", "yes", "no", margin=0.0, label=1.0)
    talk = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nsecond: part\n\nAssistant:"
    hh = write(tmp_path / "b.jsonl", [
        dict(chosen=talk + " A b\n\nc", rejected=talk + " D"),
        dict(chosen=talk + " A", rejected=talk.replace("Ho", "Hu") + " D"),
        dict(chosen=talk + " A", rejected=talk),
        dict(chosen=talk + " A", rejected=talk + " A "),
    ])  # fmt: skip
    form, found, left_out = pairs.read_pairs(hh)
    assert form == "HH-RLHF transcripts"
    assert left_out == {"prompts differ": 1, "a reply is empty": 1, "replies are equal": 1}
    said = [(m["role"], m["content"]) for m in found[0]["prompt"]]
    assert said == [("user", "Hi"), ("assistant", "Ho"), ("user", "And?\n\nsecond: part")]
    assert (found[0]["chosen"], found[0]["rejected"]) == ("A b\n\nc", "D")
    rows = [dict(instruction="Do", input="it", output="x", chosen="x", rejected="y")]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    form, found, _ = pairs.read_pairs(str(tmp_path / "c.json"))
    assert form == "instruction, chosen, rejected"
    assert found == [asked("Do\n\nit", "x", "y", margin=0.0, label=1.0)]


@pytest.mark.parametrize("row, said", [
    ("{", "line 2: not JSON"),
    ([1], "line 2: a record is an object"),
    (dict(prompt="a", chosen="b"), "line 2: 'rejected' is missing"),
    (dict(chosen="b", rejected="c"), "line 2: there is no 'prompt'"),
    (dict(prompt="a", chosen=3, rejected="c"), "'chosen' is no text"),
    (dict(prompt=[{"role": "king"}], chosen="b", rejected="c"), "'prompt' is no text"),
    (dict(prompt="a", chosen="b", rejected="c", margin=-1), "'margin' is -1"),
    (dict(prompt="a", chosen="b", rejected="c", label="sure"), "'label' is 'sure'"),
    (dict(prompt="a", chosen="b", rejected="c", label=1.5), "'label' is 1.5"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": Infinity}', "'margin' is inf"),
    (dict(prompt=[], chosen="b", rejected="c"), "'prompt' is no text"),
    (dict(chosen="\n\nHuman: Hi\n\nAssistant: Ho", rejected=None), "'rejected' is no text"),
    (dict(chosen="\n\nHuman: Hi", rejected="\n\nHuman: Hi"), "does not end with 'Assistant:'"),
])  # fmt: skip
def test_wrong_records_are_named_with_file_and_line(row, said, tmp_path):
    path = write(tmp_path / "d.jsonl", [dict(prompt="a", chosen="b", rejected="c"), row])
    with pytest.raises(ValueError, match=re.escape(said)):
        pairs.read_pairs(path)


def test_the_preferences_of_shared_are_read():
    path = HERE.parents[1] / "shared" / "data" / "preference"
    if not path.exists():
        pytest.skip("no shared/data here")
    form, found, left_out = pairs.read_pairs(str(path))
    assert form == "instruction, chosen, rejected"
    assert len(found) + sum(left_out.values()) == 1100 and len(found) > 1000


def test_a_label_below_one_half_turns_a_pair_round(tmp_path):
    rows = [dict(prompt="Hi", chosen="a", rejected="b", label=x) for x in (0.9, 0.2, 0.5)]
    _, found, left_out = pairs.read_pairs(write(tmp_path / "l.jsonl", rows))
    assert [(p["chosen"], p["label"]) for p in found] == [("a", 0.9), ("b", 0.8)]
    assert left_out == {"neither reply is the better one": 1}


def test_no_prompt_is_both_learned_and_held_out():
    many = [asked(f"Say {i % 40}", "yes", f"no {i}") for i in range(200)]
    learned, held_out = pairs.hold_out(many)
    prompts = [{json.dumps(p["prompt"]) for p in part} for part in (learned, held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 4
    assert len(learned) + len(held_out) == 200
    with pytest.raises(ValueError, match="on 19 prompts: 20 are needed"):
        pairs.hold_out([asked(f"Say {i}", "yes", "no") for i in range(19)])


@pytest.fixture(scope="module")
def plays():
    try:
        return preferences.dataset()
    except ValueError as error:
        pytest.skip(str(error))


def test_the_plays_give_each_kind_in_equal_shares(plays):
    for part, ways in zip(plays, (2, 1)):
        kinds = Counter(pair["kind"] for pair in part)
        spoilt = [kinds[kind] for kind in preferences.CORRUPTED]
        assert ways * kinds["another play"] == ways * kinds["another speaker"] == sum(spoilt)
        assert max(spoilt) - min(spoilt) <= 10 and len(kinds) == 6  # some come out as they were
    assert len(plays[0]) > 40_000 and len(plays[1]) > 5_000


@pytest.fixture(scope="module")
def said(plays):
    """{speech: {(play, speaker), ...}} of all plays."""
    found = {}
    for name, items in common.plays().items():
        for kind, speaker, text in items:
            if kind == "speech":
                found.setdefault(text.strip(), set()).add((name, speaker))
    return found


def speech(text):
    """(speaker, words) of a rendered speech."""
    return tuple(text.split(":\n", 1))


def test_nothing_of_the_held_out_plays_is_trained_on(plays, said):
    for part, held_out in zip(plays, (False, True)):
        for pair in part:
            *speeches, _ = pair["prompt"][0]["content"].split("\n\n")
            speeches += [pair["chosen"]]
            speeches += [pair["rejected"]] * (pair["kind"] in preferences.KINDS[:2])
            for speaker, words in map(speech, speeches):
                plays_of = [play for play, who in said[words] if who == speaker]
                assert any((play in common.HELD_OUT) == held_out for play in plays_of)


def test_wrong_replies_are_wrong_as_their_kind_says(plays, said):
    by_kind = {kind: [] for kind in preferences.KINDS}
    for pair in plays[1]:
        by_kind[pair["kind"]].append((speech(pair["chosen"]), speech(pair["rejected"])))
    for kind in preferences.CORRUPTED:  # the name above it stays
        assert all(good[0] == bad[0] for good, bad in by_kind[kind])
    for kind in ("shuffled", "repeated"):  # neither the beginning nor the end gives it away
        for (_, good), (_, bad) in by_kind[kind]:
            a, b = good.split(), bad.split()
            assert len(a) == len(b) and a != b and a[0] == b[0]
            assert re.search(r"\W*$", good)[0] == re.search(r"\W*$", bad)[0]
    for (_, good), (_, bad) in by_kind["shuffled"]:
        assert sorted(re.findall(r"\w+", bad)) == sorted(re.findall(r"\w+", good))
    for (_, good), (_, bad) in by_kind["misspelt"]:
        a, b = good.split(), bad.split()
        assert len(a) == len(b) and 0 < sum(x != y for x, y in zip(a, b)) < len(a)
    for _, (_, bad) in by_kind["repeated"]:
        b = bad.split()[1:-1]  # the last word may have lost a mark of its own
        assert any(b == (b[:n] * 99)[: len(b)] for n in (2, 3, 4, 5) if 3 * n <= len(b) + 2)
    for (_, good), (_, bad) in by_kind["cut off"]:
        a, b = good.split(), bad.split()
        assert bad[-1].isalnum() and len(b) < len(a) and b[:-1] == a[: len(b) - 1]
    for good, bad in by_kind["another play"]:
        plays_of = [{p for p, who in said[words] if who == name} for name, words in (good, bad)]
        assert any(a != b for a in plays_of[0] for b in plays_of[1])
    for good, bad in by_kind["another speaker"]:
        plays_of = [{p for p, who in said[words] if who == name} for name, words in (good, bad)]
        assert good[0] != bad[0] and plays_of[0] & plays_of[1]
    for kind, part in by_kind.items():
        if kind != "cut off":  # no kind is given away by its length
            right, wrong = np.mean([[len(good[1]), len(bad[1])] for good, bad in part], axis=0)
            assert abs(right - wrong) < 0.1 * right, kind


# ---- how good it is


def rows_of(leads, kinds=None, lengths=None):
    kinds, lengths = kinds or [None] * len(leads), lengths or [[5, 5]] * len(leads)
    return [
        dict(pair=i, kind=k, chosen=d, rejected=0.0, lengths=n)
        for i, (d, k, n) in enumerate(zip(leads, kinds, lengths))
    ]


def test_calibration_tells_an_honest_model_from_a_boastful_one():
    random = np.random.default_rng(0)
    sizes = random.uniform(0.1, 3, 4000)
    right = random.random(4000) < 1 / (1 + np.exp(-sizes))
    leads = np.where(right, sizes, -sizes)
    table, error = figures.calibration(rows_of(leads))
    assert error < 0.03 and sum(n for *_, n in table) == 4000
    _, boastful = figures.calibration(rows_of(4 * leads))
    assert boastful > 0.1
    margins = figures.by_margin(rows_of(leads))
    assert margins[0][1] < 0.65 < 0.85 < margins[-1][1]


def test_accuracy_counts_ties_as_half_and_names_the_corrupted_together():
    kinds = ["another play", "another speaker", "shuffled", "cut off"]
    rows = rows_of([1.0, 0.0, 2.0, -1.0], kinds)
    assert figures.accuracy(rows)[0] == pytest.approx(2.5 / 4)
    found = {name: figures.accuracy(part)[0] for name, part in figures.groups(rows).items()}
    assert found["corrupted"] == 0.5 and found["another speaker"] == 0.5
    assert list(figures.groups(rows_of([1.0]))) == ["all"]
    text = "\n".join(figures.lines(rows, {"first": rows, "second": rows_of([-1.0] * 4, kinds)}))
    assert re.search(r"held-out pairs +n +first +second +by reward", text)
    assert re.search(r"another play +1 +100\.0% +0\.0% +100\.0%", text)
    assert "goal 95%: missed" in text and "goal 70%: met" in text


def test_words_that_are_all_the_same_stay_in_their_order():
    draw = random.Random(0)
    assert preferences.shuffled("Howl howl howl\nhowl!", draw) == "Howl howl howl\nhowl!"
    other = preferences.shuffled("O, you are men\nof stones.", draw)
    assert (
        re.fullmatch(r"O, \w+ \w+ \w+\n\w+ \w+\.", other) and other != "O, you are men\nof stones."
    )


def test_the_last_mark_judges_without_a_model(plays):
    test = [asked("Hi", "Yes.", "No"), asked("Hi", "no", "no!"), asked("Hi", "a", "b")]
    found = figures.last_stop(rows_of([0.0] * 3), test)
    assert figures.ahead(found).tolist() == [1, -1, 0]
    spoilt = [pair for pair in plays[1] if pair["kind"] in preferences.CORRUPTED]
    rows = rows_of([0.0] * len(spoilt), [pair["kind"] for pair in spoilt])
    parts = figures.groups(figures.last_stop(rows, spoilt))
    for kind in preferences.CORRUPTED:
        share, _, _ = figures.accuracy(parts[kind])
        assert share > 0.99 if kind == "cut off" else abs(share - 0.5) < 0.01, kind


def test_shared_words_judge_without_a_model():
    learned = [asked("x", text, "y") for text in ("the day", "the king", "the night")]
    test = [asked("the king: why?", "a king", "the a"), asked("Hi", "no", "yes")]
    found = figures.shared_words(rows_of([0.0, 0.0]), test, learned)
    king, the = math.log(4 / 2), math.log(4 / 4)  # rare words count more
    assert found[0]["chosen"] == pytest.approx(king / math.sqrt(3))
    assert found[0]["rejected"] == pytest.approx(the / math.sqrt(3))
    assert found[1]["chosen"] == found[1]["rejected"] == 0


def test_a_bias_to_length_is_seen():
    lengths = [[9, 3], [3, 9], [8, 2], [1, 7]]
    biased = figures.length_bias(rows_of([6.0, -6.0, 6.0, -6.0], lengths=lengths))
    assert biased["longer_is_better"] == 0.5 and biased["correlation"] > 0.99
    assert (biased["chosen_longer"], biased["chosen_shorter"]) == (1.0, 0.0)
    fair = figures.length_bias(rows_of([1.0, 1.0, 1.0, 1.0], lengths=lengths))
    assert fair["correlation"] == 0.0 and fair["chosen_shorter"] == 1.0


def test_public_names_of_the_design():
    names = "RewardModel bradley_terry_loss margin_ranking_loss shape_reward"
    assert all(hasattr(reward, name) for name in names.split())


# ---- commands


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """run.py with some words, in this process: (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
        monkeypatch.setattr(common, "OUT", tmp_path / "out")
        code = 0
        try:
            runpy.run_path(str(HERE / "run.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def refused(result):
    """The one line in which a command has ended, with exit code 2."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture
def data(tmp_path):
    """60 pairs: the better reply says so."""
    rows = [dict(prompt=f"Say {i}", chosen=f"well {i}", rejected=f"badly {i}") for i in range(60)]
    return write(tmp_path / "data.jsonl", rows)


@pytest.fixture
def base(tmp_path):
    """A model directory of bytes without a template, as 05 writes one."""
    new_model(vocab_size=257, context_length=32).trunk.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


QUICK = ("--device", "cpu", "--tokens_per_step", 256, "--context_length", 64, "--eval_every", 5)
QUICK += ("--warmup_steps", 2)


def test_the_command_trains_judges_and_scores(command, data, base, tmp_path):
    words = ("train", "--data", data, "--model", base, *QUICK, "--max_lr", "1e-2")
    code, out, err = command(*words, "--steps", 20)
    assert code == 0, err
    assert "prompt, chosen, rejected: 54 pairs, 6 held out" in out
    assert "tokens added for the chatml template" in out
    home = (tmp_path / "out" / "08_reward" / "latest").resolve()
    for name in ("loss.png", "scores.png"):
        assert (home / name).read_bytes()[:4] == b"\x89PNG"
    assert "## all 1" in (home / "examples.md").read_text()
    result = json.loads((home / "run.json").read_text())["result"]
    lines = [json.loads(line) for line in open(home / "metrics.jsonl")]
    assert lines[0]["train_loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert result["val_loss"] < 0.5 and result["accuracy"] > 0.8
    code, out, _ = command(*words, "--steps", 20)
    assert code == 0 and "is finished" in out and "--steps 40" in out
    code, out, err = command("eval", "--data", data, "--device", "cpu")
    assert code == 0, err
    assert re.search(r"all +6 +\d+\.\d%", out)
    code, out, err = command(
        "score", "--prompt", "Say 70", "--replies", "badly 70|well 70", "--device", "cpu"
    )
    assert code == 0, err
    first, second = out.strip().splitlines()
    assert first.endswith("well 70") and float(first.split()[0]) > float(second.split()[0])
    code, out, _ = command("show", "--data", data, "--n", 1)
    assert code == 0 and "[chosen] well" in out and "[rejected] badly" in out


def test_encoders_and_margin_losses_train_too(command, data, base):
    words = ("train", "--data", data, "--model", base, *QUICK, "--steps", 6)
    for more in (("--bidirectional", "--no-packing"), ("--loss", "margin", "--no-shared")):
        code, out, err = command(*words, *more)
        assert code == 0, err
        assert "in order" in out
    code, out, err = command("eval", "--data", data, "--device", "cpu")
    assert code == 0, err


def test_on_the_plays_each_kind_is_told(command, base, plays, monkeypatch, tmp_path):
    monkeypatch.setattr(preferences, "dataset", lambda: [plays[0][:30], plays[1][:60]])
    words = ("train", "--model", base, *QUICK[:4], "--steps", 4, "--eval_every", 4)
    words += ("--eval_examples", 2)
    code, out, err = command(*words)
    assert code == 0, err
    for name in ("another play", "another speaker", "corrupted", "shuffled", "cut off"):
        assert re.search(rf"{name} +\d+ +\d+\.\d% +\d+\.\d% +\d+\.\d%", out)
    home = tmp_path / "out" / "08_reward" / "latest"
    assert "## misspelt 1" in (home / "examples.md").read_text()
    assert "corrupted" in json.loads((home / "run.json").read_text())["result"]


def test_a_fork_without_any_model_begins_with_a_random_one_on_bytes(command, data):
    code, out, err = command("train", "--data", data, *QUICK, "--steps", 2)
    assert code == 0, err
    assert "no model found" in out and "on bytes" in out


REFUSED = [
    (("--model", "nowhere"), "nowhere holds no model"),
    (("--data", "nowhere.jsonl"), "there is no such file"),
    (("--preset", "huge"), "huge is none of small, large"),
    (("--loss", "mse"), "mse is none of bradley_terry, margin"),
    (("--centre", -1), "not below 0"),
    (("--pairs", 99), "--pairs 99: there are 54"),
    (("--test_pairs", 0), "at least 1"),
    (("--context_length", 5), "none of the 54 pairs fits into 5 tokens"),
    (("--context_length", 0), "at least 1"),
    (("--template", "own"), "has no chat template"),
    (("--max_lr", "nan"), "the loss is"),
    (("--device", "cuda:7"), "is not to be had here"),
]


@pytest.mark.parametrize("words, said", REFUSED)
def test_wrong_input_ends_in_one_line(words, said, command, data, base):
    if "cuda:7" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = refused(command("train", "--data", data, "--model", base, *QUICK, "--steps", 3, *words))
    assert said in line


def test_other_commands_refuse_what_they_cannot_use(command, data, base, tmp_path):
    assert "holds no model: make 07 and make 08" in refused(command("eval"))
    assert "holds no reward model" in refused(command("score", "--model", base))
    assert "no such file" in refused(command("show", "--data", "nowhere"))
    few = write(tmp_path / "few.jsonl", [dict(prompt="a", chosen="b", rejected="c")] * 12)
    assert "20 are needed" in refused(command("train", "--data", few))
    rows = [dict(prompt=str(i), chosen="b", rejected="c", label=0.9) for i in range(40)]
    unsure = write(tmp_path / "unsure.jsonl", rows)
    words = ("train", "--data", unsure, "--model", base, "--loss", "margin")
    assert "have labels" in refused(command(*words))
    new_model(context_length=20).save_pretrained(tmp_path / "judge")
    words = ("score", "--model", tmp_path / "judge", "--replies", "a" * 99)
    assert "fits into 20 tokens" in refused(command(*words))


def test_a_stopped_run_goes_on_to_the_bit(data, base, tmp_path):
    words = ["train", "--data", data, "--model", base, *QUICK, "--steps", 120, "--patience", 999]
    words += ["--freeze_steps", 4]
    words = [sys.executable, HERE / "run.py", *words, "--tokens_per_step", 128]

    def start(out):
        env = os.environ | dict(OUT=str(tmp_path / out), OMP_NUM_THREADS="1")
        env |= dict(PYTHONPATH=str(HERE.parent))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(list(map(str, words)), env=env, **pipes)

    whole = start("whole")
    assert whole.wait(120) == 0, whole.stdout.read()
    part = start("part")
    log = tmp_path / "part" / "08_reward" / "latest" / "metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 8:
            break
        time.sleep(0.05)
    part.send_signal(signal.SIGTERM)
    assert part.wait(60) == 0
    text = part.stdout.read()
    assert "stopped after step" in text, text
    again = start("part")
    assert again.wait(120) == 0, again.stdout.read()

    def losses(out):
        lines = map(json.loads, open(tmp_path / out / "08_reward" / "latest" / "metrics.jsonl"))
        return {line["step"]: line["train_loss"] for line in lines}

    assert losses("part") == losses("whole") and len(losses("whole")) == 120
    files = [tmp_path / o / "08_reward" / "latest" / "model.safetensors" for o in ("part", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
