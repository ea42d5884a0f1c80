"""Supervised fine-tuning: a model that continues text becomes one that answers, or one that sorts.

What this stage teaches: a conversation is one text in which only the assistant's words are learned,
the token that ends its turn among them; a step's loss is divided by how many such tokens all of its
micro-batches have; short examples share a row and do not see one another; a few numbers beside each
matrix (LoRA) can be enough; and whether any of it helped is measured against gold answers.

Parent: 04_modern/modern.py
New: render_chat, protect, encode_text, encode_example, encode_prompt, encode_all, pack, collate,
    ExampleLoader, sft_loss, difficulty, Classifier, classifier_loss, classify, response_nats,
    gold_pairs, validation, stop_tokens, score_choices
Changed: TrainConfig, train, evaluate

Read in this order: render_chat and encode_example; pack to sft_loss; lora.py; train; evaluate; then
Classifier. Beside it: transformer.py is 04's model with documents kept apart; templates.py,
forms.py and questions.py are how a chat is written down, a data set read, one made of the plays;
scores.py, reports.py, optimizers.py and checkpoints.py are what their names say. Of the commands
run.py has most, sorting.py classify, ablation.py ablate, and sources.py what all of them need.

Papers
- Instructions: Ouyang et al. 2022, arXiv 2203.02155; Taori et al. 2023 (Alpaca)
- Packing: Krell et al. 2021, arXiv 2107.02027; best fit: Ding et al. 2024, arXiv 2404.10830
- LoRA: Hu et al. 2021, arXiv 2106.09685; noise on embeddings: Jain et al. 2023, arXiv 2310.05914
- Curriculum: Bengio et al. 2009, doi 10.1145/1553374.1553380; by competence: Platanios et al. 2019,
  arXiv 1903.09848
- Loss on all tokens or on the answer: Shi et al. 2024, arXiv 2405.14394

Shapes: B batch (rows), T time (tokens), C = d_model, V vocab, N tokens that are learned.
"""

import json
import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import numpy as np
import safetensors.torch
import scores
import torch
from lora import LORA_TARGETS, LoRALinear  # noqa: F401
from optimizers import clip_gradients, load_state, lr_schedule, optimizers_of, save_state
from torch import nn
from transformer import TransformerLM, cross_entropy

from common import EOT, atomic, progress

# ---- conversations as tokens


def render_chat(messages, template, add_generation_prompt=False):
    """The text of a conversation in parts, [(text, learned), ...]: learned are the assistant's
    words and the token that ends them, not the frame around. With add_generation_prompt it ends
    where the assistant begins.

    messages: [{"role": "system", "user" or "assistant", "content": str}, ...]. What a template
    writes for an answer is what comes to the text when the answer does. Raises ValueError where it
    then rewrites what was there before.

    [user Hi, assistant Ho] in ChatML -> [
    ("<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", False),
    ("Ho<|im_end|>", True), ("\\n", False)]"""
    parts, done = [], ""

    def rest(text):
        if not text.startswith(done):
            raise ValueError(
                "the chat template rewrites earlier turns when later ones come: train on "
                "conversations of one answer, or with --template chatml"
            )
        return text[len(done) :]

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            parts.append((rest(template.render(messages[:i], True)), False))
            done += parts[-1][0]
            said = rest(template.render(messages[: i + 1]))
            end = said.rfind(template.end)
            said = said if end < 0 else said[: end + len(template.end)]
            parts.append((said, True))
            done += said
    parts.append((rest(template.render(messages, add_generation_prompt)), False))
    return [(text, learned) for text, learned in parts if text]


def protect(messages, tokenizer):
    """(messages, mark): a mark inside each name of a special token that somebody typed, so that it
    stays text; only the template writes the tokens themselves."""
    said = "".join(m["content"] for m in messages)
    mark = next(chr(c) for c in range(0xE000, 0xF900) if chr(c) not in said)
    names, safe = [name for name in tokenizer.special if len(name.strip()) > 1], []
    for message in messages:
        content = message["content"]
        for name in names:
            content = content.replace(name, name[:1] + mark + name[1:])
        safe.append(message | dict(content=content))
    return safe, mark


