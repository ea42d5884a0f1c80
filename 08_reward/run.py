"""Reward models: from comparisons to a number for each reply. README.md says more."""

import json
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import figures
import inputs
import numpy as np
import pairs
import preferences
import reward
import torch
from optim import compiled

from common import OUT, Run, atomic, build, main, pick_device, plot_loss, progress

HERE = Path(__file__).resolve().parent
# What a preset changes in TrainConfig: small for the models of 05 and 07, large for real ones.
SMALL = dict(optimizer="muon", max_lr=4e-3, weight_decay=0.05, tokens_per_step=4096)
SMALL |= dict(extra_blocks=2, freeze_steps=250, epochs=0.6)
LARGE = dict(optimizer="adamw", max_lr=2e-5, tokens_per_step=4096, eval_every=50)
PRESETS = {"small": SMALL, "large": LARGE}
CONTEXT = {"small": 384, "large": 1024}  # longest prompt with its replies, and a row, tokens


@dataclass
class Source:
    data: str = "plays"  # plays, or a .json, .jsonl or .csv file, a directory, glob or URL
    sha256: str | None = None  # checksum of --data where that is a URL


@dataclass
class Start:
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 07, or of 05, 04
    template: str = "auto"  # own, chatml or alpaca; auto: the model's own, else chatml


@dataclass
class Options:
    pairs: int | None = None  # train on this many pairs only
    test_pairs: int = 3000  # held-out pairs that are judged at the end
    context_length: int | None = None  # longest prompt with its replies, and a packed row, tokens
    preset: str = "auto"  # small or large; auto: large above 50 million parameters
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class JudgeOptions:
    model: str = str(OUT / "08_reward" / "latest")  # directory of a reward model
    test_pairs: int = 3000  # held-out pairs that are judged
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class ScoreOptions:
    model: str = str(OUT / "08_reward" / "latest")  # directory of a reward model
    prompt: str = "Write a line."  # what was asked
    replies: str = "To be, or not to be.|Be to not or."  # the replies to compare, | between
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class ShowOptions:
    n: int = 6  # pairs to show


def read(source):
    """(training, held-out) pairs, and what to say of them."""
    if source.data == "plays":
        learned, test = preferences.dataset()
        said = f"{len(learned):,} pairs of the plays, {len(test):,} held out"
        return learned, test, said
    form, found, left_out = pairs.read_pairs(source.data, source.sha256)
    learned, test = pairs.hold_out(found)
    said = f"{form}: {len(learned):,} pairs, {len(test):,} held out"
    for why, n in left_out.items():
        said += f"; {n:,} left out: {why}"
    return learned, test, said


