"""What is wanted: rewards that are plain functions of a prompt and a completion, or a reward model.

What it teaches: where an answer can be checked, no model of preferences is needed, and a policy
learns what is rewarded, not what was meant: each function here is short enough to see how it could
be cheated.

Parent: 08_reward/reward.py (RewardModel)
New: question, sums, final_number, last_number, gsm8k, syllables, spoken, metre, stop_in_time,
    each, of_model, version, named
Changed: RewardModel

GSM8K: Cobbe et al. 2021, arXiv 2110.14168.

Read in this order: sums, gsm8k, metre, stop_in_time; each; RewardModel and of_model; named.
"""

import importlib.util
import json
import math
import re
from hashlib import sha256
from pathlib import Path

import begin
import exchange
import torch
import turns
from policy import Layout, TransformerLM
from torch import nn
from torch.nn import functional as F

import common


def question(prompt):
    """What is asked: a prompt is a str, or messages where the conversation has several."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def sums(prompt, completion):
    """1.0 where the completion is the sum of the prompt's last two numbers and nothing else."""
    a, b = re.findall(r"\d+", question(prompt))[-2:]
    return float(completion.strip() == str(int(a) + int(b)))


def final_number(text):
    """The last number after the last ####, or of all the text where there is no ####, as a float;
    None without one.

    "so 3 + 4 = 7 #### 1,234" -> 1234.0"""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def last_number(prompt, completion):
    """As sums, for a model that answers in sentences: 1.0 where the last number is the sum."""
    a, b = re.findall(r"\d+", question(prompt))[-2:]
    return float(final_number(completion) == int(a) + int(b))


def gsm8k(answers):
    """A reward for questions with worked answers, {question: "... #### number"}: 1.0 where the
    completion's final number is the answer's. ValueError for an answer without a number."""
    known = {asked: final_number(answer) for asked, answer in answers.items()}
    if none := [asked for asked, number in known.items() if number is None]:
        raise ValueError(f"there is no number in the answer to {none[0]!r}")

    def reward(prompt, completion):
        return float(final_number(completion) == known[question(prompt)])

    return reward


def syllables(word):
    """How many syllables an English word has, by rule: its groups of vowels, less an e that is not
    heard. About one word in ten is wrong (fire, heaven).

    "time" -> 1, "table" -> 2, "loved" -> 1, "wanted" -> 2, "valiant" -> 3, "loves" -> 1"""
    word = re.sub(r"[^a-z]", "", word.lower())
    n = len(re.findall(r"[aeiouy]+", word))
    n += len(re.findall(r"(?<![ct])i[aou](?!u)|[aeo]ing$", word))  # vowels with a break between
    if re.search(r"[^aeiouylr]e$|[aeiouy][lr]e$|[^aeiouytd]ed$|[^aeiouysxzhgc]es$", word):
        n -= 1
    return max(n, 1 if word else 0)


def spoken(completion):
    """The lines of a completion that are spoken: not empty, and not a speaker's name."""
    lines = [line.strip() for line in completion.split("\n")]
    return [line for line in lines if re.search(r"[A-Za-z]", line) and not line.endswith(":")]


def metre(prompt, completion):
    """How near its lines are to ten syllables: the mean over lines of 1 at ten, 0.75 at nine and
    eleven, ... 0 at six and fourteen; 0.0 where nothing is spoken."""
    found = []
    for line in spoken(completion):
        n = sum(map(syllables, re.split(r"[\s\u2014-]+", line)))
        found.append(max(0.0, 1 - abs(n - 10) / 4))
    return sum(found) / len(found) if found else 0.0


def stop_in_time(prompt, completion, words=12):
    """1.0 for a completion of at most `words` words, at least one, that ends as a sentence does."""
    n = len(completion.split())
    return float(1 <= n <= words and completion.rstrip()[-1] in ".!?")


# ---- judges


def each(reward):
    """A judge of a function (prompt, completion) -> float. A judge takes lists of prompts and of
    completions and gives (rewards, float32 (B,), NaN where there is none; a line for each of these
    that names prompt, completion and reason)."""

    def judge(prompts, completions):
        found, failures = [], []
        for prompt, completion in zip(prompts, completions):
            try:
                value = float(reward(prompt, completion))
                why = "" if math.isfinite(value) else f"it gave {value}"
            except Exception as error:  # a user's function can raise anything
                value, why = math.nan, f"it raised {error!r}"
            if why:
                value = math.nan
                failures.append(f"{why} for prompt {prompt!r}, completion {completion!r}")
            found.append(value)
        return torch.tensor(found), failures

    return judge


