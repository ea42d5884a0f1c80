"""semantic.py, its parts and studies 1 and 2: concepts, what follows, stopping, what is scored."""

import math
import os
import random
import signal

import concept_scores
import concept_study
import fitting
import lines
import pytest
import torch
from blocks import AdamW, KVCache, TransformerConfig, Trunk
from concept_study import ConceptOptions, Concepts, contrast_loss
from semantic import Autoencoder, Codebooks, CodeLM, ConceptConfig, ConceptLM, Regression
from torch import nn
from torch.nn import functional as F

import common

torch.set_num_threads(1)
same, END = torch.testing.assert_close, 0
TINY = dict(d_model=16, d_concept=32, context_lines=8, d_context=16, n_codes=3, code_size=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**changes):
    return ConceptConfig(**dict(vocab_size=20, line_tokens=10) | TINY | changes)


def some_lines(*lengths):
    """A line of each length, END its last token, as rows filled up with -1."""
    rows = [torch.cat([torch.randint(1, 20, (n - 1,)), torch.tensor([END])]) for n in lengths]
    return nn.utils.rnn.pad_sequence(rows, True, -1)


def train(model, loss, steps):
    optimizer = AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (value := loss()).backward()
        optimizer.step()
    return value.item()


def test_padding_changes_nothing():
    ae, lengths = Autoencoder(tiny()), (9, 1, 4, 6)
    ids = F.pad(some_lines(*lengths), (0, 5), value=-1)
    nats = ae.log_probs(concepts := ae.encode(ids), ids, END)
    for i, n in enumerate(lengths):
        same(ae.encode(ids[i : i + 1, :n])[0], concepts[i])
        same(ae.log_probs(concepts[i : i + 1], ids[i : i + 1, :n], END)[0], nats[i])


def test_a_concept_holds_all_of_a_line_its_order_and_a_bag_of_words():
    ae, ids, seen = Autoencoder(tiny(d_concept=64)), some_lines(6).repeat(7, 1), []
    ids += 5 * torch.eye(7, 6, dtype=torch.int64)  # each row one other token; the last has none
    ae.bind.register_forward_hook(lambda module, args, out: seen.append(out))
    ae.encode(ids % 20)
    assert (seen[0] - seen[0][-1])[:6].abs().amax(-1).min() > 1e-4  # all tokens see all of it
    both = torch.cat([line := some_lines(10), line.flip(1)])
    there, back = ae.encode(both)
    assert (there - back).norm() > 0.3 * there.norm()
    ae.encoder.norm.weight.data.zero_()  # each token alone: what is left is the turning
    pairs = ae.encode(both).view(2, 2, 32).mT  # (2, D/2, 2), the fast ones first
    apart = (pairs[0] - pairs[1]).norm(dim=-1) / pairs.norm(dim=-1).mean(0)
    assert apart[-6:].max() < 0.2 < 0.7 < apart[:6].mean()
    (x, y), (p, q) = torch.randn(2, 12, 64), torch.randint(1, 40, (2, 12))
    same(ae.turn(ae.turn(x, p), -p), x, rtol=1e-4, atol=1e-4)
    ways = (p, q), (p + 9, q + 9), (p, q + 1)
    here, there, apart = ((ae.turn(x, a) * ae.turn(y, b)).sum(-1) for a, b in ways)
    same(here, there, rtol=1e-3, atol=1e-3)
    assert (here - apart).abs().min() > 1e-2


def test_decoder_is_causal_and_write_is_greedy():
    ae, before, concepts = Autoencoder(tiny()), torch.randint(20, (2, 8)), torch.randn(2, 32)
    logits = ae.decode(concepts, before)
    for t in range(8):
        other = before.clone()
        other[:, t] = (other[:, t] + 7) % 20
        apart = (ae.decode(concepts, other) - logits).abs().amax(-1)
        assert apart[:, :t].lt(1e-5).all() and apart[:, t:].min() > 1e-5
    concepts = 3 * torch.randn(40, 32)
    ids, sure = ae.write(concepts, END)
    for i, row in enumerate(ids):
        line = []
        while END not in line:
            before = torch.tensor([[END, *line]])
            line.append(ae.decode(concepts[i : i + 1], before)[0, -1].argmax().item())
            line[9:] = [END] * len(line[9:])  # the tenth token ends the line
        assert row.tolist() == line + [-1] * (len(row) - len(line))
    lengths = (ids >= 0).sum(1)
    assert lengths.max() == 10 > lengths.min()  # both ways to end
    same(ae.log_probs(concepts, ids, END) / lengths, sure)