def train(given):
    """train a reward model on pairs, and judge held-out ones with it"""
    source, start, options = (build(kind, given) for kind in (Source, Start, Options))
    if options.preset not in (*PRESETS, "auto"):
        raise ValueError(f"--preset {options.preset} is none of {', '.join(PRESETS)}")
    sizes = (options.test_pairs, options.pairs, options.context_length)
    if any(size is not None and size < 1 for size in sizes):
        raise ValueError("--pairs, --test_pairs and --context_length are at least 1")
    device, dtype, reason = pick_device(options.device)
    how = build(reward.TrainConfig, given)  # says what is wrong before data is read
    path = inputs.find_model(start.model)
    learned, held_out, said = read(source)
    if options.pairs is not None and options.pairs > len(learned):
        raise ValueError(f"--pairs {options.pairs}: there are {len(learned):,}")
    learned = learned[: options.pairs]
    if how.loss == "margin" and any(pair.get("label", 1.0) < 1 for pair in learned):
        raise ValueError("these pairs have labels, which --loss margin does not know")
    prompts = pairs.by_prompt(held_out)
    n = min(how.eval_examples, len(prompts) // 2)  # on these the checkpoint is chosen
    chooses, test = sum(prompts[:n], []), sum(prompts[n:], [])[: options.test_pairs]
    trunk = inputs.load_model(path, device)
    size = sum(p.numel() for p in trunk.parameters())
    auto = "large" if size > 5e7 else "small"
    name = auto if options.preset == "auto" else options.preset
    how = build(reward.TrainConfig, given, **PRESETS[name])
    tokenizer, template, added = inputs.with_template(trunk, start.template)
    one_each = tokenizer.vocab_size < 300  # on bytes a speech has three times the tokens
    context = options.context_length or CONTEXT[name] * (3 if one_each else 1)
    trunk.config.context_length = max(trunk.config.context_length, context)
    torch.manual_seed(how.seed)
    text = (tokenizer, template, context)
    shared = how.shared and not how.bidirectional  # an encoder's prompt would see the replies
    examples, report = reward.encode_all(learned, *text, shared)
    choosing, testing, asked = (
        reward.encode_all(part, *text, share)[0]
        for part, share in ((chooses, shared), (test, shared), (test, True))
    )
    loader = reward.ExampleLoader(
        examples, context, how.tokens_per_step, how.micro_batch, how.packing, None, how.seed,
        reward.compared,
    )  # fmt: skip
    per_epoch = len(loader.epoch(0))
    how.steps = how.steps or max(1, round(how.epochs * per_epoch))
    plan = asdict(how) | dict(data=source.data, context=context, device=device.type)
    plan |= dict(examples=sha256(json.dumps([examples, choosing, asked]).encode()).hexdigest()[:8])
    plan |= dict(model=inputs.version(path), template=template.name)
    code = b"".join((HERE / f"{m}.py").read_bytes() for m in ("trunk", "optim"))
    plan |= dict(code=sha256(code).hexdigest()[:8])
    run = Run(reward.__file__, plan, options.run, options.fresh)
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * how.steps}, or begin again with --fresh")
    kept = run.dir / "before.json"
    if not kept.exists():  # what the model thinks before it has learned to judge: the baseline
        with atomic(kept, "w") as file:
            json.dump(reward.likelihoods(trunk, asked), file)
    reward.deepen(trunk, how.extra_blocks)
    model = reward.RewardModel(trunk, how.bidirectional).to(device)
    more = f", {how.extra_blocks} of {trunk.config.n_layers} blocks new" * bool(how.extra_blocks)
    size = sum(p.numel() for p in model.parameters())
    print(f"model: {path or 'random'}, {size:,} parameters ({name}){more}")
    if added:
        print(
            f"tokens added for the {template.name} template: {' '.join(added)}; embedding resized"
        )
    print(f"data: {said}")
    print(
        f"pairs: {report['pairs']:,} on {len(examples):,} prompts, {report['tokens']:,} tokens; "
        f"{report['truncated']:,} prompts cut on the left to fit into {context} tokens, "
        f"{report['left_out']:,} pairs left out whose replies do not"
    )
    print(f"device: {device} ({reason}), {dtype}, {torch.get_num_threads()} threads")
    print(
        f"steps: {how.steps:,} of about {how.tokens_per_step:,} tokens, "
        + (f"packed in rows of {context}" if how.packing else "bucketed by length")
        + f", {how.micro_batch or 'all'} rows at once; {how.steps / per_epoch:.1f} passes"
    )
    print(f"run: {run.dir}" + (" (going on)" if run.resume else ""), flush=True)
    replies = compiled(
        model.replies, how.compile or (how.compile is None and device.type == "cuda")
    )

    def loss_of(rows, total):
        epoch, step = loader.position  # of the next step
        reward.freeze(model, how.extra_blocks, epoch == 0 and 0 < step <= how.freeze_steps)
        return reward.preference_loss(model, rows, total, how, device, replies)

    @torch.no_grad()
    def validate():
        model.eval()
        total, rows = sum(map(reward.compared, choosing)), [[example] for example in choosing]
        parts = [rows[i : i + 32] for i in range(0, len(rows), 32)]
        loss = sum(reward.preference_loss(model, p, total, how, device).item() for p in parts)
        judged = reward.evaluate(choosing, reward.score(model, choosing), chooses)
        return dict(val_loss=loss, val_accuracy=figures.accuracy(judged)[0])

    bar = progress(total=how.steps, desc="step")
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        shown = f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s"
        bar.set_postfix_str(shown, False)
        bar.update(line["step"] - bar.n)
        if line["step"] == 5:
            minutes = how.steps * line["time"] / 5 / 60
            say(f"about {minutes:.1f} minutes in all, {inputs.peak_memory(device):.2f} GiB")
        if line["val_loss"] is not None:
            say(
                f"step {line['step']:,}: training {line['train_loss']:.3f}, held out "
                f"{line['val_loss']:.3f} nats, {line['val_accuracy']:.1%} in order"
            )

    hooks = dict(on_step=on_step, peak_flops=inputs.matrix_flops(device, dtype))
    c, blocks = trunk.config, sum(p.numel() for p in trunk.blocks.parameters())
    hooks["flops_per_token"] = 6 * blocks + 12 * c.n_layers * c.n_heads * c.head_dim * context
    try:
        reward.train(
            model, loader, loss_of, validate, model.save_pretrained, how, run, device, dtype,
            **hooks,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise ValueError("out of GPU memory: give a smaller --micro_batch") from None
    finally:
        bar.close()
    model = reward.RewardModel.from_pretrained(run.dir, device)
    before = reward.evaluate(asked, json.loads(kept.read_text()), test)
    after = reward.evaluate(testing, reward.score(model, testing), test)
    both = {row["pair"] for row in before} & {row["pair"] for row in after}  # what fits in either
    before, after = ([row for row in rows if row["pair"] in both] for rows in (before, after))
    others = {
        "by likelihood": before,
        "by shared words": figures.shared_words(after, test, learned),
    }
    others |= {"by the last mark": figures.last_stop(after, test)}
    print("\n".join(figures.lines(after, others)))
    finish(run, name, source, options, test, before, after, device)


def summary(result):
    return f"held out {result['val_loss']:.3f} nats, {result['accuracy']:.1%} in order"


def finish(run, preset, source, options, test, before, after, device):
    """How the held-out pairs were judged: plots, examples, a record; what to expect and to try."""
    plot_loss(run.dir)
    lines = [json.loads(line) for line in open(run.dir / "metrics.jsonl")]
    evaluated = [line for line in lines if line["val_loss"] is not None]
    best, last = min(evaluated, key=lambda line: line["val_loss"]), lines[-1]
    tell(after)
    figures.plot(after, before, run.dir / "scores.png")
    figures.examples(after, before, test, run.dir / "examples.md")
    result = dict(preset=preset, data=source.data, steps=last["step"])
    result |= dict(val_loss=round(best["val_loss"], 4))
    for name, rows in figures.groups(after).items():
        key = "accuracy" if name == "all" else name.replace(" ", "_")
        result[key] = round(figures.accuracy(rows)[0], 4)
    result |= dict(calibration_error=round(figures.calibration(after)[1], 4))
    result |= dict(minutes=round(last["time"] / 60, 2))
    result |= dict(tokens_per_s=round(float(np.median([line["tokens_per_s"] for line in lines]))))
    result |= dict(peak_gib=round(inputs.peak_memory(device), 2), seed=run.config["seed"])
    run.finish(result)
    results = HERE / "results.jsonl"
    known = [json.loads(line) for line in open(results)] if results.exists() else []
    same = [r for r in known if all(r.get(k) == result[k] for k in ("preset", "data", "steps"))]
    if same:
        known = sorted(r["accuracy"] for r in same)
        print(f"recorded runs at this budget have {known[0]:.1%} to {known[-1]:.1%} in order")
    if options.record:
        inputs.record(result, device)
    if evaluated[-1]["val_loss"] > best["val_loss"]:
        print(
            f"validation turned up after step {best['step']} (that model is kept): more pairs or "
            "fewer --epochs"
        )
    else:
        print("validation was still falling: more --epochs will help")
    print(
        f"{summary(result)}. Model, loss.png, scores.png, examples.md and metrics are in {run.dir}"
    )


def tell(rows):
    """Calibration and length bias of judged pairs, as text."""
    bias = figures.length_bias(rows)
    print(f"expected calibration error {figures.calibration(rows)[1]:.3f}")
    parts = [f'"the longer is better" is right in {bias["longer_is_better"]:.1%} of the pairs']
    for name in ("chosen_longer", "chosen_shorter"):
        if bias[name] is not None:
            parts.append(f"the reward where the {name.replace('_', ' is ')} in {bias[name]:.1%}")
    print("length: " + ", ".join(parts) + f"; correlation {bias['correlation']:.2f}")


# ---- judging


def load(options):
    """(model, tokenizer, template, context, device) of a reward model's directory."""
    device, dtype, _ = pick_device(options.device)
    model = reward.RewardModel.from_pretrained(inputs.find_model(options.model), device, dtype)
    tokenizer, template, _ = inputs.with_template(model.trunk, "auto")
    return model, tokenizer, template, model.config.context_length, device


def evaluate(given):
    """judge held-out pairs with a reward model"""
    source, options = build(Source, given), build(JudgeOptions, given)
    if options.test_pairs < 1:
        raise ValueError("--test_pairs is at least 1")
    model, *text, device = load(options)
    _, held_out, said = read(source)
    test = held_out[: options.test_pairs]
    examples, report = reward.encode_all(test, *text, model.trunk.causal)
    print(f"data: {said}; {report['pairs']:,} are judged, {report['left_out']:,} do not fit")
    rows = reward.evaluate(examples, reward.score(model, examples), test)
    for name, part in figures.groups(rows).items():
        share, low, high = figures.accuracy(part)
        print(f"{name:16}{len(part):6}{share:10.1%}   {low:.1%} to {high:.1%}")
    tell(rows)


def score(given):
    """give each of some replies to a prompt its reward"""
    options = build(ScoreOptions, given)
    model, *text, device = load(options)
    replies = [reply.replace("\\n", "\n") for reply in options.replies.split("|")]
    prompt = [dict(role="user", content=options.prompt.replace("\\n", "\n"))]
    asked = [dict(prompt=prompt, chosen=reply, rejected=reply) for reply in replies]
    examples, report = reward.encode_all(asked, *text, model.trunk.causal)
    if report["left_out"]:
        raise ValueError(f"{report['left_out']} of the replies do not fit into {text[2]} tokens")
    found = reward.evaluate(examples, reward.score(model, examples), asked)
    for row in sorted(found, key=lambda row: -row["chosen"]):
        print(f"{row['chosen']:8.3f}  {replies[row['pair']]}")


def show(given):
    """print pairs as the model is trained on them"""
    source, how = build(Source, given), build(ShowOptions, given)
    learned, _, said = read(source)
    print(said)
    for pair in learned[: how.n]:
        print(f"--- {pair.get('kind') or 'pair'}")
        for message in pair["prompt"]:
            print(f"[{message['role']}] {message['content']}")
        print(f"[chosen] {pair['chosen']}\n[rejected] {pair['rejected']}")


if __name__ == "__main__":
    main(
        {
            "train": (train, Source, Start, Options, reward.TrainConfig),
            "eval": (evaluate, Source, JudgeOptions),
            "score": (score, ScoreOptions),
            "show": (show, Source, ShowOptions),
        }
    )
