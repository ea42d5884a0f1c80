"""The command classify: train a classifier, and set it beside TF-IDF and the commonest class.

Parent: none
New: everything

Read in this order: classify, baselines.
"""

import json
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import forms
import numpy as np
import reports
import scores
import sft
import torch
from sources import begin_run, find_model, load_model, record, version, write_files

import common

HERE = Path(__file__).resolve().parent


@dataclass
class ClassifyOptions:
    data: str = "plays"  # plays, a .csv or .jsonl of text and label, or a directory like IMDb's
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 05 and 04
    max_length: int = 128  # tokens of a text that are read, the first ones
    epochs: float = 3.0  # passes over the texts
    tokens_per_step: int = 2048  # batch size, tokens, padding among them
    max_lr: float = 1e-3  # learning rate after the warm-up
    eval_every: int = 50  # steps between evaluations and checkpoints
    seed: int = 1  # of the head and of batches
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "classify"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


def classify(given):
    """train a classifier, beside TF-IDF with logistic regression and the commonest class"""
    options = common.build(ClassifyOptions, given)
    how = common.build(sft.TrainConfig, asdict(options))
    device, dtype, reason = common.pick_device(options.device)
    path = find_model(options.model)
    train_texts, test_texts = forms.read_labelled(options.data)
    labels = sorted({label for _, label in train_texts})
    if len(labels) < 2:
        raise ValueError(f"--data {options.data} has only the label {labels[0]!r}: two are needed")
    if unknown := {label for _, label in test_texts} - set(labels):
        raise ValueError(f"the label {min(unknown)!r} is in the held-out part only")
    torch.manual_seed(how.seed)
    trunk = load_model(path, device)
    files = write_files(trunk.tokenizer_files)
    tokenizer = common.Tokenizer(files if "tokenizer.json" in trunk.tokenizer_files else None)
    most = min(options.max_length, trunk.config.context_length)

    def encode(texts):
        bar = common.progress(total=len(texts), desc="tokenizing")
        found = []
        for text, label in texts:
            ids = tokenizer.encode(text, special=False)[:most] or [tokenizer.eot or 0]
            found.append((ids, [labels.index(label)]))
            bar.update()
        bar.close()
        return found

    kept = max(1, min(500, len(train_texts) // 10))  # of the training part, to choose a checkpoint
    learned, seen = forms.split(train_texts, kept)
    examples, seen, test = encode(learned), encode(seen), encode(test_texts)
    classifier = sft.Classifier(trunk, labels).to(device)
    loader = sft.ExampleLoader(
        examples, most, how.tokens_per_step, how.micro_batch, False, None, how.seed, lambda e: 1
    )
    per_epoch = len(loader.epoch(0))
    how.steps = how.steps or max(1, round(how.epochs * per_epoch))
    plan = asdict(how) | dict(model=version(path), max_length=most, device=device.type)
    plan |= dict(texts=sha256(json.dumps([examples, test, labels]).encode()).hexdigest()[:8])
    plan |= dict(code=sha256((HERE / "transformer.py").read_bytes()).hexdigest()[:8])
    run = begin_run("latest-classifier", sft.__file__, plan, options.run, options.fresh)
    print(
        f"data: {options.data}, {len(examples):,} texts of {len(labels)} classes, {len(test):,} "
        f"held out; the first {most} tokens of each"
    )
    print(f"model: {path or 'random'}; device: {device} ({reason}); {how.steps:,} steps")
    print(f"run: {run.dir}" + (" (going on)" if run.resume else ""), flush=True)
    gold = [label for _, (label,) in test]
    texts = [ids for ids, _ in test]

    def validate():
        rows = [[example] for example in seen]
        nats = sum(
            sft.classifier_loss(classifier, rows[i : i + 64], len(rows), device).item()
            for i in range(0, len(rows), 64)
        )
        return dict(val_loss=nats)

    def loss_of(rows, total):
        return sft.classifier_loss(classifier, rows, total, device)

    bar = common.progress(total=how.steps, desc="step")
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        bar.set_postfix_str(f"loss {line['train_loss']:.3f}", False)
        bar.update(line["step"] - bar.n)
        if line["val_loss"] is not None:
            say(
                f"step {line['step']:,}: training {line['train_loss']:.3f}, held out "
                f"{line['val_loss']:.3f} nats"
            )

    try:
        if not run.result:
            validating = torch.no_grad()(validate)
            sft.train(
                classifier, loader, loss_of, validating, classifier.save_pretrained, how, run,
                device, dtype, on_step=on_step,
            )  # fmt: skip
    finally:
        bar.close()
    common.plot_loss(run.dir)
    classifier = sft.Classifier.from_pretrained(run.dir, device)
    found = dict(ours=sft.classify(classifier, texts)) | baselines(train_texts, test_texts, labels)
    result = dict(preset="classify", data=options.data, steps=how.steps)
    for name, picks in found.items():
        table = scores.confusion(gold, picks, len(labels))
        accuracy, f1 = scores.accuracy_and_f1(table)
        _, low, high = scores.interval([float(a == b) for a, b in zip(gold, picks)])
        print(
            f"{name:12} accuracy {accuracy:.3f} (95%: {low:.3f} to {high:.3f}), macro-F1 {f1:.3f}"
        )
        result |= {f"accuracy_{name}": round(accuracy, 4), f"f1_{name}": round(f1, 4)}
        if name == "ours":
            title = f"accuracy {accuracy:.3f}, macro-F1 {f1:.3f}"
            reports.plot_confusion(table, labels, title, run.dir / "confusion.png")
    best = max(found, key=lambda name: result[f"accuracy_{name}"])
    print(f"the best by accuracy: {best}; confusion.png, loss.png and the model are in {run.dir}")
    run.finish(result)
    if options.record:
        record(result, device)


def baselines(train_texts, test_texts, labels):
    """{name: class of each held-out text}: the commonest class, and TF-IDF of words and pairs of
    words with logistic regression."""
    gold = [labels.index(label) for _, label in train_texts]
    found = dict(majority=[int(np.bincount(gold).argmax())] * len(test_texts))
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        print("TF-IDF is left out: pip install scikit-learn")
        return found
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    x = vectorizer.fit_transform(text for text, _ in train_texts)
    regression = LogisticRegression(C=10, max_iter=1000).fit(x, gold)
    picks = regression.predict(vectorizer.transform(text for text, _ in test_texts))
    return found | dict(tfidf=picks.tolist())