def test_learns_lines_by_heart():
    ae, ids = Autoencoder(tiny(d_concept=128)), some_lines(10, 9, 8, 7, 6, 5, 4, 3, 2, 2, 1)
    train(ae, lambda: -ae.log_probs(ae.encode(ids), ids, END).mean(), 120)
    assert ae.write(ae.encode(ids), END)[0].equal(ids)


def test_concept_lm_and_contrast_by_hand():
    lm, x = ConceptLM(tiny()), torch.randn(2, 8, 32)
    expected = lm(x)
    for t in range(8):
        other = x.clone()
        other[:, t] = torch.randn(2, 32)
        apart = (lm(other) - expected).view(2, 8, 2, 16).abs().amax(-1)  # of both halves
        assert apart[:, :t].lt(1e-5).all() and apart[:, t:].min() > 1e-4
    said = lm.echo(lm.norm(x))
    same(expected[:, 7, 16:], sum(math.exp(-0.2 * (7 - t)) * said[:, t] for t in range(8)))
    every = lm.scores(expected[:, 0], x.flatten(0, 1)).view(2, 2, 8)
    same(lm.scores(expected[:, 0], x), every[range(2), range(2)])
    with pytest.raises(ValueError, match="9 lines do not fit into 8"):
        lm(torch.randn(1, 9, 32))
    x, total = torch.randn(3, 5, 32), 0
    expected = 4 * lm(x[:, :-1])
    for b, row in enumerate(x):
        others = torch.cat([x[i, 1:] for i in range(3) if i != b])  # the same row is left out
        for t in range(4):
            scores = lm.scores(expected[b, t][None], torch.cat([row[t + 1][None], others]))[0]
            total += scores.logsumexp(0) - scores[0]
    same(contrast_loss(lm, expected, x), total / 12)


def test_contrast_learns_what_follows_and_regression_the_mean_of_it():
    lm, story = ConceptLM(tiny()), torch.randn(40, 32)

    def loss():
        rows = story.roll(torch.randint(40, (1,)).item(), 0)[:36].view(4, 9, 32)
        return contrast_loss(lm, lm(rows[:, :-1]), rows)

    assert loss() > 2 and train(lm, loss, 150) < 0.05
    scores = lm.scores(lm(torch.stack([story.roll(-i, 0)[:5] for i in range(40)]))[:, -1], story)
    for i in range(40):  # lines nearby were never told apart: they are on the same topic
        scores[i, [(i + j) % 40 for j in range(-3, 14) if j != 5]] = -math.inf
    assert scores.argmax(1).tolist() == [(i + 5) % 40 for i in range(40)]
    model, x, nexts = Regression(tiny()), torch.randn(1, 1, 32).expand(2, 1, 32), story[:2, None]
    train(model, lambda: (model(x) - nexts).square().mean(), 100)  # one of two may follow
    same(model(x)[0, 0], nexts.mean(0)[0], rtol=0.05, atol=0.05)


def test_gradients():
    c = tiny(vocab_size=5, d_model=8, d_concept=6, d_context=8, code_size=3)
    ae, lm, model, codes = (m(c).double() for m in (Autoencoder, ConceptLM, Regression, CodeLM))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    ids, drawn = torch.tensor([[3, 1, 0], [2, 0, -1]]), torch.randint(3, (2, 3))
    assert torch.autograd.gradcheck(lambda x: ae.log_probs(x[:, 0], ids, END), x)
    assert torch.autograd.gradcheck(lambda x: contrast_loss(lm, lm(x[:, :-1]), x), x)
    assert torch.autograd.gradcheck(lambda x: codes.log_probs(codes.expected(x)[:, 1], drawn), x)
    assert torch.autograd.gradcheck(model, x)


@pytest.mark.parametrize("M, S", [(3, 3), (2, 4), (1, 5)])
def test_codes_are_drawn_from_a_distribution(M, S):
    model, hoped = CodeLM(tiny(n_codes=M, code_size=S)), torch.randn(6, 16)
    model.out.data *= 40
    every = torch.cartesian_prod(*[torch.arange(S)] * M).view(-1, M)
    nats = torch.stack([model.log_probs(x.expand(len(every), -1), every) for x in hoped])
    same(nats.exp().sum(1), torch.ones(6))
    assert nats.std(1).min() > 0.5 and (nats[0] - nats[1]).abs().max() > 0.5
    by_hand, x, greedy = 0, hoped[:1].expand(len(every), -1), torch.zeros(6, 0).long()
    for m in range(M):
        logits = model.logits(x, every[:, :m])[:, m].log_softmax(-1)
        by_hand = by_hand + logits.gather(1, every[:, m : m + 1])[:, 0]
        greedy = torch.cat([greedy, model.logits(hoped, greedy)[:, -1:].argmax(-1)], dim=1)
    same(nats[0], by_hand)
    both = (model.logits(x, i)[:, -1] for i in (every[:, : M - 1], every[:, : M - 1].flip(1)))
    assert M < 3 or (next(both) - next(both)).abs().max() > 0.1  # each code has its own meaning
    assert model.draw(hoped, 0.0).equal(greedy)
    drawn = model.draw(hoped[:1].expand(20_000, -1), generator=torch.Generator().manual_seed(1))
    found = torch.stack([(drawn == codes).all(1).float().mean() for codes in every])
    same(found, by_hand.exp(), rtol=0, atol=0.015)


