"""Tests of gpt.py: parity with PyTorch and transformers, properties, failures handled."""

import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import check_gpt
import gpt
import numpy as np
import pytest
import torch
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # two threads only get in the way of models this small


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**changes):
    shape = dict(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=4)
    return gpt.GPT(gpt.GPTConfig(**shape | changes))


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# ---- pieces against PyTorch's


def same_values_and_gradients(ours, theirs, *inputs):
    """Both modules have the same parameters; compares outputs and all gradients."""
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        y = module(*leaves)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        grads = [p.grad for p in module.parameters()] + [x.grad for x in leaves if x.requires_grad]
        results.append([y, *grads])
    for a, b in zip(*results):
        close(a, b, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(bias):
    ours = gpt.Linear(12, 20, bias)
    same_values_and_gradients(ours, torch.nn.Linear(12, 20, bias), torch.randn(3, 5, 12))
    x = torch.randn(3, 12)
    close(ours(x), x @ ours.weight.T + (ours.bias if bias else 0))


def test_embedding_is_torchs():
    ids = torch.tensor([[1, 2, 2], [0, 2, 9]])  # repeated ids must add up their gradients
    same_values_and_gradients(gpt.Embedding(10, 6), torch.nn.Embedding(10, 6), ids)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias):
    ours = gpt.LayerNorm(16, 1e-5, bias)
    torch.nn.init.normal_(ours.weight)
    theirs = torch.nn.LayerNorm(16, 1e-5, bias=bias)
    same_values_and_gradients(ours, theirs, 3 + 2 * torch.randn(2, 7, 16))


def test_initial_weights_are_a_truncated_normal():
    weight = gpt.Linear(400, 400, std=0.02).weight
    assert weight.abs().max() <= 0.06
    # A normal cut at 3 std has 0.9866 of its standard deviation.
    assert weight.std().item() == pytest.approx(0.02 * 0.9866, rel=0.01)
    model = tiny(n_layers=8, d_model=64)
    assert model.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02 / 4 * 0.987, rel=0.05)


def test_cross_entropy_is_torchs_also_for_huge_logits():
    logits = torch.randn(4, 6, 30, dtype=torch.float64) * 500  # exp would overflow
    targets = torch.randint(30, (4, 6))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    a = gpt.cross_entropy(ours, targets)
    b = F.cross_entropy(theirs.view(-1, 30), targets.view(-1))
    a.backward(), b.backward()
    close(a, b, 1e-12), close(ours.grad, theirs.grad, 1e-12)


def test_sinusoidal_positions():
    table = gpt.sinusoidal_positions(40, 8)
    for t, i in ((0, 0), (7, 2), (39, 3)):
        angle = t / 10_000 ** (2 * i / 8)
        close(table[t, 2 * i : 2 * i + 2], torch.tensor([math.sin(angle), math.cos(angle)]), 1e-5)


