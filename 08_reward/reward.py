"""Reward models: which of two replies do people prefer, as one number for each.

What this stage teaches: a language model with a scalar where its vocabulary was can learn from
comparisons alone; only differences of its rewards mean something; a prompt with all its replies is
read once; the last token needs a layer to gather what the others have found; whether the model
knows how sure it is can be checked (calibration), and so can what it should not go by (length).
Last, what may be done to a reward before a policy is trained on it, and which of these changes
leave the best policy as it was.

Parent: 07_sft/sft.py
New: encode_reply, group, used, compared, RewardModel, deepen, freeze, bradley_terry_loss,
    margin_ranking_loss, preference_loss, score, likelihoods, Whitening, shape_reward
Changed: TrainConfig, encode_all, collate, evaluate

Read in this order: encode_reply to collate; RewardModel, deepen and freeze; the two losses; score
and evaluate; shape_reward. Between them render_chat, protect, encode_text, encode_prompt, pack,
ExampleLoader and train are 07's. Beside it: trunk.py is 07's model with branches; pairs.py reads
comparisons in three forms, preferences.py makes them of the plays; figures.py, inputs.py, optim.py,
chats.py and formats.py are what their names say.

Papers
- Comparisons as a model of choice: Bradley and Terry 1952, doi 10.2307/2334029; rewards learned so:
  Christiano et al. 2017, arXiv 1706.03741; of language models: Stiennon et al. 2020, 2009.01325;
  all replies to a prompt in one batch element: Ouyang et al. 2022, arXiv 2203.02155
- Margins: Touvron et al. 2023 (Llama 2), arXiv 2307.09288; centring: Eisenstein et al. 2023,
  arXiv 2312.09244; length as a shortcut: Singhal et al. 2023, arXiv 2310.03716
- Blocks that begin as the identity: Wu et al. 2024, arXiv 2401.02415; the rest frozen at first:
  Kumar et al. 2022, arXiv 2202.10054
- Shaping that keeps the best policy: Ng, Harada and Russell 1999 (ICML)

Shapes: B batch (rows), T time (tokens), C = d_model, V vocab, R replies in a batch, P comparisons.
"""

import json
import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import formats
import numpy as np
import torch
from optim import clip_gradients, load_state, lr_schedule, optimizers_of, save_state
from torch import nn
from torch.nn import functional as F
from trunk import Block, Layout, TransformerLM

from common import progress

# ---- comparisons as tokens


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


def encode_prompt(messages, tokenizer, template):
    """Ids of a conversation up to where the assistant's next answer begins."""
    safe, mark = protect(messages, tokenizer)
    parts = render_chat(safe, template, add_generation_prompt=True)
    return [token for text, _ in parts for token in encode_text(text, tokenizer, mark)]


def encode_reply(messages, tokenizer, template):
    """Ids of the last message of a conversation, an answer, and of the token that ends it."""
    safe, mark = protect(messages, tokenizer)
    said = [text for text, learned in render_chat(safe, template) if learned]
    return encode_text(said[-1], tokenizer, mark)


def group(pairs):
    """Comparisons of the replies to one prompt together: [(prompt, replies, comparisons), ...], a
    comparison (better, worse, margin, label, index of its pair), with the numbers of two replies.

    pairs: {"prompt": messages, "chosen": str, "rejected": str} and, where the data has them,
    "margin", by how much the one is better, and "label", the probability that it is."""
    found = {}
    for i, pair in enumerate(pairs):
        _, replies, comparisons = found.setdefault(
            json.dumps(pair["prompt"]), (pair["prompt"], {}, [])
        )
        better, worse = (replies.setdefault(pair[k], len(replies)) for k in ("chosen", "rejected"))
        strength = (pair.get("margin", 0.0), pair.get("label", 1.0))
        comparisons.append((better, worse, *strength, i))
    return [(prompt, list(replies), comparisons) for prompt, replies, comparisons in found.values()]


def used(comparisons):
    """The numbers of the replies that are compared, in order."""
    return sorted({i for better, worse, *_ in comparisons for i in (better, worse)})


