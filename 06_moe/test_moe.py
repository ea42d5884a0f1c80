"""Routers and experts against transformers, the plain loop, one process, and wrong input."""

import copy
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import charts
import convert
import generation
import numpy as np
import pytest
import torch
import training
from moe import Experts, MoE, MoEConfig, MoETransformerLM, Router, Segments
from torch.nn import functional as F

import common

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)
SHAPE = dict(vocab_size=60, context_length=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2)
SHAPE |= dict(n_experts=4, top_k=2, d_expert=8, d_ff=24)
WAYS = ("loop", "segments", "grouped")


def config(**changes):
    return MoEConfig(**SHAPE | changes)


def new_model(seed=0, **changes):
    """A small model whose norms are not all 1 and whose routers have strong opinions."""
    torch.manual_seed(seed)
    model = MoETransformerLM(config(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p), alpha=1.0 if "router" in name else 0.1)
    return model


def some_ids(B=3, T=10, seed=1):
    return torch.randint(60, (B, T), generator=torch.Generator().manual_seed(seed))


def grouped_or_skip(way):
    if way == "grouped" and not hasattr(F, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped_mm")


# ---- the router


def routed(x, seed=0, train=False, **changes):
    torch.manual_seed(seed)
    router = Router(config(**changes))
    router.weight.data.mul_(4)
    return router.train(train), router(x)


def test_softmax_weights_are_the_best_ones_and_sum_to_1_on_demand():
    x = torch.randn(50, 16)
    router, routing = routed(x, renormalize=False)
    probs = (x @ router.weight.T).softmax(-1)
    best = probs.sort(descending=True)
    assert torch.equal(routing.experts, best.indices[:, :2])
    torch.testing.assert_close(routing.weights, best.values[:, :2])
    _, again = routed(x, renormalize=True)
    torch.testing.assert_close(again.weights.sum(1), torch.ones(50))
    ratio = best.values[:, 0] / best.values[:, 1]
    torch.testing.assert_close(again.weights[:, 0] / again.weights[:, 1], ratio)
    assert torch.equal(routing.load, torch.bincount(routing.experts.flatten(), minlength=4).float())


def test_one_expert_a_token_is_not_renormalized_or_its_router_would_not_learn():
    assert not config(top_k=1).renormalize and config(top_k=2).renormalize
    mixture = MoE(config(top_k=1, balance="none"))
    mixture(torch.randn(1, 8, 16)).square().sum().backward()
    assert mixture.router.weight.grad.abs().max() > 1e-4


def test_losses_are_those_of_the_papers():
    transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    x = torch.randn(64, 16)
    router, routing = routed(x)
    logits = x @ router.weight.T
    theirs = transformers.load_balancing_loss_func((logits,), 4, 2)
    torch.testing.assert_close(routing.balance, theirs / 2)  # theirs sums over the choices
    torch.testing.assert_close(routing.z, logits.exp().sum(1).log().square().mean())
    probs = logits.softmax(-1)
    torch.testing.assert_close(routing.entropy, -(probs * probs.log()).sum(1).mean())


def test_the_balance_loss_is_1_when_even_and_E_when_collapsed():
    router = Router(config(top_k=1))
    x = torch.zeros(8, 16)
    x[torch.arange(8), torch.arange(8) % 4] = 1.0
    with torch.no_grad():
        router.weight.zero_()[:4, :4] = 50 * torch.eye(4)
        assert router(x).balance.item() == pytest.approx(1)
        router.weight.copy_(50 * F.one_hot(torch.zeros(16).long(), 4).T)
        router.weight[:, 4:] = 0
        assert router(x[::4]).balance.item() == pytest.approx(4)


def test_the_balance_loss_evens_out_the_load():
    torch.manual_seed(0)
    router, x = Router(config()), torch.randn(256, 16) + 1.0
    router.weight.data[0] += 0.5  # everyone's favourite
    before = router(x).load.max() / 256
    for _ in range(300):
        gradient = torch.autograd.grad(router(x).balance, router.weight)[0]
        router.weight.data -= 0.3 * gradient
    after = router(x).load.max() / 256
    assert before > 0.95 and after < 0.65  # 0.5 is even


def test_nudging_evens_out_the_load_and_leaves_the_weights_alone():
    torch.manual_seed(0)
    router, x = Router(config(balance="bias", scoring="sigmoid")), torch.randn(256, 16) + 1.0
    router.weight.data[0] += 0.5
    before = router(x)
    for _ in range(200):
        router.nudge(router(x).load)
    after = router(x)
    assert before.load.max() > 240 and after.load.max() < 160 and router.bias.abs().max() > 0.05
    scores = (x @ router.weight.T).sigmoid().gather(1, after.experts)
    torch.testing.assert_close(after.weights, scores / scores.sum(1, keepdim=True))
    fixed = Router(config(balance="switch"))
    fixed.nudge(torch.tensor([9.0, 0, 0, 0]))
    assert fixed.bias.abs().max() == 0


def test_nudges_go_up_for_idle_experts_and_down_for_busy_ones():
    router = Router(config(balance="bias", bias_rate=0.5))
    router.nudge(torch.tensor([10.0, 6.0, 8.0, 8.0]))
    assert router.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_a_router_computes_in_float32_whatever_the_model_does():
    x = torch.randn(200, 16)
    router, exact = routed(x)
    with torch.autocast("cpu", torch.bfloat16):
        same = router(x)
    assert same.weights.dtype == torch.float32
    assert torch.equal(same.experts, exact.experts)
    assert torch.equal(same.weights, exact.weights)  # not to three digits: to the last bit
    assert router.bfloat16()(x.bfloat16()).weights.dtype == torch.float32


def test_jitter_is_for_the_router_and_for_training_only():
    torch.manual_seed(0)
    mixture, x = MoE(config(jitter=0.3, top_k=4)), torch.randn(1, 50, 16)
    weights = [mixture.router(x[0]).weights for _ in range(2)]
    assert not torch.equal(*weights)
    assert all((w.sum(1) - 1).abs().max() < 1e-6 for w in weights)
    mixture.eval()
    assert torch.equal(*[mixture.router(x[0]).weights for _ in range(2)])
    seen = []
    mixture.train().experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixture(x)
    assert torch.equal(seen[0], x[0])  # the experts see the token itself


def test_capacity_drops_who_comes_too_late_and_counts_them():
    router = Router(config(capacity=1.0, n_experts=2, top_k=2, d_model=2, n_heads=1, n_kv_heads=1))
    router.weight.data.copy_(torch.eye(2))
    x = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    routing = router.train()(x)  # each expert takes 4 of the 8 assignments
    # Expert 0 is the first choice of tokens 0 to 2 and the second of 3: full, none dropped.
    assert routing.experts.tolist() == [[0, 1], [0, 1], [0, 1], [1, 0]]
    router.capacity = 0.5  # 2 each: first choices come before any second one
    routing = router(x)
    assert routing.experts.tolist() == [[0, 1], [0, 2], [2, 2], [1, 2]]
    assert routing.dropped.item() == 0.5 and routing.load.tolist() == [4, 4]
    assert (routing.weights[routing.experts == 2] == 0).all()
    assert router.eval()(x).dropped == 0  # at inference nothing is dropped


@pytest.mark.parametrize("way", WAYS)
def test_a_dropped_token_gets_nothing_from_its_expert(way):
    grouped_or_skip(way)
    torch.manual_seed(0)
    mixture, x = MoE(config(capacity=0.4, dispatch=way)), torch.randn(1, 40, 16)
    y = mixture.train()(x)[0]
    lost = (mixture.routing.experts == 4).all(1)
    assert lost.any() and not lost.all()
    assert (y[lost] == 0).all() and (y[~lost].abs().sum(1) > 0).all()
    counts = torch.bincount(mixture.routing.experts.flatten(), minlength=5)[:4]
    assert counts.max() <= math.ceil(0.4 * 40 * 2 / 4)
    assert mixture.routing.dropped.item() == pytest.approx(1 - counts.sum().item() / 80)


# ---- the experts


def run_experts(way, x, chosen, weights, dtype=torch.float32, seed=0, **changes):
    """Output and all gradients of Experts under a fixed loss."""
    torch.manual_seed(seed)
    experts = Experts(config(dispatch=way, **changes)).to(dtype)
    x, weights = (t.to(dtype).requires_grad_() for t in (x, weights))
    y = experts(x, chosen, weights)
    torch.manual_seed(1)
    (y * torch.randn(y.shape).to(dtype)).sum().backward()
    return [y.detach(), x.grad, weights.grad, *[p.grad for p in experts.parameters()]]


def choices(N, k, E, case, seed=0):
    torch.manual_seed(seed)
    chosen = torch.stack([torch.randperm(E)[:k] for _ in range(N)])
    if case == "one takes all":
        chosen = torch.arange(k).repeat(N, 1)
    if case == "dropped":
        chosen[torch.rand(N, k) < 0.4] = E
    if case == "all dropped":
        chosen.fill_(E)
    weights = torch.rand(N, k) * (chosen < E)
    return torch.randn(N, 16), chosen, weights


@pytest.mark.parametrize("way", ["segments", "grouped"])
@pytest.mark.parametrize("case", ["any", "one takes all", "dropped", "all dropped"])
@pytest.mark.parametrize("N, k, E", [(37, 2, 4), (1, 2, 4), (1, 1, 8), (64, 4, 16), (5, 3, 3)])
def test_three_ways_give_the_same_values_and_gradients(way, case, N, k, E):
    grouped_or_skip(way)
    x, chosen, weights = choices(N, k, E, case)
    sizes = dict(n_experts=E, top_k=k)
    plain = run_experts("loop", x, chosen, weights, **sizes)
    fast = run_experts(way, x, chosen, weights, **sizes)
    for a, b in zip(fast, plain):
        assert a.isfinite().all()
        if case == "dropped" and a is fast[2] and way == "grouped":
            a, b = a * (chosen < E), b * (chosen < E)  # it computes what nobody asked for
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    idle = torch.bincount(chosen.flatten(), minlength=E + 1)[:E] == 0
    assert all((g[idle] == 0).all() for g in fast[3:])  # no token, no gradient


def test_segments_gradients_are_exact():
    torch.manual_seed(0)
    counts = [3, 0, 4, 1]
    shapes = ((8, 5), (4, 6, 5), (4, 6, 5), (4, 5, 6))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: Segments.apply(*t, counts), tensors)