def run_optimizer(make, steps=20):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    model.double()  # in float32 the order of operations shows after a few steps
    optimizer, x = make(model), torch.randn(10, 6, dtype=torch.float64)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        (model(x) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_adamw_is_torchs_with_decay_on_matrices_only():
    def theirs(model):
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [dict(params=matrices, weight_decay=0.3), dict(params=vectors, weight_decay=0.0)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
        step = optimizer.step

        def same_lr_everywhere():
            optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"]
            step()

        optimizer.step = same_lr_everywhere
        return optimizer

    ours = run_optimizer(lambda m: gpt.AdamW(m.parameters(), 0.01, (0.9, 0.95), 1e-6, 0.3))
    close(ours, run_optimizer(theirs), 1e-12)


def test_sgd_step_shrinks_as_one_over_sqrt_t():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = gpt.SGD([p], lr=0.5)
    expected = 1.0
    for t in range(1, 6):
        p.grad = torch.tensor([2.0])
        optimizer.step()
        expected -= 0.5 / math.sqrt(t) * 2
        assert p.item() == pytest.approx(expected)


def test_lr_schedule_is_torchs_warm_up_and_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-9, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.03)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[10])
    for step in range(51):
        ours = gpt.lr_schedule(step, 0.3, 0.03, 10, 50)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6), step
        optimizer.step(), both.step()
    assert gpt.lr_schedule(70, 0.3, 0.03, 10, 50) == pytest.approx(0.03)  # stays low afterwards
    assert gpt.lr_schedule(0, 0.3, 0.03, 0, 50) == pytest.approx(0.3)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_gradients_is_torchs(max_norm):
    ours, theirs = tiny(), tiny()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(50, (2, 4, 16))
    for model in (ours, theirs):
        model(*ids).backward()
    a = gpt.clip_gradients(ours.parameters(), max_norm)
    b = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    close(a, b, 1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        close(p.grad, q.grad)


# ---- the model


@pytest.mark.parametrize("check", check_gpt.CHECKS, ids=lambda check: check.__name__)
def test_debugging_habit(check):
    check()


@pytest.mark.parametrize(
    "find, replace, check",
    [
        ("is_causal=True", "is_causal=False", "causality"),
        ("* torch.rsqrt(", "* torch.rsqrt(1e-3 * ", "initial_loss"),
        pytest.param("m.lerp_(p.grad", "m.lerp_(-p.grad", "overfits", marks=pytest.mark.slow),
        pytest.param("windows[:, :-1], w", "windows[:, 1:], w", "known", marks=pytest.mark.slow),
    ],
)
def test_check_sees_a_broken_fork(tmp_path, find, replace, check):
    source = (HERE / "gpt.py").read_text()
    assert find in source
    (tmp_path / "gpt.py").write_text(source.replace(find, replace))
    shutil.copy(HERE / "check_gpt.py", tmp_path)
    names = [c.__name__ for c in check_gpt.CHECKS if check in c.__name__]
    code = f"import check_gpt; check_gpt.CHECKS = [check_gpt.{names[0]}]; exit(check_gpt.main())"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("FAIL"), done.stdout + done.stderr


def test_every_preset_has_its_size():
    for name, millions in (("124m", 124.4), ("355m", 354.8), ("774m", 774.0), ("1558m", 1557.6)):
        with torch.device("meta"):
            model = gpt.GPT(gpt.GPTConfig(**gpt.PRESETS[name]))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_flops_count_matrix_products_only():
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**gpt.PRESETS["124m"]))
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert model.matrix_parameters() == matrices
    assert model.flops_per_token() == 6 * matrices + 12 * 12 * 768 * 1024


def test_micro_batches_give_the_gradient_of_the_whole_batch(monkeypatch):
    tokens, gradients = np.random.default_rng(0).integers(0, 50, 1000), []

    class Recorder(gpt.AdamW):
        def step(self):
            parameters = self.param_groups[0]["params"]
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    monkeypatch.setattr(gpt, "AdamW", Recorder)
    for micro in (4, 3, 1):  # 4, 3 + 1, 1 + 1 + 1 + 1 sequences of the same four windows
        model = tiny()
        torch.manual_seed(2)
        check_gpt.train(model, tokens, steps=1, tokens_per_step=64, micro_batch=micro)
        torch.manual_seed(0)
    assert gradients[0].abs().max() > 0.01
    close(gradients[1], gradients[0]), close(gradients[2], gradients[0])


# ---- Hugging Face's layout