def encode_all(pairs, tokenizer, template, context_length, shared=True):
    """(examples, report): a prompt with its replies one after the other, (ids, marks), as long as
    they fit into context_length tokens. marks: (branch of each token, comparisons).

    The prompt is branch 0, the replies are 1, 2, ...: the positions of each go on from the end of
    the prompt. Without `shared` each reply has the prompt before it once more, in its own branch. A
    prompt too long loses its first tokens; a pair whose replies leave no room for one is left out.
    Raises ValueError where none remains."""
    examples, report = [], dict(truncated=0, left_out=0, tokens=0, pairs=0)
    groups = group(pairs)
    for messages, replies, comparisons in progress(
        iterable=groups, desc="encoding", disable=len(groups) < 1000
    ):
        prompt = encode_prompt(messages, tokenizer, template)
        said = [
            encode_reply([*messages, dict(role="assistant", content=reply)], tokenizer, template)
            for reply in replies
        ]
        parts = [[]]
        for comparison in comparisons:  # as many in one example as fit
            together = [*parts[-1], comparison]
            copies = 1 if shared else len(used(together))
            size = copies * len(prompt) + sum(len(said[i]) for i in used(together))
            if size <= context_length or not parts[-1]:
                parts[-1] = together
            else:
                parts.append([comparison])
        for part in parts:
            copies = 1 if shared else len(used(part))
            room = (context_length - sum(len(said[i]) for i in used(part))) // copies
            if room < 1:
                report["left_out"] += len(part)
                continue
            report["truncated"] += room < len(prompt)
            asked = prompt[-room:]
            ids, branches = ([*asked], [0] * len(asked)) if shared else ([], [])
            for branch, i in enumerate(used(part), 1):
                text = said[i] if shared else asked + said[i]
                ids += text
                branches += [branch] * len(text)
            number = {i: n for n, i in enumerate(used(part))}
            part = [(number[a], number[b], *rest) for a, b, *rest in part]
            examples.append((ids, (branches, part)))
            report["tokens"] += len(ids)
            report["pairs"] += len(part)
    if not examples:
        raise ValueError(
            f"none of the {len(pairs)} pairs fits into {context_length} tokens: give a longer "
            "--context_length"
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


def collate(rows, device="cpu"):
    """(ids, layout, ends, comparisons) of rows of examples: ids (B, T) padded on the right, their
    Layout, row and column of the last token of each reply, int64 (R, 2), and comparisons, float32
    (P, 4): number of the better and of the worse reply in the batch, margin, label."""
    T = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids, positions, branches = np.zeros((3, len(rows), T), np.int64)
    documents, ends, comparisons = np.full((len(rows), T), -1), [], []
    for i, row in enumerate(rows):
        start = 0
        for n, (tokens, (branch, pairs)) in enumerate(row):
            stop, branch = start + len(tokens), np.asarray(branch)
            ids[i, start:stop], documents[i, start:stop] = tokens, n
            branches[i, start:stop] = branch
            first = len(ends)
            before = int((branch == 0).sum())  # the prompt's length, where it is shared
            positions[i, start : start + before] = range(before)
            for b in range(1, branch.max() + 1):
                places = start + np.flatnonzero(branch == b)
                positions[i, places] = before + np.arange(len(places))
                ends.append((i, places[-1]))
            comparisons += [(first + a, first + b, *rest[:2]) for a, b, *rest in pairs]
            start = stop
    arrays = (ids, positions, documents, branches, np.array(ends))
    ids, positions, documents, branches, ends = (torch.from_numpy(x).to(device) for x in arrays)
    comparisons = torch.tensor(comparisons, device=device)
    return ids, Layout(positions, documents, branches), ends, comparisons


def compared(example):
    """How many comparisons an example holds: what it adds to a step's total."""
    return len(example[1][1])


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


# ---- model and losses


class RewardModel(nn.Module):
    """A number for a text: a TransformerLM's vector at the last real token times a head's weights.

    `model(ids, lengths)`: rewards, float (B,), of ids (B, T) padded on the right, lengths (B,).
    The head begins at 0, so the first loss is log 2. With `bidirectional` each token sees the whole
    text, as in an encoder, which the trunk given becomes; a model that was trained to continue has
    to get used to that."""

    def __init__(self, trunk, bidirectional=False):
        super().__init__()
        self.trunk, self.config = trunk, trunk.config
        trunk.causal = not bidirectional
        self.head = nn.Linear(trunk.config.d_model, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids, lengths):
        rows, layout = torch.arange(len(ids), device=ids.device), None
        if not self.trunk.causal:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            documents = torch.where(positions < lengths[:, None], 0, -1)
            layout = Layout(positions, documents, torch.zeros_like(ids))
        return self.of(self.trunk.hidden(ids, layout=layout)[rows, lengths - 1])

    def replies(self, ids, layout, ends):
        """Rewards, float (R,), of the replies in rows as collate gives them."""
        return self.of(self.trunk.hidden(ids, layout=layout)[ends[:, 0], ends[:, 1]])

    def of(self, x):
        """The rewards, (R,), that the head gives to x (R, C): in float32, as close ones would be
        equal in bfloat16."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.head.weight.to(wide))[:, 0]

    def save_pretrained(self, path):
        """As a LlamaForSequenceClassification or the like with one label, which `transformers`
        loads and, where a text ends in the token that ends replies, gives the same rewards; an
        encoder's config says so, but theirs does not know encoders of this kind."""
        formats.write(Path(path), self.trunk, self.head.weight)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """What save_pretrained wrote, or another's one-label sequence classification model."""
        fields, tensors, files, token_ids = formats.read(Path(path))
        if "score.weight" not in tensors or len(tensors["score.weight"]) != 1:
            raise ValueError(f"{path} holds no reward model: make 08 trains one")
        config = json.loads((Path(path) / "config.json").read_text())
        head = tensors.pop("score.weight")
        if not fields["tie_embeddings"]:  # transformers drops what it has no use for
            tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        trunk = TransformerLM.build(fields, tensors, files, token_ids, path, device, dtype)
        model = cls(trunk, config.get("bidirectional", False))
        model.head.weight.data = head.to(device, dtype)
        return model


@torch.no_grad()
def deepen(trunk, n):
    """Put n blocks on top of a TransformerLM that change nothing yet: what they add begins at 0,
    their attention at all tokens alike (Wu et al. 2024).

    What the last block finds out about a token, such as that this name was among the speakers, it
    is too late for the last token to gather: that takes one block more."""
    config = trunk.config
    for _ in range(n):
        config.windows.append(config.window)
        block = Block(config, config.n_layers).to(trunk.token_embedding.weight)
        block.attention.qkv.weight[: config.n_heads * config.head_dim] = 0  # the queries
        block.attention.out.weight.zero_()
        block.mlp.down.weight.zero_()
        trunk.blocks.append(block)
        config.n_layers += 1


def freeze(model, n_new, frozen):
    """Let nothing of a RewardModel learn but its head, the last norm and the last n_new blocks; or,
    not `frozen`, all of it.

    While the head and new blocks know nothing yet, what comes back from them is noise, and it would
    wear away what the model has learned before they can use it (Kumar et al. 2022)."""
    new = [model.head, model.trunk.norm, *model.trunk.blocks[len(model.trunk.blocks) - n_new :]]
    model.requires_grad_(not frozen)
    for module in new:
        module.requires_grad_(True)


def bradley_terry_loss(chosen, rejected, margin=0.0, label=1.0, centre=0.0):
    """Mean of -log P(chosen is preferred) in nats, a scalar: rewards (P,) of the two replies of
    each pair, P = sigmoid(chosen - rejected - margin) (Bradley and Terry 1952).

    margin, (P,) or a number: by how much the one has to be better. label, (P,) or a number: the
    probability that it is the better one, where that is not sure: then the cross-entropy with it.
    centre: how much of the squared sum of both is added, which keeps rewards around 0: else only
    their differences are known (Eisenstein et al. 2023)."""
    ahead = chosen - rejected - margin
    loss = -(label * F.logsigmoid(ahead) + (1 - label) * F.logsigmoid(-ahead))
    return (loss + centre * (chosen + rejected) ** 2).mean()


def margin_ranking_loss(chosen, rejected, margin=1.0):
    """Mean of max(0, margin - (chosen - rejected)), a scalar: rewards (P,). A pair that is ordered
    by more than the margin, (P,) or a number, teaches nothing more."""
    return (margin - (chosen - rejected)).clamp(min=0).mean()


def preference_loss(model, rows, total, config, device="cpu", replies=None):
    """Sum of the losses of the comparisons in rows of examples, over `total`: the comparisons in
    all micro-batches. config.loss is bradley_terry or margin, which knows no labels and no centre.
    replies: a compiled model.replies."""
    ids, layout, ends, comparisons = collate(rows, device)
    rewards = (replies or model.replies)(ids, layout, ends)  # (R,)
    better, worse = comparisons[:, :2].long().T
    chosen, rejected, (margin, label) = rewards[better], rewards[worse], comparisons[:, 2:].T
    if config.loss == "margin":
        loss = margin_ranking_loss(chosen, rejected, config.margin + margin)
    else:
        loss = bradley_terry_loss(chosen, rejected, margin, label, config.centre)
    return loss * (len(comparisons) / total)


# ---- training


@dataclass
class TrainConfig:
    """How to train; run.py chooses the values for the machine and preset."""

    epochs: float = 1.0  # passes over the pairs
    steps: int | None = None  # optimizer steps, in place of epochs
    tokens_per_step: int = 4096  # batch size, tokens, padding among them
    micro_batch: int | None = None  # rows at once, the rest is accumulated; None: all
    packing: bool = True  # several prompts in a row; without, those of like length together
    shared: bool = True  # the replies to a prompt share it; without, each has it once more
    bidirectional: bool = False  # each token sees the whole text: an encoder
    extra_blocks: int = 0  # blocks put on top of the model, which change nothing at first
    freeze_steps: int = 0  # first steps, in which only these and the head learn
    loss: str = "bradley_terry"  # bradley_terry or margin
    margin: float = 1.0  # how far apart the two rewards have to be, of the margin loss
    centre: float = 0.01  # weight of the squared sum of both rewards, of bradley_terry
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
    eval_examples: int = 100  # held-out prompts, with all of their pairs, in an evaluation
    patience: int = 10  # evaluations without a better loss before it stops early
    seed: int = 1  # of batches and dropout
    compile: bool | None = None  # torch.compile; None: on CUDA

    def __post_init__(self):
        for name in ("tokens_per_step", "eval_every", "eval_examples", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise ValueError("--epochs must be above 0, --steps at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}: it must be at least 1")
        for name, known in (
            ("loss", ("bradley_terry", "margin")), ("optimizer", ("adamw", "muon")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is none of {', '.join(known)}")
        if min(self.centre, self.margin, self.extra_blocks, self.freeze_steps) < 0:
            raise ValueError("--centre, --margin, --extra_blocks, --freeze_steps are not below 0")
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
def score(model, examples, batch_tokens=8192):
    """Rewards of the replies in each of examples, as encode_all gives them: [[float, ...], ...]."""
    model.eval()
    device, found = model.head.weight.device, [[]] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    while order:
        size = max(1, batch_tokens // len(examples[order[0]][0]))
        part, order = order[:size], order[size:]
        ids, layout, ends, _ = collate([[examples[i]] for i in part], device)
        rewards = model.replies(ids, layout, ends)
        for n, i in enumerate(part):
            found[i] = rewards[ends[:, 0] == n].tolist()
    return found


def evaluate(examples, rewards, pairs):
    """The two rewards of each of pairs, [{"pair", "kind", "chosen", "rejected", "lengths"}]:
    encode_all made examples of them, score or likelihoods gives `rewards` of these. lengths are in
    characters."""
    rows = []
    for (_, (_, comparisons)), found in zip(examples, rewards):
        for better, worse, _, _, i in comparisons:
            row = dict(pair=i, kind=pairs[i].get("kind"))
            row |= dict(chosen=found[better], rejected=found[worse])
            rows.append(row | dict(lengths=[len(pairs[i][k]) for k in ("chosen", "rejected")]))
    return sorted(rows, key=lambda row: row["pair"])


@torch.no_grad()
def likelihoods(trunk, examples, batch_tokens=8192):
    """Mean log-probability, nats, of the tokens of each reply in examples that share their prompts,
    [[float, ...], ...]: the judge that needs no training."""
    trunk.eval()
    device, found = trunk.token_embedding.weight.device, []
    size = max(1, batch_tokens // max(len(ids) for ids, _ in examples))
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        ids, layout, _, _ = collate([[example] for example in part], device)
        x = trunk.hidden(ids, layout=layout)  # (B, T, C)
        for i, (_, (branches, _)) in enumerate(part):
            branches, means = torch.tensor(branches, device=device), []
            for branch in range(1, branches.max() + 1):
                places = (branches == branch).nonzero()[:, 0]
                before = places - 1
                before[0] = (branches == 0).sum() - 1  # a reply follows the prompt
                logits = trunk.output(x[i, before]).float()  # (tokens, V)
                chosen = logits.gather(1, ids[i, places][:, None])[:, 0]
                means.append((chosen - logits.logsumexp(1)).mean().item())
            found.append(means)
    return found


# ---- from rewards to what a policy is trained on


class Whitening:
    """Running mean and standard deviation of rewards, over all that it has seen, in Chan's way of
    joining two sets (Chan et al. 1979). `state` is all there is to keep for a resume."""

    def __init__(self, state=(0, 0.0, 0.0)):
        self.state = tuple(state)  # number, mean, sum of squared distances from it

    def __call__(self, rewards):
        """Rewards (B,) less the mean, over the standard deviation, of all so far and these."""
        n, mean, squares = self.state
        m, new = len(rewards), rewards.double().mean().item()
        squares += ((rewards.double() - new) ** 2).sum().item() + (new - mean) ** 2 * n * m / (
            n + m
        )
        self.state = (n + m, mean + (new - mean) * m / (n + m), squares)
        return (rewards - self.state[1]) / (math.sqrt(squares / (n + m)) + 1e-6)


def shape_reward(
    rewards, lengths=None, ended=None, length_penalty=0.0, missing_end_penalty=0.0, clip=None,
    whitening=None, potentials=None, gamma=1.0,
):  # fmt: skip
    """What a policy is trained on in place of rewards (B,), float: in this order whitened (a
    Whitening), clipped to [-clip, clip], less length_penalty for each of `lengths` (B,) tokens,
    less missing_end_penalty where not `ended`, bool (B,).

    With potentials (B, T), a number for the text before each token, the rewards of tokens instead,
    (B, T): of the last one what comes of the above, and of each gamma * potential after it minus
    potential before it, with 0 after the end. Such sums telescope: whatever the policy does, the
    discounted sum changes by minus the first potential, which is that of the prompt alone and the
    same for all of its replies, so the best policy stays the best (Ng, Harada and Russell 1999).
    Penalties change it, that is their use, and so does clipping, where the best reward is beyond.
    `lengths` says where texts end, all tokens after have 0. Raises ValueError for rewards that are
    not finite, for penalties without lengths or ended, for negative ones, and for lengths that are
    not from 1 to T."""
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards are not finite: {rewards.tolist()}")
    if length_penalty < 0 or missing_end_penalty < 0 or (clip is not None and clip <= 0):
        raise ValueError("length_penalty, missing_end_penalty are not below 0, clip is above")
    if (length_penalty or potentials is not None) and lengths is None:
        raise ValueError("length_penalty and potentials need the lengths of the replies")
    if missing_end_penalty and ended is None:
        raise ValueError("missing_end_penalty needs to know which replies have ended")
    if whitening is not None:
        rewards = whitening(rewards)
    if clip is not None:
        rewards = rewards.clamp(-clip, clip)
    if length_penalty:
        rewards = rewards - length_penalty * lengths
    if missing_end_penalty:
        rewards = rewards - missing_end_penalty * (~ended).to(rewards.dtype)
    if potentials is None:
        return rewards
    T = potentials.shape[1]
    if lengths.min() < 1 or lengths.max() > T:
        raise ValueError(f"lengths {lengths.tolist()} are not from 1 to {T}")
    steps = torch.arange(T, device=rewards.device)  # (T,)
    inside, last = steps < lengths[:, None], steps == lengths[:, None] - 1  # (B, T)
    before = torch.where(inside, potentials, 0.0)
    after = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], dim=1)  # 0 at the end
    return gamma * after - before + torch.where(last, rewards[:, None], 0.0)