class RewardModel(nn.Module):
    """What 08 trains: a TransformerLM's vector at the last real token times a head's weights.
    `model(ids, lengths)`: rewards, float (B,), of ids (B, T) padded on the right, lengths (B,)."""

    def __init__(self, trunk, bidirectional=False):
        super().__init__()
        self.trunk, self.config = trunk, trunk.config
        trunk.causal = not bidirectional
        self.head = nn.Linear(trunk.config.d_model, 1, bias=False)

    def forward(self, ids, lengths):
        rows, layout = torch.arange(len(ids), device=ids.device), None
        if not self.trunk.causal:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            documents = torch.where(positions < lengths[:, None], 0, -1)
            layout = Layout(positions, documents, torch.zeros_like(ids))
        x = self.trunk.hidden(ids, layout=layout)[rows, lengths - 1]  # (B, C)
        return F.linear(x.float(), self.head.weight.float())[:, 0]

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """What 08 saved, or another's one-label sequence classification model."""
        fields, tensors, files, token_ids = exchange.read(Path(path))
        if "score.weight" not in tensors or len(tensors["score.weight"]) != 1:
            raise ValueError(f"{path} holds no reward model: make 08 trains one")
        config = json.loads((Path(path) / "config.json").read_text())
        head = tensors.pop("score.weight")
        if not fields["tie_embeddings"]:  # transformers drops what it has no use for
            tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        trunk = TransformerLM.build(fields, tensors, files, token_ids, path, device, dtype)
        model = cls(trunk, config.get("bidirectional", False))
        model.head.weight.data = head.to(device, dtype)
        return model.eval().requires_grad_(False)


def of_model(path, device="cpu", batch_size=64):
    """A judge (see each) that is a reward model of 08, in its own tokens and its own template. A
    prompt that does not fit loses its first tokens; a completion that does not has no reward."""
    model = RewardModel.from_pretrained(path, device)
    tokenizer, template = common.Tokenizer(path), turns.choose("own", path)
    most = model.config.context_length

    @torch.no_grad()
    def judge(prompts, completions):
        texts, failures = [], []
        for prompt, completion in zip(prompts, completions):
            asked = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
            said = [*asked, dict(role="assistant", content=completion)]
            reply = turns.encode_reply(said, tokenizer, template)
            if room := max(0, most - len(reply)):
                texts.append(turns.encode_prompt(asked, tokenizer, template)[-room:] + reply)
            else:
                texts.append([])
                failures.append(f"it does not fit into {most} tokens: completion {completion!r}")
        rewards = torch.full((len(texts),), math.nan)
        order = sorted((i for i, ids in enumerate(texts) if ids), key=lambda i: len(texts[i]))
        for part in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            lengths = torch.tensor([len(texts[i]) for i in part], device=device)
            ids = torch.zeros(len(part), int(lengths.max()), dtype=torch.int64, device=device)
            for row, i in enumerate(part):
                ids[row, : len(texts[i])] = torch.tensor(texts[i])
            with torch.autocast(torch.device(device).type, enabled=False):  # close ones differ
                rewards[part] = model(ids, lengths).cpu()
        return rewards, failures

    return judge


def version(name):
    """What tells a reward from one that had this name before: the text of a function's file, a
    model's files; of the others their name."""
    path = Path(name.rpartition(":")[0] if ".py:" in name else name)
    if ".py:" in name:
        return sha256(path.read_bytes()).hexdigest()[:8]
    home = common.OUT / "08_reward" / "latest" if name == "model" else path
    return begin.version(home) if home.is_dir() else name


def named(name, answers=None, device="cpu"):
    """The judge called `name`: sums, last_number, metre, stop_in_time, gsm8k (with answers), model
    (08's newest), a directory of a reward model, or file.py:function. ValueError for others."""
    known = dict(sums=sums, last_number=last_number, metre=metre, stop_in_time=stop_in_time)
    if name in known:
        return each(known[name])
    if name == "gsm8k":
        if not answers:
            raise ValueError("--reward gsm8k needs --data with question and answer in each record")
        return each(gsm8k(answers))
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        try:
            spec = importlib.util.spec_from_file_location("own_reward", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return each(getattr(module, function))
        except Exception as error:  # a user's file can raise anything
            raise ValueError(f"--reward {name} cannot be loaded: {error!r}") from None
    home = common.OUT / "08_reward" / "latest" if name == "model" else Path(name)
    if not (home / "config.json").exists():
        raise ValueError(
            f"--reward {name}: none of {', '.join(known)}, gsm8k and file.py:function, and "
            f"{home} holds no reward model (make 08 trains one)"
        )
    return of_model(home, device)