def hf_model(**changes):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=60, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    shape |= dict(bos_token_id=None, eos_token_id=None) | changes
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for p in model.parameters():  # biases, too, or a forgotten one would not show
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"tie_word_embeddings": False},
        {"n_inner": 100, "layer_norm_epsilon": 1e-3},
    ],
)
def test_from_pretrained_has_the_logits_of_transformers(tmp_path, changes):
    theirs = hf_model(**changes)
    theirs.save_pretrained(tmp_path)
    ours = gpt.GPT.from_pretrained(tmp_path).eval()
    ids = torch.randint(60, (2, 32))
    with torch.no_grad():
        close(ours(ids), theirs(ids).logits, 1e-4)
    prompt = ids[:1, :5]
    greedy = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 20, temperature=0), greedy)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": False},
        {"positions": "sinusoidal", "gelu": "exact"},
        {"tie_embeddings": False, "d_ff": 40},
    ],
)
def test_save_pretrained_has_our_logits_in_transformers(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    ours = tiny(**changes).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours.save_pretrained(tmp_path, eos_token_id=7)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(50, (2, 16))
    with torch.no_grad():
        close(ours(ids), theirs.eval()(ids).logits, 1e-4)
    assert theirs.config.eos_token_id == 7
    again = gpt.GPT.from_pretrained(tmp_path).eval()
    close(again(ids), ours(ids), 1e-5)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_from_pretrained_refuses_a_damaged_directory(tmp_path, damage):
    tiny().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config.write_text(config.read_text().replace('"gpt2"', '"llama"'))
    with pytest.raises(ValueError, match=str(tmp_path)):
        gpt.GPT.from_pretrained(tmp_path)


# ---- data and evaluation


def test_get_batch_gives_every_window_and_the_next_tokens():
    tokens = np.arange(30, dtype=np.uint16)
    seen = set()
    for _ in range(60):
        x, y = gpt.get_batch(tokens, 8, 10)
        assert x.shape == y.shape == (8, 10) and x.dtype == torch.int64
        assert torch.equal(x + 1, y) and torch.equal(x - x[:, :1], torch.arange(10).expand(8, 10))
        seen |= set(x[:, 0].tolist())
    assert seen == set(range(20))  # the last window ends with the last token
    with pytest.raises(ValueError, match="30 tokens"):
        gpt.get_batch(tokens, 1, 30)


def test_evaluate_is_the_mean_over_all_targets():
    model, tokens = tiny(), np.random.default_rng(0).integers(0, 50, 16 * 5 + 8)
    losses = []
    for start in range(0, len(tokens) - 1, 16):  # five whole windows and one of 7
        window = torch.from_numpy(tokens[start : start + 17])
        logits = model(window[None, :-1])[0]
        losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    assert len(losses) == len(tokens) - 1
    assert gpt.evaluate(model, tokens, 16, batch_size=2) == pytest.approx(np.mean(losses), abs=1e-5)
    assert gpt.evaluate(model, tokens, 16, max_tokens=32) == pytest.approx(np.mean(losses[:32]))
    assert model.training


# ---- checkpoints, resuming, failures


def make_run(path, resume=False):
    def log(**line):
        with open(path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    return SimpleNamespace(dir=path, resume=resume, log=log)


def train_tiny(path, resume=False, on_step=lambda line: None, **config):
    path.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = tiny(dropout=0.2)
    tokens = np.random.default_rng(0).integers(0, 50, 500)
    config = dict(steps=12, tokens_per_step=64, eval_every=5, max_lr=1e-2, warmup_steps=4) | config
    run = make_run(path, resume)
    line = gpt.train(model, tokens, tokens[:200], gpt.TrainConfig(**config), run, on_step=on_step)
    lines = [json.loads(line) for line in open(path / "metrics.jsonl")]
    return model, line, [(x["step"], x["train_loss"], x["grad_norm"], x["val_loss"]) for x in lines]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, number, code):
    model, _, losses = train_tiny(tmp_path / "whole")

    def interrupt(line):
        if line["step"] == 7:  # between two evaluations
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stopped:
        train_tiny(tmp_path / "cut", on_step=interrupt)
    assert stopped.value.code == code
    again, _, resumed = train_tiny(tmp_path / "cut", resume=True)
    assert resumed == losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_resume_from_an_older_checkpoint_repeats_the_same_losses(tmp_path):
    """A kill -9 leaves the state of the last evaluation; the steps since then come out the same."""
    _, _, losses = train_tiny(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(line):
        if line["step"] == 9:  # the checkpoint is of step 5
            raise Killed

    with pytest.raises(Killed):
        train_tiny(tmp_path / "cut", on_step=kill)
    _, _, resumed = train_tiny(tmp_path / "cut", resume=True)
    assert resumed[-7:] == losses[-7:] and resumed[5:9] == resumed[9:13]


def test_checkpoint_to_a_file_object():
    model, other = tiny(), tiny()
    optimizer, second = gpt.AdamW(model.parameters()), gpt.AdamW(other.parameters())
    model(*torch.randint(50, (2, 2, 8))).backward()
    optimizer.step()
    buffer = io.BytesIO()
    gpt.save_checkpoint(model, optimizer, 42, buffer)
    expected = torch.rand(3)
    buffer.seek(0)
    assert gpt.load_checkpoint(buffer, other, second) == 42
    assert torch.equal(torch.rand(3), expected)  # the random state is part of it
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    first = next(iter(second.state.values()))
    assert first["step"] == 1 and first["m"].abs().sum() > 0


@pytest.mark.parametrize("keep", [0, 10, 1000, -50])
def test_truncated_checkpoint_is_refused(tmp_path, keep):
    model = tiny()
    optimizer, path = gpt.AdamW(model.parameters()), tmp_path / "state.pt"
    gpt.save_checkpoint(model, optimizer, 1, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="state.pt cannot be read"):
        gpt.load_checkpoint(path, model, optimizer)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    model, other = tiny(), tiny(d_model=64)
    gpt.save_checkpoint(model, gpt.AdamW(model.parameters()), 1, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        gpt.load_checkpoint(tmp_path / "state.pt", other, gpt.AdamW(other.parameters()))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    saved = {}

    def spoil(line):
        if line["step"] == 5:
            saved["state"] = (tmp_path / "state.pt").read_bytes()
        if line["step"] == 7:  # reaches into the running model through the optimizer's parameters
            next(p for p in spoil.model.parameters()).data[0, 0] = math.nan

    original = gpt.AdamW

    def remember(params, *args, **kwargs):
        params = list(params)
        spoil.model = SimpleNamespace(parameters=lambda: params)
        return original(params, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "AdamW", remember)
        with pytest.raises(ValueError, match="step 8: the loss is nan"):
            tokens = dict(on_step=spoil)
            train_tiny(tmp_path, **tokens)
    assert (tmp_path / "state.pt").read_bytes() == saved["state"]
    assert torch.isfinite(gpt.GPT.from_pretrained(tmp_path)(torch.zeros(1, 4, dtype=int))).all()


def test_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    model = tiny()
    optimizer, path = gpt.AdamW(model.parameters()), tmp_path / "state.pt"
    gpt.save_checkpoint(model, optimizer, 1, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may grow past 10 kB
    try:
        with pytest.raises(OSError):
            gpt.save_checkpoint(model, optimizer, 2, path)
        with pytest.raises(OSError):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]  # no half-written file either


# ---- sampling


def test_greedy_and_temperature_0_take_the_likeliest():
    logits = torch.randn(5, 20)
    assert torch.equal(gpt.sample_next(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(gpt.sample_next(logits, top_k=1), logits.argmax(-1))
    assert torch.equal(gpt.sample_next(logits, top_p=1e-9), logits.argmax(-1))


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), [0.4, 0.3, 0.2, 0.1]),
        (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (dict(top_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # 0.4 falls short of 0.6, so the second is in
        (dict(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (dict(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),  # of 4/9, 3/9, 2/9 two reach 0.5
        (dict(temperature=0.5, top_k=3, top_p=0.9), [16 / 29, 9 / 29, 4 / 29, 0]),
    ],
)
def test_sampling_frequencies(settings, expected):
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]])).expand(40_000, 4)
    drawn = gpt.sample_next(logits, **settings).bincount(minlength=4) / 40_000
    close(drawn, torch.tensor(expected), 0.012)
    assert all(d == 0 for d, e in zip(drawn.tolist(), expected) if e == 0)


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_k=0), dict(top_p=1.5)])
def test_sampling_settings_are_checked(bad):
    with pytest.raises(ValueError, match="temperature is at least 0"):
        gpt.sample_next(torch.zeros(1, 4), **bad)