def test_loop_gradients_are_exact():
    x, chosen, weights = choices(6, 2, 4, "dropped")
    experts = Experts(config(dispatch="loop")).double()
    inputs = [x.double().requires_grad_(), weights.double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w: experts(x, chosen, w), inputs)


@pytest.mark.parametrize("way", WAYS)
def test_the_layer_is_mixtral_s(way):
    grouped_or_skip(way)
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    hf = mixtral.MixtralConfig(
        hidden_size=16, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2
    )
    hf._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs, ours = mixtral.MixtralSparseMoeBlock(hf), MoE(config(dispatch=way))
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        both = torch.cat([ours.experts.gate, ours.experts.up], dim=1)
        theirs.experts.gate_up_proj.copy_(both)
        theirs.experts.down_proj.copy_(ours.experts.down)
    x = torch.randn(2, 30, 16)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        y = layer(own)
        (y * y.detach().cos()).sum().backward()
        results.append((y, own.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    gate, up = theirs.experts.gate_up_proj.grad.chunk(2, dim=1)
    for a, b in (
        (ours.experts.gate.grad, gate),
        (ours.experts.up.grad, up),
        (ours.experts.down.grad, theirs.experts.down_proj.grad),
        (ours.router.weight.grad, theirs.gate.weight.grad),
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_sigmoid_bias_and_shared_experts_are_deepseek_s():
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    hf = deepseek.DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=2, n_group=1, topk_group=1, routed_scaling_factor=1.0,
        norm_topk_prob=True,
    )  # fmt: skip
    hf._experts_implementation = "eager"
    torch.manual_seed(0)
    theirs = deepseek.DeepseekV3MoE(hf)
    ours = MoE(config(scoring="sigmoid", balance="bias", n_shared=2))
    ours.router.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.gate.e_score_correction_bias.copy_(ours.router.bias)
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.experts.gate, ours.experts.up], dim=1))
        theirs.experts.down_proj.copy_(ours.experts.down)
        gate, up = ours.shared.gate_up.weight.chunk(2)
        theirs.shared_experts.gate_proj.weight.copy_(gate)
        theirs.shared_experts.up_proj.weight.copy_(up)
        theirs.shared_experts.down_proj.weight.copy_(ours.shared.down.weight)
    x = torch.randn(2, 30, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_an_expert_cut_in_two_is_the_same_expert():
    x, chosen, weights = choices(20, 2, 4, "any")
    whole = Experts(config())
    halves = Experts(config(n_experts=8, top_k=4, d_expert=4))  # fine-grained: half as wide, twice
    for name in ("gate", "up"):  # expert e becomes 2 e and 2 e + 1
        getattr(halves, name).data.copy_(getattr(whole, name).data.view(8, 4, 16))
    halves.down.data.copy_(whole.down.data.view(4, 16, 2, 4).transpose(1, 2).reshape(8, 16, 4))
    both = torch.stack([2 * chosen, 2 * chosen + 1], dim=2).flatten(1)
    y = halves(x, both, weights.repeat_interleave(2, dim=1))
    torch.testing.assert_close(y, whole(x, chosen, weights), atol=1e-5, rtol=1e-5)


def test_scores_that_are_all_0_give_no_bad_number():
    router = Router(config(scoring="sigmoid"))
    router.weight.data.fill_(-50)
    routing = router(torch.ones(5, 16))
    assert all(t.isfinite().all() for t in (routing.weights, routing.entropy, routing.balance))


@pytest.mark.parametrize("way", WAYS)
def test_autocast_computes_experts_in_bfloat16(way):
    grouped_or_skip(way)
    x, chosen, weights = choices(64, 2, 4, "any")
    experts = Experts(config(dispatch=way))
    exact = experts(x, chosen, weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, chosen, weights)
    y.square().sum().backward()
    assert y.dtype == torch.float32 and not torch.equal(y, exact)
    torch.testing.assert_close(y, exact, atol=0.02, rtol=0.05)
    assert experts.gate.grad.dtype == torch.float32


def test_a_torch_without_grouped_mm_says_so(monkeypatch):
    x, chosen, weights = choices(8, 2, 4, "any")
    experts = Experts(config(dispatch="grouped"))
    plain = experts.loop(x, chosen, weights)
    if hasattr(F, "grouped_mm"):
        if hasattr(torch, "_grouped_mm"):  # the older name
            monkeypatch.delattr(F, "grouped_mm")
            torch.testing.assert_close(experts(x, chosen, weights), plain, atol=1e-5, rtol=1e-5)
    for place, name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
        monkeypatch.delattr(place, name, raising=False)
    with pytest.raises(ValueError, match="take segments"):
        experts(x, chosen, weights)


# ---- the model


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("mixtral", dict(qk_norm=False)),
        ("mixtral", dict(qk_norm=False, head_dim=6, tie_embeddings=False, top_k=3)),
        ("mixtral", dict(qk_norm=False, top_k=1, renormalize=True)),
        ("qwen3_moe", dict(moe_layers="1", renormalize=False)),
        ("qwen3_moe", dict(n_layers=4, moe_layers="every-2", tie_embeddings=False, head_dim=8)),
        ("qwen3", dict(moe_layers="none")),
        ("llama", dict(moe_layers="none", qk_norm=False)),
    ],
)
def test_transformers_reads_what_is_saved_and_the_other_way(tmp_path, kind, changes):
    transformers = pytest.importorskip("transformers")
    model, ids = new_model(**changes).eval(), some_ids()
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.config.model_type == kind
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = MoETransformerLM.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(again(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_models_made_by_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=60, hidden_size=16, num_hidden_layers=4, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=32, num_experts_per_tok=2)
    torch.manual_seed(0)
    for hf in (
        transformers.MixtralConfig(**shape, intermediate_size=12, num_local_experts=4),
        transformers.Qwen3MoeConfig(
            **shape,
            intermediate_size=20,
            moe_intermediate_size=12,
            num_experts=4,
            head_dim=8,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            norm_topk_prob=True,
        ),  # fmt: skip
    ):
        hf.initializer_range = 0.3
        theirs = transformers.AutoModelForCausalLM.from_config(hf).eval()
        theirs.save_pretrained(tmp_path / hf.model_type, max_shard_size="20KB")
        ours = MoETransformerLM.from_pretrained(tmp_path / hf.model_type).eval()
        ids = some_ids()
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        new = theirs.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(ours.generate(ids[:1], 8, temperature=0)[:, : new.shape[1]], new)
    assert ours.config.sparse == [False, True, False, False]


def test_saving_over_a_sharded_directory_replaces_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    new_model(qk_norm=False).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = MoETransformerLM.from_pretrained(tmp_path)
    model.norm.weight.data.fill_(3.0)
    model.save_pretrained(tmp_path)
    assert MoETransformerLM.from_pretrained(tmp_path).norm.weight[0] == 3.0


def test_what_no_layout_of_theirs_holds_comes_back_from_ours(tmp_path):
    features = dict(scoring="sigmoid", balance="bias", n_shared=1, moe_layers="1", top_k=1)
    model, ids = new_model(**features).eval(), some_ids()
    model.blocks[1].mlp.router.bias.copy_(torch.tensor([0.9, -0.9, 0.3, 0.0]))
    model.token_ids = dict(eos_token_id=7)
    model.save_pretrained(tmp_path)
    again = MoETransformerLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids), model(ids)) and again.config == model.config
    assert again.token_ids == dict(eos_token_id=7)
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"n_moons": 2}))
    with pytest.raises(ValueError, match="does not fit this stage.*n_moons"):
        MoETransformerLM.from_pretrained(tmp_path)
    again.blocks[1].mlp.router.bias.zero_()
    assert not torch.equal(again(ids), model(ids))  # so the bias was in the file


