"""What a training run tells beside metrics.jsonl: TensorBoard, Weights & Biases, a trace, layers.

What it teaches: where to look when a run is slow (the trace) or about to fail (norms by layer).

Parent: none
New: everything
"""

import json
import resource

import torch
from torch.distributed.tensor import DTensor


def writers(directory, settings, tensorboard, wandb):
    """Functions that take a line of metrics, for the trackers that are wanted. They import their
    package only here, and go on where an earlier run of the directory ended."""
    found = []
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(directory / "tensorboard"))

        def write(line):
            for key, value in line.items():
                if value is not None:
                    board.add_scalar(key, value, line["step"])
            board.flush()

        found.append(write)
    if wandb:
        import wandb as tracker

        name = directory.name
        settings = dict(dir=directory, name=name, id=name, resume="allow", config=settings)
        run = tracker.init(project="llm-from-nothing", **settings)
        found.append(lambda line: run.log(line, step=line["step"]))
    return found


def memory(device):
    """Largest memory so far in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Trace:
    """begin(), then end(path): the steps between as a file for chrome://tracing or perfetto.dev;
    prints the ten heaviest operators."""

    def begin(self):
        self.profiler = torch.profiler.profile()
        self.profiler.start()

    def end(self, path, device):
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(path))
        kind = "device" if device.type == "cuda" else "cpu"
        seen = self.profiler.key_averages()
        print(seen.table(sort_by=f"self_{kind}_time_total", row_limit=10, max_name_column_width=40))


def layer_norms(model, ids):
    """{"gradient": {name: 2-norm}, "weight": {name: 2-norm}, "activation": [root mean square of
    each block's output on ids, a batch]}. With sharded parameters every rank calls it."""
    row, hooks = dict(gradient={}, weight={}, activation=[]), []
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
    return row


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