def test_generate_in_a_batch_equals_alone_past_the_context():
    model = tiny()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompts = torch.randint(50, (3, 6))
    together = model.generate(prompts, 30, temperature=0)
    assert together.shape == (3, 36) and model.training
    for i in range(3):
        assert torch.equal(model.generate(prompts[i : i + 1], 30, temperature=0)[0], together[i])
    one = together[:, :20]  # longer than the context: the last 16 tokens count
    assert torch.equal(model.eval()(one[:, -16:])[:, -1].argmax(-1), together[:, 20])


def test_generate_seed_and_stop_tokens():
    model, prompt = tiny(), torch.randint(50, (4, 3))
    first = model.generate(prompt, 12, seed=5)
    assert torch.equal(first, model.generate(prompt, 12, seed=5))
    assert not torch.equal(first, model.generate(prompt, 12, seed=6))
    stop = first[0, 5].item()
    stopped = model.generate(prompt, 12, seed=5, stop_tokens=[stop])
    row = first[0, 3:].tolist()
    until = row.index(stop) + 1
    assert stopped[0, 3 : 3 + until].tolist() == row[:until]
    assert set(stopped[0, 3 + until :].tolist()) <= {stop}


# ---- configuration


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(d_model=30, n_heads=4), "d_model 30 is not divisible by n_heads 4"),
        (dict(n_layers=0), "n_layers is 0"),
        (dict(dropout=1.0), "dropout"),
        (dict(positions="rotary"), "positions"),
    ],
)
def test_config_is_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        gpt.GPTConfig(**bad)