def test_a_model_in_bfloat16_routes_and_counts_positions_in_float32(tmp_path):
    model, ids = new_model(qk_norm=False).eval(), some_ids()
    model.blocks[0].mlp.router.weight.data.fill_(1 + 2**-12)
    model.save_pretrained(tmp_path)
    small = MoETransformerLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(small.frequencies, model.frequencies)
    routers = [m.mixtures()[0].router.weight for m in (small, model)]
    assert torch.equal(*routers) and small.output.weight.dtype == torch.bfloat16
    torch.testing.assert_close(small(ids).float(), model(ids), atol=0.5, rtol=0.1)


def test_a_directory_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a whole model directory"):
        MoETransformerLM.from_pretrained(tmp_path)
    new_model(qk_norm=False).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    hf = json.loads(path.read_text())
    for change, message in (
        (dict(num_local_experts=5), r"experts.4.gate_proj.weight is missing"),
        (dict(intermediate_size=11), r"gate_proj.weight is \(8, 16\), not \(11, 16\)"),
        (dict(model_type="gpt2"), "holds a gpt2 model: llama"),
        (dict(sliding_window=8), "sliding_window 8, which is not supported"),
        (dict(num_hidden_layers=1), "layers.1.*is unknown"),
    ):
        path.write_text(json.dumps(hf | change))
        with pytest.raises(ValueError, match=message):
            MoETransformerLM.from_pretrained(tmp_path)
    path.write_text(json.dumps(hf))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="not a whole model directory"):
        MoETransformerLM.from_pretrained(tmp_path)