def encode_text(text, tokenizer, mark):
    """Ids of a rendered text in which `mark` protects what is no special token."""
    ids, special = [], tokenizer.special
    for part in tokenizer.special_pattern.split(text):
        words = part.replace(mark, "")
        ids += [special[part]] if part in special else tokenizer.encode(words, special=False)
    return ids


def encode_example(messages, tokenizer, template, context_length=None):
    """(ids, mask) of a conversation, lists of equal length: mask is True for the tokens to learn.

    Of one longer than context_length the oldest exchanges are left out, not a system message; if
    the last one alone is too long, its first tokens are. A part is encoded by itself where the
    answer begins, as it will be when the model is asked."""
    safe, mark = protect(messages, tokenizer)
    while True:
        ids, mask = [], []
        for text, learned in render_chat(safe, template):
            new = encode_text(text, tokenizer, mark)
            ids += new
            mask += [learned] * len(new)
        if context_length is None or len(ids) <= context_length:
            return ids, mask
        asked = [i for i, m in enumerate(safe) if m["role"] == "user"]
        if len(asked) < 2:
            return ids[-context_length:], mask[-context_length:]
        safe = [m for m in safe[:1] if m["role"] == "system"] + safe[asked[1] :]


def encode_prompt(messages, tokenizer, template):
    """Ids of a conversation up to where the assistant's next answer begins."""
    safe, mark = protect(messages, tokenizer)
    parts = render_chat(safe, template, add_generation_prompt=True)
    return [token for text, _ in parts for token in encode_text(text, tokenizer, mark)]


def encode_all(conversations, tokenizer, template, context_length, learn="response"):
    """(examples, report) of {"messages": ...}: (ids, mask) each, and how many were truncated, or
    masked: left out because nothing in them is to be learned. With learn="all" every token is.
    Raises ValueError where no example is left."""
    examples, report = [], dict(truncated=0, masked=0, tokens=0, learned=0)
    for conversation in conversations:
        ids, mask = encode_example(conversation["messages"], tokenizer, template)
        if len(ids) > context_length:
            report["truncated"] += 1
            ids, mask = encode_example(
                conversation["messages"], tokenizer, template, context_length
            )
        if not any(mask[1:]):
            report["masked"] += 1
            continue
        examples.append((ids, [True] * len(ids) if learn == "all" else mask))
        report["tokens"] += len(ids)
        report["learned"] += sum(examples[-1][1][1:])
    if not examples:
        raise ValueError(
            f"none of the {len(conversations)} conversations has a token to learn within "
            f"{context_length}: they need answers, and a longer --context_length if they are cut"
        )
    return examples, report


# ---- batches


def pack(examples, context_length):
    """Rows, lists of examples of together at most context_length tokens: the longest first, each
    into the fullest row that has room for it (Ding et al. 2024). Raises ValueError where one is
    longer than that."""
    rows, with_room = [], [[] for _ in range(context_length + 1)]  # rows by how much room they have
    for example in sorted(examples, key=lambda example: -len(example[0])):
        n = len(example[0])
        if n > context_length:
            raise ValueError(f"an example of {n} tokens does not fit into {context_length}")
        room = next((r for r in range(n, context_length + 1) if with_room[r]), None)
        if room is None:
            room = context_length
            rows.append([])
            with_room[room].append(rows[-1])
        row = with_room[room].pop()
        row.append(example)
        with_room[room - n].append(row)
    return rows


