"""The ablation: what is learned, in which order, with noise, packed or not; one change at a time.

Parent: none
New: everything

Read in this order: train_quietly, ablate.
"""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import reports
import sft
import torch
from sources import CONTEXT, SMALL, find_model, load_model, read, tested, with_template

import common


@dataclass
class AblateOptions:
    steps: int = 1400  # optimizer steps of each variant
    seeds: int = 1  # runs of each, with seeds 1, 2, ...
    variants: str = "default,all,shuffled,difficulty,neftune,unpacked"  # which, commas between
    test_examples: int = 300  # held-out questions that are answered
    device: str = "auto"  # auto, cpu, cuda or cuda:1


def train_quietly(model, loader, config, device):
    """Train without evaluating or saving; the lines of metrics."""
    lines, home = [], common.OUT / "07_sft" / "ablation"
    run = SimpleNamespace(dir=home, resume=False, log=lambda **line: lines.append(line))
    config.eval_every = 10**9

    def loss_of(rows, total):
        return sft.sft_loss(model, *sft.collate(rows, device, config.neftune > 0), total)

    nothing = dict(val_loss=0.0)
    sft.train(model, loader, loss_of, lambda: nothing, lambda directory: None, config, run, device)
    return lines


def ablate(given):
    """train with one thing changed at a time, for the same steps, and compare"""
    options, how = common.build(AblateOptions, given), dict(SMALL)
    device, _, _ = common.pick_device(options.device)
    changes = {
        "default": {}, "all": dict(learn="all"), "shuffled": dict(curriculum="none"),
        "difficulty": dict(curriculum="difficulty"), "neftune": dict(neftune=5.0),
        "unpacked": dict(packing=False),
    }  # fmt: skip
    wanted = options.variants.split(",")
    if unknown := set(wanted) - set(changes):
        raise ValueError(f"--variants {min(unknown)}: there are {', '.join(changes)}")
    context = CONTEXT["small"]
    examples, held_out, _ = read("plays")
    test, results = tested(held_out, options.test_examples), {}
    for seed in range(1, options.seeds + 1):
        for name in wanted:
            config = sft.TrainConfig(**how | changes[name] | dict(steps=options.steps, seed=seed))
            torch.manual_seed(seed)
            model = load_model(find_model(None), device)
            tokenizer, template, _ = with_template(model, "chatml")
            model.config.context_length = max(model.config.context_length, context)
            encoded, _ = sft.encode_all(examples, tokenizer, template, context, config.learn)
            rank = None
            if config.curriculum == "length":
                rank = [len(ids) for ids, _ in encoded]
            elif config.curriculum == "difficulty":
                rank = sft.difficulty(model, encoded)
            model.noise = config.neftune
            text = (encoded, context, config.tokens_per_step, None, config.packing, rank, seed)
            lines = train_quietly(model, sft.ExampleLoader(*text), config, device)
            seconds = lines[-1]["time"]
            rows = sft.evaluate(model, tokenizer, template, test, 64)
            found = reports.compare(rows, rows)
            row = dict(exact=found[next(iter(found))]["after"]["exact"][0], seconds=seconds)
            row |= dict(bpb=found["all"]["after"]["bpb"][0])
            results.setdefault(name, []).append(row)
            print(
                f"seed {seed}, {name:11} {row['exact']:.3f} exact, {row['bpb']:.3f} bits per byte, "
                f"{seconds:.0f} s",
                flush=True,
            )
    with common.atomic(common.OUT / "07_sft" / "ablation.json", "w") as file:
        json.dump(results, file, indent=1)
    print(f"figures are in {common.OUT / '07_sft' / 'ablation.json'}")