def test_parameters_total_and_active_are_those_that_a_token_moves():
    model = new_model(n_shared=1, moe_layers="1", n_layers=2, tie_embeddings=False)
    total, active = model.counts()
    assert total == sum(p.numel() for p in model.parameters())
    model(some_ids(1, 1)).square().sum().backward()
    weights = list(model.blocks[1].mlp.experts.parameters())
    moved = [(p.grad.flatten(1).abs().amax(1) > 0).sum().item() for p in weights]
    used = sum(n * p[0].numel() for n, p in zip(moved, weights))
    experts = sum(p.numel() for p in weights)
    assert used == experts // 2 and active == total - experts + used


def test_fine_grained_experts_cost_as_much_as_few_wide_ones():
    wide = MoETransformerLM(config(d_ff=32, d_expert=16, n_experts=4, top_k=2))
    fine = MoETransformerLM(config(d_ff=32, d_expert=4, n_experts=16, top_k=8))
    routers = 2 * (16 - 4) * 16  # more rows of the routers, in two layers
    assert fine.counts() == tuple(n + routers for n in wide.counts())
    dense = MoETransformerLM(config(d_ff=32, moe_layers="none"))
    active = MoETransformerLM(config(d_ff=32, d_expert=None, n_experts=16, top_k=2))
    assert active.counts()[1] == dense.counts()[1] + 2 * 16 * 16  # the routers


def test_the_cache_gives_what_the_whole_text_gives():
    model, ids = new_model(moe_layers="1").eval(), some_ids(2, 12)
    cache = generation.KVCache(model.config, 2)
    pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="do not fit into the cache"):
        model(some_ids(2, 21), cache=cache)