def collate(rows, device="cpu", always=False):
    """(ids, mask, documents) of rows of examples, (B, T) each, padded on the right: documents
    numbers the examples of a row, -1 is padding; None where each row has one, as then nothing that
    counts can see a pad, unless `always`, which noise needs to know the lengths."""
    T = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids, mask = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), bool)
    documents = np.full((len(rows), T), -1)
    for i, row in enumerate(rows):
        start = 0
        for n, (tokens, learned) in enumerate(row):
            stop = start + len(tokens)
            ids[i, start:stop], mask[i, start:stop], documents[i, start:stop] = tokens, learned, n
            start = stop
    alone = not always and all(len(row) == 1 for row in rows)
    tensors = (torch.from_numpy(x).to(device) for x in (ids, mask, documents))
    return (*list(tensors)[:2], None) if alone else tuple(tensors)


class ExampleLoader:
    """Steps of examples (ids, mask), epoch after epoch, in an order that the seed determines.

    next(loader) is (micro-batches, total): lists of at most micro_batch rows, and the number of
    tokens to learn in all of them, by which the loss of each is to be divided. A step has about
    tokens_per_step tokens, padding among them. With packing a row holds several examples; without,
    examples of like length come together (bucketing). difficulty, a number for each example: in the
    first epoch the higher ones join later. `position`, (epoch, step in it), is all its
    state. count(example): what it adds to the total."""

    def __init__(
        self, examples, context_length, tokens_per_step, micro_batch=None, packing=True,
        difficulty=None, seed=1, count=lambda example: sum(example[1][1:]),
    ):  # fmt: skip
        self.examples, self.context_length, self.packing = examples, context_length, packing
        self.tokens, self.micro_batch = max(tokens_per_step, context_length), micro_batch
        self.difficulty, self.seed, self.count = difficulty, seed, count
        self.position, self.epochs = (0, 0), {}

    def epoch(self, n):
        """The steps of epoch n, lists of rows."""
        if n not in self.epochs:
            random = np.random.default_rng((self.seed, n))
            order, steps = random.permutation(len(self.examples)), []
            if n == 0 and self.difficulty is not None:
                # Each anywhere after its rank: what is hard joins later, what is easy never leaves.
                rank = np.argsort(np.argsort(np.asarray(self.difficulty)[order], kind="stable"))
                order = order[np.argsort(random.uniform(rank, len(order)))]
            # Like lengths, or what fits together, are looked for among 16 steps' examples: in all
            # of them the order would be one of lengths and not of chance.
            ends = np.cumsum([len(self.examples[i][0]) for i in order]) // (16 * self.tokens)
            for pool in np.split(order, np.flatnonzero(np.diff(ends)) + 1):
                steps += self.bucket([self.examples[i] for i in pool], random)
            self.epochs = {n: steps}
        return self.epochs[n]

    def bucket(self, examples, random):
        """Steps of these examples, in any order."""
        if self.packing:
            rows = pack(examples, self.context_length)
            most = self.tokens // self.context_length
            parts = np.array_split(random.permutation(len(rows)), -(-len(rows) // most))
            return [[rows[i] for i in part] for part in parts]
        steps = [[]]
        for example in sorted(examples, key=lambda example: len(example[0])):
            if (len(steps[-1]) + 1) * len(example[0]) > self.tokens:
                steps.append([])
            steps[-1].append([example])
        steps = [step for step in steps if step]
        return [steps[i] for i in random.permutation(len(steps))]

    def __next__(self):
        n, step = self.position
        rows = self.epoch(n)[step]
        self.position = (n, step + 1) if step + 1 < len(self.epoch(n)) else (n + 1, 0)
        size = self.micro_batch or len(rows)
        total = sum(self.count(example) for row in rows for example in row)
        return [rows[i : i + size] for i in range(0, len(rows), size)], total


def sft_loss(model, ids, mask, documents=None, total=None, hidden=None):
    """Mean loss in nats of the tokens under mask, a scalar: ids and mask (B, T) as collate gives
    them. With `total`, the sum divided by that: the number of such tokens in all micro-batches, so
    that each counts alike wherever it stands. 0 where there is none.

    Logits are made for these tokens only. hidden: a compiled model.hidden."""
    x = (hidden or model.hidden)(ids, documents=documents)[:, :-1]  # (B, T - 1, C)
    wanted = mask[:, 1:]  # nothing comes before a row's first token, so it never counts
    if documents is not None:  # nor does a document's: it does not follow from the one before
        wanted = wanted & (documents[:, 1:] == documents[:, :-1])
    targets = ids[:, 1:][wanted]  # (N,)
    if not len(targets):
        return x.sum() * 0.0
    loss = cross_entropy(model.output(x[wanted]), targets)
    return loss if total is None else loss * (len(targets) / total)


def difficulty(model, examples):
    """The mean loss of each example's learned tokens: what a curriculum by difficulty goes by."""
    parts = [(ids[:1], ids[1:]) for ids, _ in examples]
    masks = [mask[1:] for _, mask in examples]
    return [n / sum(m) for n, m in zip(response_nats(model, parts, masks), masks)]


# ---- training


@dataclass
class TrainConfig:
    """How to train; run.py chooses the values for the machine and preset."""

    epochs: float = 3.0  # passes over the examples
    steps: int | None = None  # optimizer steps, in place of epochs
    tokens_per_step: int = 4096  # batch size, tokens, padding among them
    micro_batch: int | None = None  # rows at once, the rest is accumulated; None: all
    packing: bool = True  # several examples in a row; without, those of like length together
    learn: str = "response"  # the tokens that are learned: response or all
    curriculum: str = "none"  # order of the first epoch: none, length or difficulty
    neftune: float = 0.0  # alpha of the noise on embeddings, 5 in the paper; 0: none
    lora_rank: int = 0  # rank of LoRA's matrices; 0: all weights are trained
    lora_alpha: float = 16.0  # LoRA's matrices count alpha / rank
    lora_dropout: float = 0.0  # share of their input set to 0 in training
    lora_targets: str = LORA_TARGETS  # the matrices that get them, commas between
    lora_layers: str = ""  # the layers that get them, such as "0,5"; all where empty
    optimizer: str = "adamw"  # adamw or muon
    max_lr: float = 1e-3  # learning rate after the warm-up
    min_lr: float = 0.0  # learning rate at the end
    warmup_steps: int = 20  # steps of rising learning rate
    schedule: str = "linear"  # cosine, linear or wsd (level, then down in a line)
    weight_decay: float = 0.0  # on matrices
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # AdamW's memory of squared gradients
    max_norm: float = 1.0  # gradients are clipped to this norm
    eval_every: int = 100  # steps between evaluations and checkpoints
    eval_examples: int = 200  # held-out examples in an evaluation
    patience: int = 10  # evaluations without a better loss before it stops early
    seed: int = 1  # of batches, noise and dropout
    compile: bool | None = None  # torch.compile; None: on CUDA
    tensorboard: bool = False  # write to <run>/tensorboard
    wandb: bool = False  # send to Weights & Biases

    def __post_init__(self):
        for name in ("tokens_per_step", "eval_every", "eval_examples", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise ValueError("--epochs must be above 0, --steps at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}: it must be at least 1")
        for name, known in (
            ("learn", ("response", "all")), ("optimizer", ("adamw", "muon")),
            ("curriculum", ("none", "length", "difficulty")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is none of {', '.join(known)}")
        if self.lora_rank < 0 or self.neftune < 0:
            raise ValueError("--lora_rank and --neftune are not below 0")
        lr_schedule(0, self.max_lr, self.min_lr, 1, 1, self.schedule)  # says if it is unknown


def train(model, loader, loss_of, validate, save, config, run, device="cpu", dtype=torch.float32,
          **hooks):  # fmt: skip
    """Train what `model` has to train for config.steps steps; returns the last line of metrics.

    loss_of(rows, total): a micro-batch's part of the loss. validate(): {"val_loss": ..., and more}.
    save(directory): writes the model. `run` has `dir`, `resume` and `log(**metrics)`, as
    common.Run. In run.dir: state.pt, the newest state, after each evaluation and when stopped; and
    the model of the lowest validation loss. hooks: on_step(metrics), flops_per_token and
    peak_flops, for MFU. Ctrl-C and SIGTERM save, then exit with 130 and 0; a second one ends at
    once. Raises ValueError on a loss that is not finite; state.pt is then the last good one."""
    optimizers, path = optimizers_of(model, config), run.dir / "state.pt"
    trained = [p for p in model.parameters() if p.requires_grad]
    kind, signals, line = torch.device(device).type, [], {}
    autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()
    state = dict(step=0, position=[0, 0], best=math.inf, since_best=0, seconds=0.0, tokens=0)
    if run.resume and path.exists():
        found = load_state(path, model, optimizers)
        state = {name: found[name] for name in state}
        if state["since_best"] >= config.patience:  # it had stopped early and is asked for more
            state["since_best"] = 0
    loader.position = tuple(state["position"])

    def stop(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    start = time.perf_counter() - state["seconds"]
    model.train()
    while state["step"] < config.steps and state["since_best"] < config.patience and not signals:
        began, step, loss = time.perf_counter(), state["step"] + 1, 0.0
        micro_batches, total = next(loader)
        for rows in micro_batches:  # each divided by the total of all, as if they were one batch
            with autocast:
                part = loss_of(rows, total)
            part.backward()
            loss += part.item()
        norm = clip_gradients(trained, config.max_norm).item()
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {step}: the loss is {loss}, the gradient norm {norm}: stopped; {path} holds "
                "the last good state; lower --max_lr or look at the examples around there"
            )
        args = (config.max_lr, config.min_lr, config.warmup_steps, config.steps, config.schedule)
        lr = lr_schedule(step, *args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        tokens = sum(len(ids) for rows in micro_batches for row in rows for ids, _ in row)
        rate = tokens / (time.perf_counter() - began)
        state |= dict(step=step, position=list(loader.position), tokens=state["tokens"] + tokens)
        line = dict(step=step, time=0.0, tokens=state["tokens"], train_loss=loss, lr=lr)
        line |= dict(grad_norm=norm, tokens_per_s=rate, targets=total, val_loss=None, val_bpb=None)
        line |= dict(mfu=rate * hooks.get("flops_per_token", 0) / hooks.get("peak_flops", math.inf))
        if evaluated := (step % config.eval_every == 0 or step == config.steps):
            with autocast:
                line |= validate()
            model.train()
            state["since_best"] = 0 if line["val_loss"] < state["best"] else state["since_best"] + 1
            if line["val_loss"] < state["best"]:
                state["best"] = line["val_loss"]
                save(run.dir)
        line["time"] = state["seconds"] = round(time.perf_counter() - start, 3)
        run.log(**line)
        if evaluated:
            save_state(model, optimizers, state, path)
        if "on_step" in hooks:
            hooks["on_step"](line)
    for number, handler in before.items():
        signal.signal(number, handler)
    if signals:
        save_state(model, optimizers, state, path)
        if state["best"] == math.inf:  # no evaluation yet: this model is the best there is
            save(run.dir)
        print(f"stopped after step {state['step']} and saved: the same command goes on from there")
        sys.exit(130 if signals[0] == signal.SIGINT else 0)
    return line


# ---- evaluation


@torch.no_grad()
def response_nats(model, pairs, masks=None, batch_tokens=8192):
    """Nats of each response after its prompt, [(prompt ids, response ids), ...] to floats. masks:
    which tokens of the responses count; None: all."""
    model.eval()
    device, found = model.token_embedding.weight.device, [0.0] * len(pairs)
    masks = masks or [[True] * len(response) for _, response in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    while order:
        size = max(1, batch_tokens // sum(map(len, pairs[order[0]])))
        part, order = order[:size], order[size:]
        texts = [(pairs[i][0] + pairs[i][1], [False] * len(pairs[i][0]) + masks[i]) for i in part]
        ids, mask, _ = collate([[text] for text in texts], device)
        wanted = mask[:, 1:]
        logits = model.output(model.hidden(ids)[:, :-1][wanted]).float()  # (N, V)
        chosen = logits.gather(1, ids[:, 1:][wanted][:, None])[:, 0] - logits.logsumexp(1)  # (N,)
        sums = torch.zeros(len(part), device=device).index_add_(0, wanted.nonzero()[:, 0], -chosen)
        for i, nats in zip(part, sums.tolist()):
            found[i] = nats
    return found


def gold_pairs(conversations, tokenizer, template, context_length):
    """(prompt ids, ids of the gold answer) of each conversation's last exchange; the prompt loses
    its first tokens, then the answer its last, where they do not fit into context_length."""
    pairs = []
    for conversation in conversations:
        *asked, gold = conversation["messages"]
        response = tokenizer.encode(gold["content"], special=False)[: context_length - 1]
        prompt = encode_prompt(asked, tokenizer, template)
        pairs.append((prompt[-(context_length - len(response)) :], response))
    return pairs


def validation(model, tokenizer, pairs):
    """Mean loss in nats and bits per byte of the gold answers of gold_pairs, less the token that
    ends them: whether a model stops is for evaluate to see."""
    nats = sum(response_nats(model, pairs))
    size = sum(len(tokenizer.decode(response).encode()) for _, response in pairs)
    tokens = sum(len(response) for _, response in pairs)
    return dict(val_loss=nats / tokens, val_bpb=nats / size / math.log(2))


def stop_tokens(model, tokenizer, template):
    """The ids that end an answer: the template's, the end of text, and what the model names."""
    found = {tokenizer.special[n] for n in (template.end, EOT) if n in tokenizer.special}
    named = model.token_ids.get("eos_token_id")
    return found | set(named if isinstance(named, list) else [named]) - {None}


def evaluate(model, tokenizer, template, conversations, max_new_tokens=64, batch_size=64):
    """What the model answers in the place of each conversation's last message, the gold answer:
    [{"prompt", "gold", "answer", "kind", "stopped", "exact", "f1", "rouge_l", "nats", "bytes"}].

    Greedy. stopped: it ended by itself within max_new_tokens. nats: of the gold answer, without the
    token that ends it, and how many bytes that is. What does not fit into the context loses its
    first tokens."""
    most = model.config.context_length - max_new_tokens
    if most < 1:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a question in the context of "
            f"{model.config.context_length} tokens"
        )
    stops = stop_tokens(model, tokenizer, template)
    pairs = gold_pairs(conversations, tokenizer, template, model.config.context_length)
    prompts, rows = [prompt[-most:] for prompt, _ in pairs], []
    for conversation in conversations:
        *asked, gold = conversation["messages"]
        rows.append(dict(prompt=asked[-1]["content"], gold=gold["content"]))
        rows[-1]["kind"] = conversation.get("kind")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    bar = progress(total=len(order), desc="answering")
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        settings = dict(stop_tokens=stops, temperature=0)
        found = model.generate([prompts[i] for i in part], max_new_tokens, **settings)
        for i, new in zip(part, found):
            stopped = bool(new) and new[-1] in stops
            answer = tokenizer.decode(new[:-1] if stopped else new).strip()
            rows[i] |= dict(answer=answer, stopped=stopped) | scores.of(answer, rows[i]["gold"])
        bar.update(len(part))
    bar.close()
    for row, (_, response), nats in zip(rows, pairs, response_nats(model, pairs)):
        row |= dict(nats=nats, bytes=len(tokenizer.decode(response).encode()))
    return rows


def score_choices(model, tokenizer, template, items):
    """Nats of each choice as the answer to its question, [[float, ...], ...], and its bytes: of
    (question, choices, index of the right one). Together they do not have to fit into more than the
    context: a question loses its first tokens."""
    pairs, sizes = [], []
    for question, choices, _ in items:
        for choice in choices:
            asked = [dict(role="user", content=question)]
            answer = dict(role="assistant", content=choice)
            one = dict(messages=[*asked, answer])
            pairs += gold_pairs([one], tokenizer, template, model.config.context_length)
            sizes.append(len(choice.encode()))
    nats, found = response_nats(model, pairs), []
    for _, choices, _ in items:
        n = len(choices)
        found.append(list(zip(nats[:n], sizes[:n])))
        nats, sizes = nats[n:], sizes[n:]
    return found


# ---- classification


class Classifier(nn.Module):
    """A TransformerLM whose last token's vector is sorted into classes: `classifier(ids, lengths)`
    gives logits (B, classes) for ids (B, T), padded on the right, and lengths (B,)."""

    def __init__(self, trunk, labels):
        super().__init__()
        self.trunk, self.labels = trunk, list(labels)
        self.head = nn.Linear(trunk.config.d_model, len(self.labels), bias=False)
        nn.init.normal_(self.head.weight, std=trunk.config.std)
        self.config = trunk.config

    def forward(self, ids, lengths):
        x = self.trunk.hidden(ids)  # (B, T, C)
        last = x[torch.arange(len(ids), device=ids.device), lengths - 1]  # (B, C)
        return self.head(last)

    def save_pretrained(self, path):
        """As a LlamaForSequenceClassification or the like, which `transformers` loads."""
        path = Path(path)
        self.trunk.save_pretrained(path)
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        tensors["score.weight"] = self.head.weight.detach().float().cpu()
        config = json.loads((path / "config.json").read_text())
        kind = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
        labels = {str(i): label for i, label in enumerate(self.labels)}
        config |= dict(architectures=[kind], id2label=labels)
        config["label2id"] = {label: int(i) for i, label in labels.items()}
        with atomic(path / "model.safetensors") as file:
            file.write(safetensors.torch.save(tensors, {"format": "pt"}))
        with atomic(path / "config.json", "w") as file:
            json.dump(config, file, indent=1)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """What save_pretrained wrote."""
        fields, tensors, files, token_ids = checkpoints.read(Path(path))
        config = json.loads((Path(path) / "config.json").read_text())
        if "score.weight" not in tensors:
            raise ValueError(f"{path} holds no classifier: run.py classify trains one")
        head = tensors.pop("score.weight")
        trunk = TransformerLM.build(fields, tensors, files, token_ids, path, device, dtype)
        classifier = cls(trunk, [config["id2label"][str(i)] for i in range(len(head))])
        classifier.head.weight.data = head.to(device, dtype)  # the trunk's angles stay float32
        return classifier


def classifier_loss(classifier, rows, total, device="cpu"):
    """Sum of the losses of rows of one example (ids, [class]) each, over `total`."""
    examples = [row[0] for row in rows]
    ids, _, _ = collate([[(ids, [False] * len(ids))] for ids, _ in examples], device)
    lengths = torch.tensor([len(ids) for ids, _ in examples], device=device)
    classes = torch.tensor([label for _, (label,) in examples], device=device)
    return cross_entropy(classifier(ids, lengths), classes) * (len(rows) / total)


@torch.no_grad()
def classify(classifier, texts, batch_size=64):
    """The class of each list of ids, int64 (n,)."""
    classifier.eval()
    device, found = classifier.head.weight.device, np.zeros(len(texts), np.int64)
    order = np.argsort([len(ids) for ids in texts], kind="stable")
    for part in np.split(order, range(batch_size, len(order), batch_size)):
        ids, _, _ = collate([[(texts[i], [False] * len(texts[i]))] for i in part], device)
        lengths = torch.tensor([len(texts[i]) for i in part], device=device)
        found[part] = classifier(ids, lengths).argmax(-1).cpu()
    return found
