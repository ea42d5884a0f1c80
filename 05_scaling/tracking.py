"""What a training run tells beside metrics.jsonl: TensorBoard, Weights & Biases, a trace, layers.

What it teaches: where to look when a run is slow (the trace) or about to fail (norms by layer).

Parent: none
New: everything
"""

import json
import resource
from dataclasses import asdict

import torch
from torch.distributed.tensor import DTensor


def writers(run, config, model_config, on_step=None):
    """Functions that take a line of metrics: run.log, on_step, and the trackers that `config`
    wants, which import their package only here and go on where the run was stopped."""
    directory, found = run.dir, [lambda line: run.log(**line)] + [on_step] * bool(on_step)
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(directory / "tensorboard"))

        def write(line):
            for key, value in line.items():
                if value is not None:
                    board.add_scalar(key, value, line["step"])
            board.flush()

        found.append(write)
    if config.wandb:
        import wandb

        settings = dict(config=asdict(config) | asdict(model_config), dir=directory)
        settings |= dict(name=directory.name, id=directory.name, resume="allow")
        tracked = wandb.init(project="llm-from-nothing", **settings)
        found.append(lambda line: tracked.log(line, step=line["step"]))
    return found


def memory(device):
    """Largest memory so far in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Trace:
    """Of three steps after step `first`, if that is above 0: a file for chrome://tracing or
    perfetto.dev, and the ten heaviest operators printed. before(step) is called before each."""

    def __init__(self, first, path, device):
        self.first, self.path, self.device, self.profiler = first, path, device, None

    def before(self, step):
        if self.first and step == self.first:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler and step == self.first + 3:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path))
            kind = "device" if self.device.type == "cuda" else "cpu"
            how = dict(sort_by=f"self_{kind}_time_total", row_limit=10, max_name_column_width=40)
            print(self.profiler.key_averages().table(**how))


def layer_norms(model, ids, step, path):
    """Append to the file `path`, if that is not None: {"step", "gradient": {name: 2-norm},
    "weight": {name: 2-norm}, "activation": [root mean square of each block's output on ids, a
    batch]}. With sharded parameters every rank calls it."""
    row, hooks = dict(step=step, gradient={}, weight={}, activation=[]), []
    for name, p in model.named_parameters():
        for key, x in (("gradient", p.grad), ("weight", p.detach())):
            norm = x.norm()
            row[key][name] = (norm.full_tensor() if isinstance(x, DTensor) else norm).item()

    def record(module, inputs, output):
        row["activation"].append(output.float().square().mean().sqrt().item())

    for block in model.blocks:
        hooks.append(block.register_forward_hook(record))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def plot_layers(path):
    """layers.png beside layers.jsonl: gradient norms and activations by layer, over the run."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in open(path)]
    left, right = (figure := Figure(figsize=(11, 4.5))).subplots(1, 2)
    steps, blocks = [row["step"] for row in rows], len(rows[0]["activation"])
    for i in range(blocks):
        shade = (0.1, 0.3 + 0.5 * i / blocks, 0.9 - 0.7 * i / blocks)
        norms = [
            sum(v**2 for k, v in row["gradient"].items() if k.startswith(f"blocks.{i}.")) ** 0.5
            for row in rows
        ]
        left.plot(steps, norms, color=shade, label=f"block {i}")
        right.plot(steps, [row["activation"][i] for row in rows], color=shade, label=f"block {i}")
    left.plot(
        steps, [row["gradient"]["token_embedding.weight"] for row in rows], "k:", label="embedding"
    )
    left.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    right.set(xlabel="step", ylabel="root mean square of a block's output")
    left.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")