def test_generation_is_greedy_argmax_alone_and_in_a_batch_of_any_lengths():
    model = new_model().eval()
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    alone = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        alone.append(ids[len(prompt) :])
    assert model.generate(prompts, 8, temperature=0) == alone
    stop = alone[0][3]
    cut = model.generate([prompts[0]], 8, stop_tokens=[stop], temperature=0)[0]
    assert cut == alone[0][: alone[0].index(stop) + 1]
    drawn = [model.generate([prompts[0]], 8, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="do not fit into a context of 32"):
        model.generate([[1] * 30], 8)


def test_no_token_sees_the_future():
    model, ids = new_model(), some_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 60
    for training_mode in (False, True):  # dropless: also in training
        model.train(training_mode)
        torch.testing.assert_close(model(ids)[:, :12], model(changed)[:, :12])
        assert not torch.allclose(model(ids)[:, 12:], model(changed)[:, 12:])


def test_capacity_lets_the_future_in_and_so_is_for_training_only():
    model, ids = new_model(capacity=0.5), some_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 60
    assert not torch.allclose(model.train()(ids)[:, :12], model(changed)[:, :12])
    torch.testing.assert_close(model.eval()(ids)[:, :12], model(changed)[:, :12])


def test_auxiliary_is_the_weighted_sum_over_mixtures():
    model = new_model(balance_weight=0.5, z_weight=0.25)
    model(some_ids())
    routings = [block.mlp.routing for block in model.blocks]
    plain = sum(0.5 * r.balance + 0.25 * r.z for r in routings)
    torch.testing.assert_close(model.auxiliary(), plain)
    model.config.balance = "bias"
    torch.testing.assert_close(model.auxiliary(), sum(0.25 * r.z for r in routings))
    dense = new_model(moe_layers="none")
    dense(some_ids())
    assert dense.auxiliary() == 0.0 and dense.mixtures() == []


@pytest.mark.parametrize(
    "pattern, layers",
    [
        ("all", [0, 1, 2, 3, 4]),
        ("none", []),
        ("every-2", [1, 3]),
        ("every-3", [2]),
        ("0, 4", [0, 4]),
    ],
)
def test_which_layers_are_mixtures(pattern, layers):
    model = MoETransformerLM(config(n_layers=5, moe_layers=pattern))
    assert [i for i, b in enumerate(model.blocks) if isinstance(b.mlp, MoE)] == layers


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(top_k=5), "top_k 5 is more than n_experts 4"),
        (dict(top_k=0), "top_k is 0"),
        (dict(moe_layers="odd"), "moe_layers 'odd' is neither all, none, like every-2"),
        (dict(moe_layers="every-0"), "every-0"),
        (dict(moe_layers="0,2"), "nor layers from 0 to 1"),
        (dict(scoring="relu"), "scoring 'relu' is none of softmax, sigmoid"),
        (dict(balance="hope"), "balance 'hope' is none of switch, bias, none"),
        (dict(dispatch="fast"), "dispatch 'fast' is none of auto"),
        (dict(dispatch="grouped", d_expert=12), "d_expert 12 must be multiples of 8"),
        (dict(capacity=0.0), "capacity 0.0 is not a number above 0"),
        (dict(capacity=math.inf), "capacity inf is not a number"),
        (dict(jitter=1.0), "jitter in"),
        (dict(n_kv_heads=3), "not divisible by n_kv_heads"),
        (dict(d_model=18), "not divisible by n_heads"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


# ---- from dense to mixture


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("fields", [{}, dict(moe_layers="1", scoring="sigmoid", balance="bias")])
def test_an_upcycled_model_starts_as_the_dense_one(tmp_path, qk_norm, fields):
    dense, ids = new_model(moe_layers="none", qk_norm=qk_norm).eval(), some_ids()
    dense.save_pretrained(tmp_path)
    mixture = MoETransformerLM.from_dense(tmp_path, n_experts=8, top_k=2, **fields).eval()
    torch.testing.assert_close(mixture(ids), dense(ids), atol=1e-5, rtol=1e-5)
    assert mixture.config.d_expert == 24 and len(mixture.mixtures()) == (1 if fields else 2)
    assert mixture.counts()[0] > 1.5 * dense.counts()[0]
    mixture.train()
    (mixture(ids, ids) + mixture.auxiliary()).backward()
    gradients = mixture.mixtures()[0].experts.gate.grad
    assert (gradients[0] - gradients[1]).abs().max() > 1e-5  # from here on they differ


def test_a_dense_model_of_transformers_can_be_upcycled(tmp_path):
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(hf).eval()
    dense.save_pretrained(tmp_path)
    mixture, ids = MoETransformerLM.from_dense(tmp_path, n_experts=4).eval(), some_ids()
    torch.testing.assert_close(mixture(ids), dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_dense_model_that_does_not_fit_is_refused(tmp_path):
    new_model(moe_layers="none").save_pretrained(tmp_path / "dense")
    new_model().save_pretrained(tmp_path / "mixture")
    for fields, message in (
        (dict(d_expert=8), r"d_expert 8 \(a copied MLP has 24\)"),
        (dict(d_model=32, head_dim=None), r"d_model 32 \(it has 16\)"),
        (dict(n_layers=3), r"n_layers 3 \(it has 2\)"),
        (dict(top_k=1), "weights that do not sum to 1"),
        (dict(n_shared=1), "shared experts"),
        (dict(top_k=9), "top_k 9 is more than n_experts 8"),
    ):
        with pytest.raises(ValueError, match=message):
            MoETransformerLM.from_dense(tmp_path / "dense", **fields)
    with pytest.raises(ValueError, match="a mixture already"):
        MoETransformerLM.from_dense(tmp_path / "mixture")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="holds a qwen2 model"):
        MoETransformerLM.from_dense(tmp_path / "dense")


# ---- training


def test_muon_moves_a_stack_as_it_moves_its_matrices():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 6))
    single = [torch.nn.Parameter(m.clone()) for m in stack.detach()]
    optimizers = [training.Muon(params, 0.1) for params in ([stack], single)]
    for _ in range(3):
        stack.grad = torch.randn(3, 8, 6)
        for p, g in zip(single, stack.grad):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack, torch.stack(list(single)))
    # A step is nearly orthogonal, times 0.2 sqrt(8).
    before = stack.detach().clone()
    optimizers[0].param_groups[0]["weight_decay"] = 0.0
    optimizers[0].step()
    values = torch.linalg.svdvals((before - stack.detach()) / (0.1 * 0.2 * math.sqrt(8)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_takes_the_parts_of_a_matrix_apart():
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(12, 6))
    halves = [torch.nn.Parameter(m.clone()) for m in whole.detach().split([8, 4])]
    gradient = torch.randn(12, 6)
    whole.grad = gradient
    for p, g in zip(halves, gradient.split([8, 4])):
        p.grad = g.clone()
    training.Muon([dict(params=[whole], parts=[8, 4])], 0.1).step()
    training.Muon(halves, 0.1).step()
    torch.testing.assert_close(whole, torch.cat(halves))


def test_an_expert_without_a_token_rests_under_muon():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 6))
    optimizer = training.Muon([stack], 0.1, weight_decay=0.5)
    stack.grad = torch.randn(3, 8, 6)
    optimizer.step()
    before = stack.detach().clone()
    stack.grad = torch.randn(3, 8, 6)
    stack.grad[1] = 0
    optimizer.step()
    moved = (stack.detach() - before).abs().amax((1, 2))
    assert moved[1] == 0 and moved[0] > 1e-3 and moved[2] > 1e-3


def test_every_parameter_has_one_optimizer():
    model = MoETransformerLM(config(n_shared=1, moe_layers="1"))
    names = {p: name for name, p in model.named_parameters()}
    adam, muon = training.optimizers_of(model, training.TrainConfig())
    found = [[names[p] for g in o.param_groups for p in g["params"]] for o in (adam, muon)]
    assert sorted(found[0] + found[1]) == sorted(names.values())
    assert "blocks.1.mlp.experts.gate" in found[1] and "blocks.0.mlp.gate_up.weight" in found[1]
    assert "blocks.1.mlp.router.weight" in found[0] and "token_embedding.weight" in found[0]
    parts = {names[p]: g["parts"] for g in muon.param_groups for p in g["params"]}
    assert parts["blocks.0.attention.qkv.weight"] == [16, 8, 8]
    assert parts["blocks.1.mlp.shared.gate_up.weight"] == [8, 8]
    assert parts["blocks.1.mlp.experts.down"] is None
    assert len(training.optimizers_of(model, training.TrainConfig(optimizer="adamw"))) == 1


def test_clipping_scales_all_gradients_together():
    model = new_model()
    (100 * model(some_ids(), some_ids(seed=2))).backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = training.clip_gradients(model, 1.0)
    plain = torch.cat([g.flatten() for g in before]).norm()
    torch.testing.assert_close(norm, plain)
    assert plain > 1
    for p, g in zip(model.parameters(), before):
        torch.testing.assert_close(p.grad, g / plain, atol=1e-6, rtol=1e-4)


TEXT = np.frombuffer(b"the cat sat on the mat; the dog lay on the log. " * 60, np.uint8) % 60


class Lines(SimpleNamespace):
    """A run that keeps its lines."""

    def log(self, **line):
        self.lines.append(line)