# ---- the command line


def run(*args, out, check=None, **options):
    env = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "run.py"), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, **options)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


SMALL = "--preset small --d_model 32 --n_layers 1 --n_heads 2 --context_length 32 --device cpu"
SMALL = (*SMALL.split(), "--tokens_per_step", "128", "--eval_every", "10", "--eval_tokens", "200")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "poem.txt"
    path.write_text(
        "Roses are red,\nviolets are blue,\nthis text is short,\nbut it will do.\n" * 60
    )
    return path


def test_train_sample_trace_describe(tmp_path, text):
    train = ("train", "--data", text, "--steps", 20, *SMALL)
    done = run(*train, out=tmp_path, check=0)
    assert "working on bytes" in done.stdout and "--- sample 3" in done.stdout
    latest = tmp_path / "03_gpt" / "latest"
    for name in ("loss.png", "config.json", "model.safetensors", "state.pt", "metrics.jsonl"):
        assert (latest / name).stat().st_size > 0
    assert str(latest.resolve()) in done.stdout.splitlines()[-1]
    lines = [json.loads(line) for line in open(latest / "metrics.jsonl")]
    fields = "step time tokens train_loss val_loss val_bpb lr grad_norm tokens_per_s mfu".split()
    assert [line["step"] for line in lines] == list(range(1, 21)) and set(lines[0]) == set(fields)
    last = lines[-1]  # on bytes a token is a byte, <|endoftext|> aside
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2), rel=0.03)
    again = run(*train, out=tmp_path, check=0)
    assert "is finished" in again.stdout and "--fresh" in again.stdout
    sampled = run(
        "sample", "--prompt", "Roses", "--n", 1, "--max_new_tokens", 5, out=tmp_path, check=0
    )
    assert sampled.stdout.startswith("Roses")
    traced = run("trace", "--text", "violets", out=tmp_path, check=0).stdout
    assert "(1, 7, 32)" in traced and "blocks.0.attention.qkv" in traced
    described = run(
        "describe", "--preset", "124m", "--vocab_size", 50257, out=tmp_path, check=0
    ).stdout
    assert "124,439,808" in described