def test_codebooks():
    books, x = Codebooks(tiny(n_codes=5, code_size=8)), torch.randn(400, 32)
    books.fit(x)
    codes, left = books.encode(x), [x]
    for m in range(5):
        left.append(left[-1] - books.books[m, codes[:, m]])
        assert left[-1].square().sum() < 0.95 * left[-2].square().sum()
    same(books.decode(codes), x - left[-1])
    with pytest.raises(ValueError, match="7 concepts are too few for codes of 8"):
        books.fit(x[:7])
    few = x[torch.arange(60) % 5]  # 5 points
    books.fit(few)
    same(books.decode(books.encode(few)), few, rtol=1e-4, atol=1e-4)


def test_bad_shapes_and_options():
    bad = [(ConceptConfig, {name: 0}, f"{name} is 0") for name in ["vocab_size", "n_codes", *TINY]]
    bad += [(tiny, dict(d_concept=7), "7 is odd"), (tiny, dict(d_context=15), "not divisible")]
    bad += [(ConceptOptions, {n: 0}, f"--{n} 0") for n in ("flops", "queries", "thoughts")]
    for make, how, why in bad:
        with pytest.raises(ValueError, match=why):
            make(**how)


@pytest.mark.parametrize("window", [None, 3])
def test_trunk_with_a_cache_and_with_padding(window):
    c = TransformerConfig(20, 12, 32, 2, 4, 2, window=window)
    trunk, x, pads = Trunk(c), torch.randn(3, 12, 32), torch.tensor([0, 3, 7])
    whole, cache = trunk(x), KVCache(c, 3)
    same(torch.cat([trunk(part, cache=cache) for part in x.split([5, 1, 4, 2], 1)], 1), whole)
    x = torch.stack([F.pad(row[: 12 - p], (0, 0, p, 0), value=9.0) for row, p in zip(x, pads)])
    cache = KVCache(c, 3, pads=pads)
    found = torch.cat([trunk(part, cache=cache) for part in x.split([8, 1, 3], 1)], 1)
    for i, p in enumerate(pads):
        same(found[i, p:], whole[i, : 12 - p])


def toy(home, steps=10, stop=None, seed=7):
    """Fit a line, sending the signal `stop` in the fourth step: weights, cost, calls of step."""
    torch.manual_seed(3)
    model, calls = nn.Linear(3, 1), []
    torch.manual_seed(seed)

    def step(generator):
        calls.append(len(calls))
        if len(calls) == 4 and stop:
            os.kill(os.getpid(), stop)
        x = torch.randn(4, 3, generator=generator) + torch.randn(4, 3)
        return model(x).square().mean(), 10

    cost = fitting.fit("toy", model, step, 10 * steps + 5, 0.1, home)
    return model.weight, cost | dict(seconds=0), len(calls)


@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_stopping_and_going_on_is_exact(tmp_path, stop, code):
    handler = signal.getsignal(stop)
    weight, cost, calls = toy(None)
    assert (cost["steps"], cost["flops"], calls) == (10, 100, 11)  # the eleventh was too much
    with pytest.raises(SystemExit) as stopped:
        toy(tmp_path, stop=stop)
    assert stopped.value.code == code and signal.getsignal(stop) == handler
    for calls in (7, 0):  # the fourth step was finished; in the end it is loaded
        again = toy(tmp_path, seed=8)  # torch's own generator stands elsewhere
        assert again[0].equal(weight) and again[1:] == (cost, calls)