def train(tmp_path, steps=6, model=None, resume=False, hooks=None, shape=None, **settings):
    model = new_model(**shape or {}) if model is None else model
    defaults = dict(tokens_per_step=128, warmup_steps=2, eval_every=3, eval_tokens=300, max_lr=1e-2)
    how = training.TrainConfig(steps=steps, **defaults | settings)
    loader = training.TokenLoader([TEXT], 32, how.tokens_per_step // 32, how.seed)
    run = Lines(dir=tmp_path, resume=resume, lines=[])
    torch.manual_seed(5)
    training.train(model, loader, TEXT[:400], how, run, **hooks or {})
    return model, run.lines


def test_training_learns_and_tells_what_its_routers_did(tmp_path):
    model, lines = train(
        tmp_path, steps=60, shape=dict(moe_layers="0,1", n_experts=8), eval_every=60
    )
    assert lines[-1]["train_loss"] < 0.4 * lines[0]["train_loss"]
    for line in lines:
        assert np.shape(line["load"]) == (2, 8)
        np.testing.assert_allclose(np.sum(line["load"], 1), 1, atol=1e-3)
        assert 0 < min(line["entropy"]) and max(line["entropy"]) <= math.log(8) + 1e-4
        assert line["dropped"] == 0 and min(line["balance_loss"]) > 0.5
    assert MoETransformerLM.from_pretrained(tmp_path).config.n_experts == 8


@pytest.mark.parametrize("loss", ["balance_weight", "z_weight"])
def test_training_adds_the_losses_of_the_routers(tmp_path, loss):
    settings = dict(steps=12, max_lr=5e-2, optimizer="adamw")
    shapes = [dict(balance_weight=0.0, z_weight=0.0) | {loss: weight} for weight in (0.0, 10.0)]
    key = dict(balance_weight="balance_loss", z_weight="z_loss")[loss]
    free, held = (
        np.mean(train(tmp_path / str(i), shape=shape, **settings)[1][-1][key])
        for i, shape in enumerate(shapes)
    )
    assert held < 0.9 * free


def test_training_in_bfloat16_is_nearly_that_in_float32(tmp_path):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, run = new_model(), Lines(dir=tmp_path, resume=False, lines=[])
        how = training.TrainConfig(
            steps=3, tokens_per_step=128, warmup_steps=1, eval_tokens=300, eval_every=9
        )
        loader = training.TokenLoader([TEXT], 32, 4)
        training.train(model, loader, TEXT[:400], how, run, dtype=dtype)
        assert model.mixtures()[0].routing.weights.dtype == torch.float32
        results.append([line["train_loss"] for line in run.lines])
    assert results[0] != results[1]
    np.testing.assert_allclose(*results, rtol=0.02)


def test_training_stops_when_validation_no_longer_falls(tmp_path):
    _, lines = train(tmp_path, steps=30, max_lr=0.0, eval_every=1, patience=2)
    assert len(lines) == 3  # the first counts as the best


def test_a_model_can_be_copied_in_the_middle_of_training():
    model, ids = new_model(), some_ids()
    (model(ids, ids) + model.auxiliary()).backward()
    torch.testing.assert_close(copy.deepcopy(model)(ids), model(ids))


def test_dropped_tokens_are_counted_in_training(tmp_path):
    _, lines = train(tmp_path, steps=3, shape=dict(capacity=0.6))
    assert all(0.1 < line["dropped"] < 0.9 for line in lines)


def test_the_bias_is_nudged_once_a_step(tmp_path):
    shape = dict(balance="bias", bias_rate=0.125)
    model, lines = train(tmp_path, steps=1, shape=shape, micro_batch=1)
    for mixture, load in zip(model.mixtures(), lines[0]["load"]):
        expected = [0.125 * np.sign(round(0.25 - share, 4)) for share in load]
        assert mixture.router.bias.tolist() == expected
    assert any(mixture.router.bias.abs().max() > 0 for mixture in model.mixtures())


def test_micro_batches_take_the_same_step_where_no_loss_mixes_tokens(tmp_path):
    shape = dict(balance="none")
    results = [
        train(tmp_path / str(n), 3, shape=shape, micro_batch=n, eval_every=9)[1] for n in (4, 1, 3)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
            np.testing.assert_allclose(a["load"], b["load"], atol=2e-4)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, number, code):
    shape = dict(dropout=0.2, jitter=0.1, balance="bias")
    whole, lines = train(tmp_path / "whole", 6, shape=shape)

    def interrupt(line):
        if line["step"] == 4:
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as end:
        train(tmp_path / "parts", 6, shape=shape, hooks=dict(on_step=interrupt))
    assert end.value.code == code
    again, rest = train(tmp_path / "parts", 6, model=new_model(9, **shape), resume=True)
    assert [line["step"] for line in rest] == [5, 6]
    assert rest[-1]["train_loss"] == lines[-1]["train_loss"] and rest[-1]["lr"] == lines[-1]["lr"]
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path):
    model = new_model()

    def poison(line):
        if line["step"] == 4:
            model.norm.weight.data.fill_(math.nan)

    with pytest.raises(ValueError, match="step 5: the loss is nan.*the last good state"):
        train(tmp_path, 6, model=model, hooks=dict(on_step=poison))
    (state,) = tmp_path.glob("state-*")
    assert state.name == "state-0-3.pt" and torch.load(state, weights_only=True)["step"] == 3


def test_a_damaged_state_is_refused(tmp_path):
    train(tmp_path, 3)
    whole = (tmp_path / "state-0-3.pt").read_bytes()
    (tmp_path / "state-0-3.pt").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="cannot be read.*--fresh"):
        train(tmp_path, 6, resume=True)


# ---- experts on several ranks


def test_experts_must_be_divisible_over_ranks():
    with pytest.raises(ValueError, match="4 experts cannot be shared out over 3 ranks evenly"):
        new_model().spread(0, 3)


RANKED = [dict(n_shared=1), dict(balance="bias", scoring="sigmoid", moe_layers="1")]


def train_ranked(home, rank=0, world=1):
    """Train each of RANKED on this rank of several; the first one writes what it found."""
    torch.set_num_threads(1)
    for i, shape in enumerate(RANKED):
        model = new_model(**shape)
        model.spread(rank, world)
        how = training.TrainConfig(
            steps=4, tokens_per_step=128, warmup_steps=2, eval_every=4, eval_tokens=300,
            max_lr=1e-2, micro_batch=2 // world,  # the same tokens together: balance mixes them
        )  # fmt: skip
        loader = training.TokenLoader([TEXT], 32, 4, 1, rank, world)
        run = Lines(dir=home / str(i), resume=False, lines=[])
        training.train(model, loader, TEXT[:400], how, run)
        if rank == 0:
            (run.dir / "lines.json").write_text(json.dumps(run.lines))
        again = new_model(9, **shape).spread(rank, world)  # goes on from the state for two steps
        how.steps, run.resume = 6, True
        training.train(again, loader, TEXT[:400], how, run)
        again.save_pretrained(run.dir)
    torch.manual_seed(3)
    mixture = MoE(config())
    mixture.router.weight.data.copy_(torch.tensor([2.0, 1.0, -1.0, -2.0])[:, None])
    if world > 1:
        mixture.spread(rank, world)
    x = torch.rand(1, 8, 16, generator=torch.Generator().manual_seed(3))
    x = x.chunk(world, dim=1)[rank].clone().requires_grad_()
    y = mixture(x)  # all tokens go to experts 0 and 1, none to the second rank
    y.square().sum().backward()
    found = dict(y=y.detach(), dx=x.grad, experts=[p.grad for p in mixture.experts.parameters()])
    torch.save(found, home / f"idle-{rank}.pt")