def test_kill_9_at_any_moment_leaves_a_run_that_goes_on(tmp_path, text):
    train = ("train", "--data", text, "--steps", 3000, *SMALL, "--eval_every", "2")
    env = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "run.py"), *map(str, train)]
    metrics, reached = tmp_path / "03_gpt" / "latest" / "metrics.jsonl", 0
    for wait in (0.0, 0.113):
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if lines and json.loads(lines[-1])["step"] >= reached + 5:
                break
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        output = process.communicate()[0].decode()
        assert process.returncode == -signal.SIGKILL, output
        step = torch.load(metrics.parent / "state.pt", weights_only=True)["step"]
        assert step > reached, output  # the second process went on where the first was
        gpt.GPT.from_pretrained(metrics.parent)
        reached = step


def test_sigterm_saves_and_exits_with_0(tmp_path, text):
    train = ("train", "--data", text, "--steps", 100_000, *SMALL, "--eval_every", "100000")
    env = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "run.py"), *map(str, train)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics, deadline = tmp_path / "03_gpt" / "latest" / "metrics.jsonl", time.time() + 60
    while not metrics.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0 and "goes on from there" in output, output
    assert torch.load(metrics.parent / "state.pt", weights_only=True)["step"] >= 1
    gpt.GPT.from_pretrained(metrics.parent)  # stopped before the first evaluation, yet a model


def one_line_error(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), done.stderr


BAD_TEXT = {
    "missing": (None, "no such file"),
    "empty": (b"", "too short"),
    "binary": (bytes(range(256)) * 20, "not UTF-8 text"),
    "short": (b"one line\nand another\n", "too short"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_corpus(tmp_path, kind):
    content, words = BAD_TEXT[kind]
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    one_line_error(run("train", "--data", path, *SMALL, out=tmp_path / "out"), "corpus.txt", words)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_context_longer_than_the_text(tmp_path, text):
    long = ("--context_length", 1000, "--tokens_per_step", 1000)
    done = run("train", "--data", text, *SMALL, *long, out=tmp_path)
    one_line_error(done, "context_length 1000", "held-out text")


def test_sample_without_a_model(tmp_path):
    one_line_error(run("sample", out=tmp_path), "latest holds no model yet: make 03 trains one")


def test_heads_that_do_not_divide(tmp_path, text):
    done = run("train", "--data", text, *SMALL, "--n_heads", 3, out=tmp_path)
    one_line_error(done, "d_model 32 is not divisible by n_heads 3")


def test_tokens_of_another_tokenizer_and_a_damaged_state(tmp_path, text):
    train = ("train", "--data", text, "--steps", 10, *SMALL)
    run(*train, out=tmp_path, check=0)
    (tokens,) = (tmp_path / "tokens").iterdir()
    meta = json.loads((tokens / "meta.json").read_text())
    for key, value in (("tokenizer", "0123456789abcdef"), ("vocab_size", 300)):
        (tokens / "meta.json").write_text(json.dumps(meta | {key: value}))
        one_line_error(run(*train, out=tmp_path), "not made with this tokenizer", str(value))
    (tokens / "meta.json").write_text(json.dumps(meta))
    state = tmp_path / "03_gpt" / "latest" / "state.pt"
    state.write_bytes(state.read_bytes()[:5000])
    done = run("train", "--data", text, *SMALL, "--steps", 20, out=tmp_path)
    one_line_error(done, "state.pt cannot be read", "--fresh")


@pytest.mark.slow  # test_full_disk_leaves_the_old_checkpoint_whole is the quick form
def test_full_disk_is_one_line(tmp_path, text):
    train = ("train", "--data", text, "--steps", 10, *SMALL)
    run(*train, out=tmp_path, check=0)
    latest = tmp_path / "03_gpt" / "latest"
    before = {
        p.name: p.read_bytes() for p in latest.iterdir() if p.suffix in (".pt", ".safetensors")
    }

    def no_file_past_30_kb():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    more = ("train", "--data", text, *SMALL, "--steps", 20)
    one_line_error(run(*more, out=tmp_path, preexec_fn=no_file_past_30_kb), "File too large")
    assert {name: (latest / name).read_bytes() for name in before} == before
    run(*more, out=tmp_path, check=0)  # with room again, it goes on
