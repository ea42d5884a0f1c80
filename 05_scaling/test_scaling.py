"""The trainer against formulas, one big batch, a single process, and a kill."""

import importlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scaling
import shards
import torch
import torch.distributed as dist
from scaling import IGNORE, AdamW, GaLore, Muon, TokenLoader, TrainConfig, Trainer, TransformerLM
from store import CheckpointStore
from torch.nn import functional as F

import common

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)
SHAPE = dict(vocab_size=100, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)


def new_model(seed=0, **changes):
    torch.manual_seed(seed)
    return TransformerLM(scaling.TransformerConfig(**SHAPE | changes))


def batch(B=4, T=16, seed=1):
    windows = torch.randint(100, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return windows[:, :-1], windows[:, 1:]


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


# ---- the model


@pytest.mark.parametrize("qk_norm", [False, True])
def test_transformers_reads_what_is_saved_and_gives_the_same_logits(tmp_path, qk_norm):
    transformers = pytest.importorskip("transformers")
    model, (ids, _) = new_model(qk_norm=qk_norm, tie_embeddings=qk_norm), batch()
    for p in model.parameters():  # norms that are not 1 tell if they are swapped
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(TransformerLM.from_pretrained(tmp_path)(ids), model(ids))


def test_a_directory_that_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a model directory"):
        TransformerLM.from_pretrained(tmp_path)
    new_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"blocks.2.norm1.weight of \(32,\): missing"):
        TransformerLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_loss_is_cross_entropy_with_its_gradients(chunk):
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (64,))
    targets[::5] = IGNORE
    loss = scaling.LinearCrossEntropy.apply(x, w, targets, chunk)
    ours = torch.autograd.grad(3 * loss, (x, w))
    plain = F.cross_entropy(x @ w.T, targets, ignore_index=IGNORE)
    theirs = torch.autograd.grad(3 * plain, (x, w))
    torch.testing.assert_close(loss, plain)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_chunked_loss_never_holds_all_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if torch.is_tensor(out) else 0)
            return out

    x, w = torch.randn(512, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    with Sizes():
        scaling.LinearCrossEntropy.apply(x, w, torch.randint(3000, (512,)), 32).backward()
    assert max(sizes) == 32 * 3000  # not 512 x 3000


def test_checkpointing_keeps_less_and_changes_no_gradient():
    model, kept = new_model(n_layers=4), {}
    for model.checkpointing in (False, True):
        seen = []

        def pack(x, seen=seen):
            seen.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(*batch())
        loss.backward()
        kept[model.checkpointing] = (sum(seen), gradients(model))
    assert kept[True][0] < 0.35 * kept[False][0]
    torch.testing.assert_close(kept[True][1], kept[False][1])


def test_packed_documents_are_as_if_each_was_alone():
    model, ids = new_model(), torch.randint(1, 100, (1, 16))
    ids[0, [4, 9]] = 0  # ends of the first two documents
    packed = model(ids, mask=scaling.document_mask(ids, 0))
    alone = torch.cat([model(part) for part in ids.split([5, 5, 6], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)
    assert (model(ids) - packed).abs().max() > 1e-3  # without the mask they do see one another


# ---- optimizers


@pytest.mark.parametrize("compile", [False, True])
def test_adamw_is_torch_s(compile):
    if compile and sys.platform != "linux":
        pytest.skip("needs a C compiler")
    models = new_model(), new_model()
    ours = AdamW(models[0].parameters(), 1e-2, weight_decay=0.1, compile=compile)
    decay = [p for p in models[1].parameters() if p.ndim == 2]
    rest = [p for p in models[1].parameters() if p.ndim < 2]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
    theirs = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95))
    for i in range(4):
        for model, optimizer in zip(models, (ours, theirs)):
            model(*batch(seed=i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_stochastic_rounding_is_right_in_the_mean_and_moves_a_slow_average():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((100_000,), 1 + 1 / 512)  # a quarter of the way between two bfloat16
    rounded = scaling.stochastic_round(x, generator)
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    assert abs(rounded.float().mean().item() - x[0].item()) < 1e-4
    p = torch.nn.Parameter(torch.zeros(2000))
    optimizer = AdamW([p], 0.0, betas=(0.9, 0.999), state_dtype=torch.bfloat16)
    for _ in range(2000):
        p.grad = torch.ones(2000)
        optimizer.step()
    v = optimizer.state[p]["v"]
    assert v.dtype == torch.bfloat16
    # To the nearest it would stop at about 1/4.
    assert v.float().mean().item() == pytest.approx(1 - 0.999**2000, rel=0.02)


def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values():
    torch.manual_seed(0)
    for shape in ((20, 20), (16, 40), (40, 16)):
        x = torch.randn(shape, dtype=torch.float64)
        y = scaling.orthogonalise(x).double()
        values = torch.linalg.svdvals(y)
        assert values.min() > 0.3 and values.max() < 1.3
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        inner = u.mT @ y @ v.mT  # diagonal if the singular vectors are the same
        assert (inner - inner.diag().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("parts", [None, [4, 8]])
def test_muon_is_its_formula(parts):
    torch.manual_seed(0)
    p, vector = torch.nn.Parameter(torch.randn(12, 6)), torch.nn.Parameter(torch.randn(6))
    optimizer = Muon([dict(params=[p, vector], parts=parts)], 0.02, weight_decay=0.1)
    expected, buffer = p.detach().clone(), torch.zeros(12, 6)
    for _ in range(3):
        p.grad, vector.grad = torch.randn(12, 6), torch.randn(6)
        buffer = 0.95 * buffer + p.grad
        steps = []
        for g in (p.grad + 0.95 * buffer).split(parts or 12):
            x = g / g.norm()
            for _ in range(5):  # by singular values, not by products
                u, s, v = torch.linalg.svd(x, full_matrices=False)
                x = u @ (3.4445 * s - 4.775 * s**3 + 2.0315 * s**5).diag() @ v
            steps.append(0.2 * math.sqrt(max(g.shape)) * x)
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * torch.cat(steps)
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-4)
    assert set(optimizer.state[p]) == {"step", "m"} and "v" in optimizer.state[vector]


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_galore_is_adam_in_the_leading_directions(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = GaLore([p], 0.01, rank=3, refresh=2, scale=0.5, weight_decay=0.1)
    expected, m, v = p.detach().clone(), 0, 0
    for t in range(1, 5):
        p.grad = torch.randn(shape)
        g = p.grad if shape[0] < shape[1] else p.grad.T
        if t in (1, 3):
            basis = torch.linalg.eigh(g @ g.T).eigenvectors.flip(1)[:, :3]
            signs = None
        low = basis.T @ g
        if signs is None:  # an eigenvector's sign is free: take ours, which optimizer.step finds
            optimizer.step()
            signs = (basis * optimizer.state[p]["basis"]).sum(0).sign()
            basis = basis * signs
            low = basis.T @ g
        else:
            optimizer.step()
        m, v = 0.9 * m + 0.1 * low, 0.95 * v + 0.05 * low**2
        step = basis @ ((m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
        step = step if shape[0] < shape[1] else step.T
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.5 * step
        torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-3)
    assert optimizer.state[p]["m"].shape == (3, 20)


def test_clipping_is_torch_s():
    for max_norm in (0.5, 1e6):  # the second leaves all as it is
        model, other = new_model(), new_model()
        for m in (model, other):
            (100 * m(*batch())).backward()
        norm = scaling.clip_gradients(model.parameters(), max_norm)
        theirs = torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
        torch.testing.assert_close(norm, theirs)
        torch.testing.assert_close(gradients(model), gradients(other))


def test_schedules():
    def rate(step, kind):
        return scaling.lr_schedule(step, 1.0, 0.1, 10, 110, kind, 0.3)

    for kind in ("cosine", "linear", "wsd"):
        assert rate(5, kind) == 0.5 and rate(10, kind) == 1.0
        assert rate(110, kind) == rate(200, kind) == pytest.approx(0.1)
    assert rate(60, "cosine") == pytest.approx(0.55) == rate(60, "linear")
    assert rate(35, "cosine") == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rate(77, "wsd") == 1.0 and rate(77 + 16.5, "wsd") == pytest.approx(0.55)
    with pytest.raises(ValueError, match="none of"):
        rate(1, "step")


# ---- data


def test_an_epoch_has_each_token_window_once_and_ranks_share_it():
    shards = [np.arange(0, 1000), np.arange(5000, 5333)]
    whole = TokenLoader(shards, 16, 8, seed=3)
    ranks = [TokenLoader(shards, 16, 8, seed=3, rank=r, world=2) for r in (0, 1)]
    seen = []
    for _ in range(whole.windows // 8):
        ids, targets = next(whole)
        assert torch.equal(ids[:, 1:], targets[:, :-1]) and ids.dtype == torch.int64
        assert torch.equal(torch.diff(ids), torch.ones(8, 15).long())  # no window crosses shards
        a, b = (next(loader)[0] for loader in ranks)
        assert torch.equal(torch.stack([a, b], 1).flatten(0, 1), ids)
        seen += ids[:, 0].tolist()
    assert len(set(seen)) == len(seen) and len(seen) > 0.9 * whole.windows
    starts = sorted(s for s in seen if s < 1000)
    assert min(b - a for a, b in zip(starts, starts[1:])) >= 16  # no token twice in an epoch
    assert seen != sorted(seen)
    again = [next(whole)[0][:, 0].tolist() for _ in range(whole.windows // 8)]
    assert sum(again, []) != seen  # another order, other offsets
    for loader in (whole, *ranks):
        loader.close()


def test_a_position_brings_back_the_same_batches_with_any_number_of_ranks():
    shard = np.arange(700)
    loader = TokenLoader([shard], 16, 4, seed=1)
    for _ in range(25):  # into the third epoch
        next(loader)
    position, later = loader.position, [next(loader)[0] for _ in range(3)]
    assert position == 100
    loader.close()
    loader.position = position
    assert all(torch.equal(next(loader)[0], x) for x in later)
    part = TokenLoader([shard], 16, 4, seed=1, rank=1, world=4)
    part.position = position
    assert torch.equal(next(part)[0], later[0][1:2])
    loader.close()
    part.close()


def test_what_follows_an_end_is_not_a_target():
    loader = TokenLoader([np.array([1, 2, 0, 3, 4, 0, 5, 6, 7])], 8, 1, eot=0)
    ids, targets = next(loader)
    assert ids.tolist() == [[1, 2, 0, 3, 4, 0, 5, 6]]
    assert targets.tolist() == [[2, 0, IGNORE, 4, 0, IGNORE, 6, 7]]
    loader.close()


def test_the_loader_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match="cannot be split over 3 ranks"):
        TokenLoader([np.arange(100)], 16, 8, world=3)
    with pytest.raises(ValueError, match="take more text or a shorter context"):
        TokenLoader([np.arange(16)], 16, 1)
    assert TokenLoader([np.arange(17)], 16, 1).windows == 1


# ---- the trainer

TOKENS = np.random.default_rng(0).integers(0, 100, 5000).astype(np.uint16)


def new_trainer(home, model=None, eot=None, tokens=TOKENS, **changes):
    settings = dict(steps=6, tokens_per_step=128, warmup_steps=2, eval_every=3, eval_tokens=200)
    config = TrainConfig(**settings | dict(max_lr=5e-3, compile=False) | changes)
    loader = TokenLoader([tokens], 16, config.tokens_per_step // 16, eot=eot)
    home.mkdir(parents=True, exist_ok=True)

    def log(**line):
        with open(home / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    run, store = SimpleNamespace(dir=home, log=log), CheckpointStore(home / "checkpoints")
    return Trainer(model or new_model(), loader, TOKENS[:500], config, run, store)


def losses(home):
    lines = [json.loads(line) for line in open(home / "metrics.jsonl")]
    return [line["train_loss"] for line in lines]


@pytest.mark.parametrize("eot", [None, 7])
@pytest.mark.parametrize("micro", [1, 3])
def test_an_accumulated_gradient_is_the_big_batch_s(tmp_path, micro, eot):
    found = {}
    for name, micro_batch in (("whole", None), ("parts", micro)):
        documents = dict(micro_batch=micro_batch, whole_documents=eot is not None, max_lr=0.0)
        trainer = new_trainer(tmp_path / name, eot=eot, max_norm=math.inf, **documents)
        trainer.optimizer.zero_grad = lambda: None  # so that it can be seen
        line = trainer.train_step()
        found[name] = (gradients(trainer.model), line["train_loss"], line["grad_norm"])
        trainer.loader.close()
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_batch_of_which_nothing_counts_has_no_gradient(tmp_path):
    tokens = np.full(5000, 7, np.uint16)  # ends of texts only: nothing to learn from
    trainer = new_trainer(tmp_path, eot=7, tokens=tokens, whole_documents=True, micro_batch=2)
    line = trainer.train_step()
    trainer.loader.close()
    assert line["train_loss"] == 0 and line["grad_norm"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "galore"])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path, optimizer):
    settings = dict(optimizer=optimizer, galore_rank=8, state_dtype="bfloat16")

    def begin(name):
        return new_trainer(tmp_path / name, new_model(dropout=0.1), **settings)

    torch.manual_seed(5)
    whole = begin("whole")
    torch.manual_seed(5)
    whole.fit()
    stopped = begin("again")
    stopped.hooks["on_step"] = lambda line: line["step"] == 4 and stopped.signals.append(15)
    torch.manual_seed(5)
    with pytest.raises(SystemExit) as end:
        stopped.fit()
    assert end.value.code == 0 and stopped.step == 4
    part = begin("again")
    assert part.step == 4
    part.fit()
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    for a, b in zip(part.model.parameters(), whole.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_like_float32(tmp_path, precision):
    tokens = np.tile(np.arange(100, dtype=np.uint16), 30)
    found = {}
    for name in ("fp32", precision):
        args = dict(precision=name, steps=12, tokens=tokens, optimizer="adamw", max_lr=1e-2)
        trainer = new_trainer(tmp_path / name, **args)
        trainer.fit()
        found[name] = losses(tmp_path / name)
    assert found["fp32"][-1] < 0.5 * found["fp32"][0]
    np.testing.assert_allclose(found[precision], found["fp32"], rtol=0.03)
    assert found[precision] != found["fp32"]


def test_fp16_clips_after_unscaling_and_skips_an_overflow(tmp_path):
    trainer = new_trainer(tmp_path, precision="fp16", optimizer="adamw")
    norm = trainer.train_step()["grad_norm"]
    plain = new_trainer(tmp_path / "plain", optimizer="adamw").train_step()["grad_norm"]
    assert norm == pytest.approx(plain, rel=0.05)  # and not 2^14 times that
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.scaler.update(2.0**40)  # no float16 holds a gradient times this
    trainer.train_step()
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    trainer.loader.close()


def test_precision_is_chosen_and_says_why():
    dtype, why = scaling.choose_precision("auto", torch.device("cpu"))
    assert dtype == torch.float32 and "fastest" in why
    assert scaling.choose_precision("bf16", torch.device("cpu"))[0] == torch.bfloat16


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    trainer = new_trainer(tmp_path, steps=6)

    def spoil(line):
        if line["step"] == 4:
            trainer.model.norm.weight.data.fill_(math.nan)

    trainer.hooks["on_step"] = spoil
    with pytest.raises(ValueError, match="step 5: the loss is nan.*last good checkpoint is 3"):
        trainer.fit()
    trainer.store.wait()
    assert trainer.store.latest() == 3 and new_trainer(tmp_path).step == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    new_trainer(tmp_path).fit()
    with pytest.raises(ValueError, match="n_layers 2 not 3"):
        new_trainer(tmp_path, new_model(n_layers=3))
    with pytest.raises(ValueError, match="optimizer muon not adamw"):
        new_trainer(tmp_path, optimizer="adamw")


@pytest.mark.parametrize(
    "wrong", [dict(precision="fp8"), dict(optimizer="sgd"), dict(steps=0), dict(schedule="x")]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)
    with pytest.raises(ValueError, match="fsdp goes with neither"):
        TrainConfig(parallel="fsdp", precision="fp16")


def test_layers_and_a_trace_are_written(tmp_path, capsys):
    import tracking

    new_trainer(tmp_path, layer_norms=2, profile=1).fit()
    rows = [json.loads(line) for line in open(tmp_path / "layers.jsonl")]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert len(rows[0]["activation"]) == 2 and min(rows[0]["gradient"].values()) > 0
    assert json.load(open(tmp_path / "trace.json"))["traceEvents"]
    assert "aten::" in capsys.readouterr().out
    tracking.plot_layers(tmp_path / "layers.jsonl")
    assert (tmp_path / "layers.png").stat().st_size > 1000


def test_tensorboard_has_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    new_trainer(tmp_path, tensorboard=True).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("train_loss")]
    np.testing.assert_allclose(found, losses(tmp_path), rtol=1e-5)


def test_weights_and_biases_works_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    init, logged = wandb.init, []

    def watched(**settings):
        run = init(**settings)
        log = run.log
        run.log = lambda line, step: logged.append(line) or log(line, step=step)
        return run

    monkeypatch.setattr(wandb, "init", watched)
    new_trainer(tmp_path, wandb=True).fit()
    # What is in the file is wandb's affair: a process of its own writes it, and not at once.
    assert {"galore_rank", "d_model"} <= dict(wandb.run.config).keys()
    assert [line["train_loss"] for line in logged] == losses(tmp_path)
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


# ---- several ranks, and processes that are killed


def child(home, steps, world, **settings):
    """One rank's training, stopped after some steps as by SIGTERM."""
    if world > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world > 1 else 0
    config = dict(steps=8, tokens_per_step=128, micro_batch=2, warmup_steps=2, eval_every=4)
    config = TrainConfig(**config | dict(eval_tokens=200, whole_documents=True) | settings)
    loader = TokenLoader([TOKENS], 16, 8, rank=rank, world=world, eot=7)
    home.mkdir(parents=True, exist_ok=True)

    def log(**line):
        with open(home / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    store = CheckpointStore(home / "checkpoints") if rank == 0 else None
    run = SimpleNamespace(dir=home, log=log)
    trainer = Trainer(new_model(), loader, TOKENS[:500], config, run, store)
    trainer.hooks["on_step"] = lambda line: line["step"] == steps and trainer.signals.append(15)
    try:
        trainer.fit()
    finally:
        if world > 1:
            dist.destroy_process_group()


CHILD = """
import json, sys
from pathlib import Path
import test_scaling
test_scaling.child(Path(sys.argv[1]), int(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def launch(home, world, steps=8, **settings):
    """Start `world` ranks as torchrun would, but without its agent, which takes seconds."""
    (home.parent / "child.py").write_text(CHILD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, str(home.parent / "child.py"), str(home), str(steps)]
    command.append(json.dumps(settings | {"world": world}))
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(world)
    ]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-3000:]
    return losses(home)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    home = tmp_path_factory.mktemp("single") / "run"
    child(home, None, 1)
    return losses(home)


@pytest.mark.skipif("IN_FORK" in os.environ, reason="tested in the original")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_give_the_loss_curve_of_one(tmp_path, single, parallel):
    found = launch(tmp_path / "run", 2, parallel=parallel)
    np.testing.assert_allclose(found, single, atol=1e-5, rtol=0)
    assert TransformerLM.from_pretrained(tmp_path / "run").config.n_layers == 2


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_back(tmp_path, single):
    launch(tmp_path / "run", 2, steps=3, parallel="fsdp")
    launch(tmp_path / "run", 1, steps=6)
    found = launch(tmp_path / "run", 2, parallel="fsdp", checkpointing=True)
    np.testing.assert_allclose(found, single, atol=1e-5, rtol=0)


def run_py(*words, out, **more):
    env = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "run.py"), *map(str, words)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


SMALL = "--d_model 16 --n_layers 1 --n_heads 2 --context_length 16 --device cpu".split()
SMALL += "--tokens_per_step 64 --eval_every 20 --eval_tokens 200 --warmup_steps 2".split()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A small text about nothing much,\nrepeated until it will do.\n" * 200)
    return path


def wait_for_step(process, out, step):
    for _ in range(600):
        for path in out.glob("05_scaling/*/metrics.jsonl"):
            if path.read_text().count("\n") >= step:
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step")


@pytest.mark.skipif("IN_FORK" in os.environ, reason="tested in the original")
def test_a_kill_loses_no_more_than_the_last_steps(tmp_path, text):
    train = ("train", "--data", text, *SMALL, "--steps", 4000, "--save_every", 5)
    process = run_py(*train, out=tmp_path)
    wait_for_step(process, tmp_path, 40)
    process.kill()
    process.communicate()
    (checkpoints,) = tmp_path.glob("05_scaling/run-*/checkpoints")
    step = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    assert step >= 30  # what was logged after that may not have been synced
    process = run_py(*train, out=tmp_path)
    wait_for_step(process, tmp_path, 80)
    process.send_signal(signal.SIGTERM)  # as a spot machine is taken away
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"going on from step {step}" in out
    assert "saved: the same command goes on from there" in out
    (newest,) = checkpoints.glob(
        f"step-{json.loads((checkpoints / 'latest.json').read_text())['step']:08d}"
    )
    model = scaling.TransformerLM.from_pretrained(newest / "model")  # who needs no optimizer
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """run.py with some words, in this process: (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
        for module in (common, shards):
            monkeypatch.setattr(module, "OUT", tmp_path / "out")
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


@pytest.mark.parametrize(
    "words, message",
    [
        ("--device cuda", "--device cuda is not to be had here"),
        ("--data missing.txt", "there is no such file"),
        ("--tokens missing", "missing has no tokens"),
        ("--preset huge", "--preset huge is none of tiny"),
        ("--n_kv_heads 3", "not divisible by n_kv_heads"),
        ("--store s3://", "s3://"),
        ("--precision fp8", "precision fp8 is none of"),
        ("--context_length 100000", "take more text or a shorter context"),
    ],
)
def test_bad_input_ends_in_one_line(command, text, words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    base = [] if "--data" in words else ["--data", text]
    assert message in refused(command("train", *base, *SMALL, "--steps", 3, *words.split()))


def test_a_corrupt_shard_is_named_and_left_out_on_demand(command, text, tmp_path, monkeypatch):
    home = tmp_path / "shards"
    monkeypatch.setattr(shards, "JOB", 3000)  # characters that one worker takes
    made = ("--to", home, "--shard_tokens", 4000, "--workers", 1)
    code, out, _ = command("tokenize", "--data", text, *made)
    names = sorted(p.name for p in home.glob("train-*"))
    assert code == 0 and len(names) >= 2 and "train: " in out
    data = bytearray((home / names[0]).read_bytes())
    data[100] ^= 1
    (home / names[0]).write_bytes(data)
    train = ("train", "--tokens", home, *SMALL, "--steps", 3)
    line = refused(command(*train))
    assert names[0] in line and "crc32" in line and "skip" in line
    code, out, err = command(*train, "--skip_corrupt")
    assert code == 0, err
    assert f"skipped 1 of {len(names) + 1} shards" in out


def test_out_of_memory_says_what_to_lower_and_keeps_the_checkpoint(
    command, text, tmp_path, monkeypatch
):
    step, train = Trainer.train_step, ("train", "--data", text, *SMALL, "--steps", 9)
    digest = sys.modules["store"].digest

    def fail(trainer):
        if trainer.step == 5:
            torch.empty(2**60)  # more than any machine has
        return step(trainer)

    def slow(path):  # the checkpoint of step 4 is not whole yet when step 6 fails
        time.sleep(3 * path.match(".step-00000004.part/.metadata"))
        return digest(path)

    monkeypatch.setattr(Trainer, "train_step", fail)
    monkeypatch.setattr("store.digest", slow)
    line = refused(command(*train, "--save_every", 2, "--micro_batch", 4))
    assert "out of memory with 4 sequences at once: " in line and "--micro_batch 2 saves" in line
    monkeypatch.undo()
    code, out, err = command(*train, "--save_every", 2, "--micro_batch", 4)
    assert code == 0 and "going on from step 4" in out, err


def test_a_bucket_that_is_missing_or_closed_ends_in_one_line(command, text, monkeypatch):
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    moto = server.ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*moto.get_host_and_port()))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        train = ("train", "--data", text, *SMALL, "--steps", 3, "--store", "s3://made-later/run")
        assert "s3://made-later/run: there is no such bucket" in refused(command(*train))
        boto3 = importlib.import_module("boto3")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="made-later")
        code, out, err = command(*train)
        assert code == 0 and "checkpoints: s3://made-later/run" in out, err
        code, out, err = command("checkpoints", "--store", "s3://made-later/run")
        assert code == 0 and "step-00000003" in out, err
        assert "no such bucket" in refused(command("checkpoints", "--store", "s3://other"))
        assert "give another --store" in refused(command(*train, "--fresh"))
    finally:
        moto.stop()


def test_a_run_ends_with_its_plots_and_a_finished_one_is_not_repeated(command, text, tmp_path):
    train = ("train", "--data", text, *SMALL, "--steps", 40, "--layer_norms", 10)
    code, out, err = command(*train)
    assert code == 0, err
    said = "precision: fp32, on a CPU it is the fastest", "4 sequences of 16 x 1 accumulated"
    for words in (*said, "memory on paper", "--- sample 3", "bits per byte"):
        assert words in out, words
    home = tmp_path / "out" / "05_scaling" / "latest"
    for name in "loss.png layers.png metrics.jsonl model.safetensors".split():
        assert (home / name).stat().st_size > 500, name
    assert "is finished" in command(*train)[1]
    code, out, _ = command("sample", "--model", home, "--max_new_tokens", 5)
    assert code == 0
    code, out, _ = command("checkpoints", "--store", home / "checkpoints")
    assert "step-00000040" in out and "held out" in out
    to = tmp_path / "fetched"
    command("checkpoints", "--store", home / "checkpoints", "--download", -1, "--to", to)
    assert (to / "state.pt").exists()


def test_a_sweep_by_command(command, text, tmp_path):
    words = "--shapes 32x1,64x1,64x2 --rates 0.01 --budgets 256,512,1024 --context 16 --step 64"
    code, out, err = command("sweep", "--data", text, *words.split())
    assert code == 0 and "9/9" in out and "L(N, D) = E + A / N^a + B / D^b: E = " in out, err
    assert (tmp_path / "out/05_scaling/sweep/sweep.png").stat().st_size > 1000
    assert "like 64x3,128x4" in refused(command("sweep", "--shapes", "64"))


@pytest.mark.slow
def test_a_world_that_does_not_divide_the_batch_ends_in_a_line(tmp_path, text):
    env = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "29651", str(HERE / "run.py"), "train", "--data", str(text)]
    command += [*SMALL, "--tokens_per_step", "48", "--steps", "3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "a batch of 3 sequences cannot be split over 2 ranks" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_the_module_names_what_the_design_does():
    for name in "TrainConfig Trainer Muon GaLore TokenLoader CheckpointStore".split():
        assert hasattr(scaling, name)