def test_a_model_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="5 FLOPs do not pay for one step of toy"):
        toy(tmp_path, steps=0)
    with pytest.raises(SystemExit):
        toy(tmp_path, stop=signal.SIGTERM)
    before = (tmp_path / "toy.pt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(before[:99]) / 0)
    with pytest.raises(ZeroDivisionError):
        toy(tmp_path)
    assert os.listdir(tmp_path) == ["toy.pt"] and (tmp_path / "toy.pt").read_bytes() == before
    (tmp_path / "toy.pt").write_bytes(before[:99])
    with pytest.raises(ValueError, match="toy.pt is damaged, remove it"):
        toy(tmp_path)


def test_lines_of_a_text(tmp_path, monkeypatch):
    tokenizer, file = common.Tokenizer(), tmp_path / "a.txt"
    found = lines.text_lines(f"a  b\n \n{'x' * 300}\nA{common.EOT}B\n{'ünd ' * 23}\nx{'ö' * 60}")
    assert found.text[:6] == ["a b", *["x" * 100] * 3, "A", "B"] and found.scene == [-1] * 10
    assert found.text[6:] == [("ünd " * 20)[:-1], "ünd ünd ünd", "x" + "ö" * 49, "ö" * 11]
    monkeypatch.setattr(common, "OUT", tmp_path)
    file.write_text("\n".join(f"line {i}" for i in range(300)))
    train, held = lines.read(str(file))
    assert train.text + held.text == [f"line {i}" for i in range(300)] and 25 < len(held) < 35
    with pytest.raises(ValueError, match="lines to hold out are too few, 128 are wanted"):
        Concepts(ConceptOptions(data=str(file)), tokenizer)
    assert lines.table(["ab", ""], tokenizer, 10).tolist() == [[97, 98, 10], [10, -1, -1]]
    assert lines.table([common.EOT, "y" * 127], tokenizer, 10).max() < 256  # said, not meant
    with pytest.raises(ValueError, match="129 tokens, more than 128: 'yyy"):
        lines.table(["a", "y" * 128], tokenizer, 10)


def theatre():
    """Four short plays of three scenes, each with its own words, and one line that is in all."""
    plays, draw = {}, random.Random(1)
    for name in ("a", "held a", "held b", "b"):
        items = plays[name] = [["act", "", "ACT I"]]
        for scene in range(3):
            items += [["scene", "", f"SCENE {scene}"], ["direction", "", "Enter BEN."]]
            words = ["".join(draw.choices("abcdefghik", k=3)) for _ in range(9)]
            verse = [" ".join(draw.choices(words, k=3)) for _ in range(39)] + ["Adieu, adieu!"]
            parts = ["\n".join(verse[i : i + 4]) + "\n\n" for i in range(0, 40, 4)]
            items += [["speech", "AB"[i % 2], part] for i, part in enumerate(parts)]
    return plays


@pytest.fixture(scope="module")
def m(tmp_path_factory):
    """The models of both studies, small and hardly trained, that know this theatre only."""
    options, home = ConceptOptions(flops=1e9, queries=50, thoughts=1), tmp_path_factory.mktemp("m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "plays", theatre)
        patch.setattr(common, "HELD_OUT", ["held a", "held b"])
        patch.setattr(concept_study, "ConceptConfig", lambda **kw: ConceptConfig(**kw, **TINY))
        patch.setitem(concept_study.TOKEN_MODEL, "d_model", 16)
        m = Concepts(options, common.Tokenizer(), home)
    m.train()
    m.near = m.encode_all(m.held_ids)[0]
    return m


def test_lines_of_plays(m):
    assert m.held.scene == [i // 40 for i in range(240)] and m.held.play == [0] * 120 + [1] * 120
    assert m.held.names == ["A", "B", "A", "B"] and m.held.speaker[116:124] == [1] * 4 + [2] * 4
    assert len(m.held) == 240 and {*m.lines.text} & {*m.held.text} == {"Adieu, adieu!"}
    try:
        plays = common.plays()
    except ValueError as error:
        pytest.skip(str(error))
    for part, inside in zip(lines.read(), (False, True)):
        items = sum((plays[name] for name in plays if (name in common.HELD_OUT) == inside), [])
        spoken = "\n".join(text for kind, _, text in items if kind == "speech").split("\n")
        assert sorted(part.text) == sorted(filter(None, spoken)) and len(part) > 10_000


@torch.no_grad()
def test_models_are_kept_and_paid_for_and_groups_change_nothing(m):
    costs = {name: cost["flops"] for name, cost in m.costs.items()}
    parts = sum(costs[name] for name in ("contrast", "codes of lines", "codes", "decoder"))
    assert 0.95 * parts < costs["tokens"] <= parts
    weights = list(nn.ModuleDict(m.models()).parameters())
    before = [(weight.clone(), weight.zero_())[0] for weight in weights]
    m.train()  # all are loaded
    assert all(a.equal(b) for a, b in zip(weights, before))
    ids, near = m.held_ids[:50], m.near[:50]
    same(m.ae.encode(ids), near)
    same(m.told(near, ids, m.teller)[0], m.teller.log_probs(near, ids, m.end))
    same(m.expected(m.lm, near, torch.tensor([20])), m.lm(near[None, 13:21])[:, -1])


@torch.no_grad()
def test_pick(m, monkeypatch):
    found = concept_scores.pick(m, m.near, m.options)
    assert len(found) == 9 and all(0 <= share < 1 for share, _ in found.values())
    truth = torch.eye(32)[0]  # the true line is the first of 32
    monkeypatch.setattr(m.lm, "scores", lambda hoped, near: truth.expand(len(near), -1))
    monkeypatch.setattr(m, "token_scores", lambda at, rows: (truth.expand(len(at), -1), 0 * rows))
    monkeypatch.setattr(
        m, "expected", lambda model, x, at: x[at + 1] if model is m.regression else x[at, :16]
    )
    found = concept_scores.pick(m, m.near, m.options)
    right = {name for name, scores in found.items() if scores == (1.0, 0.0)}
    assert right >= {name for name in found if name[:4] in ("cont", "regr", "toke")}


@torch.no_grad()
def test_bits_are_those_of_the_whole_text(m):
    T, longest, at = m.tokens.config.context_length, m.held_ids.shape[1], torch.tensor([7, 40, 200])
    rows = torch.stack([at + 1, at - 5, at + 30], dim=1)
    given, free = m.token_scores(at, rows)
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(3)):
        before, ids = m.held_ids[: at[i] + 1], m.held_ids[rows[i, j]]
        before, ids = before[before >= 0][longest - T :], ids[ids >= 0]
        for context, score in ((before, given[i, j]), (torch.tensor([m.end]), free[i, j])):
            nats = m.tokens(torch.cat([context, ids])[None])[0].log_softmax(-1)
            same(nats[len(context) - 1 : -1].gather(1, ids[:, None]).sum(), score)
    size = torch.tensor([len(m.held.text[i].encode()) + 1 for i in rows.T.flatten()]).view(3, 3)
    written = [m.held_ids[some] for some in rows.T]
    same(torch.stack([concept_scores.n_bytes(m, some) for some in written]), size.float())
    same(torch.stack(concept_scores.judge(m, at, written)), -given.T / math.log(2) / size)
    found = concept_scores.bits(m, m.near, m.options)["from_concept"]  # of all with a context
    nats, size = m.ae.log_probs(m.near[8:], m.held_ids[8:], m.end), (m.held_ids[8:] >= 0).sum()
    assert found == pytest.approx((-nats.sum() / math.log(2) / size).item(), abs=1e-3)


def test_thought_units(m, monkeypatch):
    wins, _, samples = concept_scores.thoughts(m, m.near, m.options, 20)  # of one line drawn
    assert [w["win_rate"] for w in wins.values()] == [0.5] * 2 and samples[0][0][0] in m.held.text
    true = m.held_ids[concept_scores.places(m, 20, 2) + 1]
    noise, sure = torch.where(true >= 0, 200, -1), torch.eye(2)[1].expand(20, 2)  # no play's bytes
    monkeypatch.setattr(m.lm, "scores", lambda hoped, again: 0 * sure)
    for both, win in (((noise, true), 1.0), ((true, noise), 0.0)):  # the second is chosen
        drawn = torch.stack(both, dim=1), sure
        monkeypatch.setattr(concept_scores, "drawn_lines", lambda *args, drawn=drawn: drawn)
        wins, table, _ = concept_scores.thoughts(m, m.near, m.options, 20)
        assert wins["codes"]["win_rate"] == win
        assert (table["the play"] == table["codes, thought unit"]) == bool(win)


def test_neighbours_and_words_that_move(m):
    scene = torch.tensor(m.held.scene)[7:]
    found = concept_scores.neighbours(m, F.one_hot(scene).float(), m.held.scene)
    assert found[:2] == (1.0, 1.0) and found[2] < 0.17
    alike = torch.randn(59, 64).repeat_interleave(4, 0)[:233]  # only within the context: left out
    found = concept_scores.neighbours(m, alike, m.held.scene)
    assert found[:2] == pytest.approx((found[2], found[2]), abs=0.06)
    found = concept_scores.moved(m, F.one_hot(scene).float())
    assert (found["pairs"], found["lines"], found["one_scene"]) == (15, 6, 1.0)
    words = [sorted({*m.held.text}).index(line) for line in m.held.text[7:]]
    same_words = concept_scores.moved(m, F.one_hot(torch.tensor(words)).float())["same_words"]
    assert found["same_words"] < 0 < 0.99 < same_words  # they are always in two scenes