RANK = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from test_moe import train_ranked
dist.init_process_group("gloo")
train_ranked(Path(sys.argv[1]), dist.get_rank(), 2)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo may still be ending, and a plain exit would then abort
"""


def test_two_ranks_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        env = os.environ | dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        env |= dict(MASTER_PORT=str(port), OMP_NUM_THREADS="1", PYTHONPATH=paths)
        command = [sys.executable, "-c", RANK, str(tmp_path / "two")]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    train_ranked(tmp_path / "one")
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    for i in range(len(RANKED)):
        homes = [tmp_path / name / str(i) for name in ("one", "two")]
        one, two = (json.loads((home / "lines.json").read_text()) for home in homes)
        for a, b in zip(one, two, strict=True):
            for key in ("train_loss", "grad_norm", "val_loss"):
                assert a[key] == pytest.approx(b[key], abs=1e-5), key
            for key in ("load", "entropy", "balance_loss", "z_loss"):
                np.testing.assert_allclose(a[key], b[key], atol=2e-4)  # rounded to four digits
        models = [MoETransformerLM.from_pretrained(home) for home in homes]
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
            torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-5, msg=name)
    one = torch.load(tmp_path / "one" / "idle-0.pt")
    ranks = [torch.load(tmp_path / "two" / f"idle-{rank}.pt") for rank in range(2)]
    for key in ("y", "dx"):
        torch.testing.assert_close(torch.cat([r[key] for r in ranks], 1), one[key])
    for whole, *parts in zip(one["experts"], *(r["experts"] for r in ranks)):
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
        assert (parts[1] == 0).all() and (parts[0] != 0).any()
        assert [p.shape for p in models[1].parameters()] == [
            p.shape for p in models[0].parameters()
        ]


# ---- the command line


SMALL = (
    "--d_model 16 --n_layers 2 --n_heads 2 --context_length 16 --device cpu --n_experts 4".split()
)
SMALL += "--tokens_per_step 64 --eval_every 20 --eval_tokens 200 --warmup_steps 2".split()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A small text about nothing much,\nrepeated until it will do.\n" * 200)
    return path


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


def test_the_command_trains_tells_draws_resumes_and_samples(command, text, tmp_path):
    train = ("train", "--data", text, *SMALL, "--max_lr", "1e-2", "--qk_norm")
    code, out, err = command(*train, "--steps", 40)
    assert code == 0, err
    home = (tmp_path / "out" / "06_moe" / "latest").resolve()
    total, active = MoETransformerLM.from_pretrained(home).counts()
    assert f"model: {total:,} parameters, {active:,} of them active" in out
    assert (
        "mixture 1: load" in out
        and "nats, balance loss 1." in out
        and "tokens that the expert takes first" in out
    )
    assert "bits per byte. Model, loss.png, routing.png, experts.png" in out
    for name in ("loss.png", "routing.png", "experts.png"):
        assert (home / name).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((home / "config.json").read_text())["model_type"] == "qwen3_moe"
    code, out, _ = command(*train, "--steps", 40)
    assert code == 0 and "is finished" in out and "--steps 80" in out
    code, out, _ = command(*train, "--steps", 44)
    assert code == 0 and "(going on)" in out
    assert "do not fit into a context of 16: give fewer" in refused(
        command("sample", "--model", home)
    )
    code, out, _ = command("sample", "--model", home, "--prompt", "A small", "--max_new_tokens", 8)
    assert code == 0 and out.startswith("A small")
    picture = tmp_path / "map.png"
    code, out, _ = command("map", "--model", home, "--text", "about nothing", "--to", picture)
    assert code == 0 and picture.exists() and "13 tokens, 2 mixtures" in out
    # Upcycled: from a dense model of this very command.
    dense = ("train", "--data", text, *SMALL, "--moe_layers", "none", "--steps", 20, "--run", "d")
    assert command(*dense)[0] == 0
    made = (tmp_path / "out" / "06_moe" / "latest").resolve()
    loss = json.loads((made / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    words = ("--data", text, "--device", "cpu", "--tokens_per_step", 64, "--eval_tokens", 200)
    code, out, err = command(
        "train", "--upcycle", made, *words, "--steps", 1, "--max_lr", 0, "--run", "up"
    )
    assert code == 0, err
    newest = tmp_path / "out" / "06_moe" / "latest"
    again = json.loads((newest / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert again == pytest.approx(loss, abs=1e-4) and "8 of width" in out
    assert "is a mixture already" in refused(command("train", "--upcycle", home, *words))
    line = refused(command("train", "--upcycle", made, *words, "--d_expert", 5))
    assert "the dense model" in line and "d_expert 5" in line
    assert "it has no experts to draw" in refused(command("map", "--model", made))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--device cuda", "--device cuda is not to be had here"),
        ("--top_k 5", "top_k 5 is more than n_experts 4"),
        ("--moe_layers odd", "moe_layers 'odd' is neither all"),
        ("--upcycle nowhere", "--upcycle nowhere holds no model"),
        ("--preset huge", "--preset huge is none of small"),
        ("--optimizer sgd", "optimizer sgd is neither muon nor adamw"),
        ("--schedule step", "schedule step is none of"),
        ("--data missing.txt", "there is no such file"),
        ("--context_length 100000", "take more text or a shorter context"),
        ("--vocab_size 5", "--vocab_size 5 is less than the tokenizer's 257"),
    ],
)
def test_bad_input_ends_in_one_line(command, text, tmp_path, words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    base = [] if "--data" in words else ["--data", text]
    assert message in refused(command("train", *base, *SMALL, "--steps", 3, *words.split()))
    assert not list((tmp_path / "out").glob("06_moe/*/*"))  # nothing half-made


@pytest.mark.parametrize("world, rank", [(3, 0), (3, 2)])
def test_experts_that_ranks_cannot_share_are_refused_by_one_of_them(
    command, text, monkeypatch, world, rank
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", str(rank))
    result = command("train", "--data", text, *SMALL)
    if rank == 0:
        assert "4 experts cannot be shared out over 3 ranks evenly" in refused(result)
    else:
        assert result[0] == 2 and "error" not in result[2]


def test_what_is_missing_to_sample_or_draw_is_said(command, tmp_path):
    for name in ("sample", "map"):
        assert "make 06 trains one" in refused(command(name, "--model", tmp_path / "no"))
    assert "temperature -1.0 is below 0" in refused(command("sample", "--temperature", -1))


def test_the_size_of_a_preset_nobody_knows_is_refused(command):
    assert "--preset huge is none of small" in refused(command("describe", "--preset", "huge"))


def test_another_text_is_another_run(command, text, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    again = other / "text.txt"
    again.write_text("Other words in another order,\nand again from the start.\n" * 200)
    for path in (text, again):
        code, out, err = command("train", "--data", path, *SMALL, "--steps", 2)
        assert code == 0 and "is finished" not in out, err
    code, out, _ = command("train", "--data", text, *SMALL, "--steps", 2)
    assert "is finished" in out


def test_describe_counts_what_is_active(command):
    code, out, _ = command("describe", *SMALL[:8], "--vocab_size", 60)
    assert code == 0 and "experts" in out and "router" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:-1]}
    parts = [int(r[0].replace(",", "")) for name, r in rows.items() if name != "all"]
    assert sum(parts) == int(rows["all"][0].replace(",", ""))


def test_collapse_compares_three_ways_of_balancing(command, text, tmp_path):
    code, out, err = command(
        "collapse", "--data", text, "--steps", 8, "--tokens", 256, "--n_experts", 4
    )
    assert code == 0, err
    assert all(name in out for name in ("nothing", "Switch loss", "nudged bias"))
    home = tmp_path / "out" / "06_moe" / "collapse"
    assert (home / "collapse.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((home / "collapse.json").read_text())
    assert all(len(row["used"]) == 3 and row["val_bpb"] > 0 for row in rows.values())
    assert len({json.dumps(row["busiest"]) for row in rows.values()}) == 3


# ---- pictures


def test_the_map_colours_each_token_by_its_first_expert(tmp_path):
    model = new_model(vocab_size=257).eval()
    ids = torch.tensor(list(b"to be\nor not"))
    model(ids[None])
    own = torch.stack([m.routing.experts[:, 0] for m in model.mixtures()])
    assert torch.equal(charts.first_choices(model.train(), ids), own) and model.training
    figure = charts.draw_map(model, common.Tokenizer(), ids, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    for axes, chosen in zip(figure.axes, own.tolist(), strict=True):
        boxes = [box.get_facecolor()[:3] for box in axes.patches]
        assert boxes == [charts.colour(e, 4)[:3] for e in chosen]
        assert "".join(text.get_text() for text in axes.texts) == "to be¶or not"


def test_the_plot_of_the_routing_shows_each_expert_s_load(tmp_path):
    loads = np.random.default_rng(0).dirichlet(np.ones(4), (6, 2))  # (steps, mixtures, E)
    rows = [
        dict(step=s, load=x.tolist(), entropy=[1.0, s], balance_loss=[1, 2], dropped=s / 10)
        for s, x in enumerate(loads, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figure = charts.plot_routing(tmp_path)
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for i in range(2):
        np.testing.assert_allclose(maps[i], 4 * loads[:, i].T)
    lines = {axes.get_title(): axes.lines for axes in figure.axes if axes.lines}
    assert len(lines) == 3
    np.testing.assert_allclose(lines["tokens dropped, %"][0].get_ydata(), np.arange(1, 7) * 10)
    assert (tmp_path / "routing.png").stat().st_size > 5000


def test_specialities_are_the_tokens_that_an_expert_takes_most_of():
    model = new_model(vocab_size=257, moe_layers="0").eval()
    with torch.no_grad():  # the first layer's attention gives nothing: a token alone decides
        model.blocks[0].attention.out.weight.zero_()
    tokens = np.frombuffer(b"abcdef" * 20, np.uint8)
    (found,) = charts.specialities(model, common.Tokenizer(), tokens)
    experts = charts.first_choices(model, torch.tensor(list(b"abcdef")))[0].tolist()
    for e, (share, names) in enumerate(found):
        mine = {repr(letter) for letter, choice in zip("abcdef", experts) if choice == e}
        assert set(names) == mine and share == pytest.approx(len(mine) / 6, abs=0.01)


def test_the_summary_names_load_entropy_balance_and_what_was_dropped():
    line = dict(load=[[0.25, 0.75, 0.0]], entropy=[0.5], balance_loss=[1.25], dropped=0.125)
    assert list(charts.summary(line)) == [
        "mixture 0: load  25  75   0 %, 1 idle, entropy 0.50 nats, balance loss 1.25",
        "dropped: 12.5% of the assignments",
    ]
    assert list(charts.summary({})) == []


def test_lines_logged_again_after_a_resume_count_once(tmp_path):
    rows = [dict(step=s, load=[[0.5, 0.5]], n=n) for n, s in enumerate((1, 2, 3, 2, 3, 4))]
    rows.insert(2, dict(step=9))  # a line without routers
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = charts.routing_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["n"]) for line in lines] == [(1, 0), (2, 3), (3, 4), (4, 5)]


def test_layouts_are_chosen_by_what_they_hold():
    kinds = {
        "mixtral": config(qk_norm=False),
        "qwen3_moe": config(),
        "llama": config(moe_layers="none", qk_norm=False),
    }
    assert all(convert.kind_of(c) == kind for kind, c in kinds.items())
    for changes in (
        dict(n_shared=1), dict(scoring="sigmoid"), dict(balance="bias"),
        dict(qk_norm=False, moe_layers="1"), dict(qk_norm=False, renormalize=False),
    ):  # fmt: skip
        assert convert.kind_of(replace(config(), **changes)) == convert.OWN
