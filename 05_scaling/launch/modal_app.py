"""Trains on Modal's GPUs, and goes on by itself after a preemption, an error or 24 hours.

    pip install modal && modal setup
    modal secret create s3 AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_REGION=us-east-1
    modal run --detach 05_scaling/launch/modal_app.py \
        --preset gpt2-124m --tokens s3://my-bucket/tokens --store s3://my-bucket/run1

GPU=A100-80GB:1 before the command takes another kind and number than 8 H100. The secret may hold
AWS_ENDPOINT_URL, too, for another S3 than Amazon's. Checkpoints must be on S3: a container's disk
goes with it.
"""

import os
import subprocess
from pathlib import Path

import modal

GPU = os.environ.get("GPU", "H100:8")
HOURS = 24  # the most that Modal lets a call run
# In the container, where Modal imports this file again, the repository is where it was copied to.
ROOT = Path(__file__).resolve().parents[2] if modal.is_local() else Path("/root/llm")
LEFT_OUT = [".git", ".venv", "out", "**/__pycache__", ".hypothesis", ".pytest_cache"]

app = modal.App("llm-from-nothing")
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("gcc", "libc6-dev")  # torch.compile needs a C compiler
    .pip_install_from_requirements(str(ROOT / "requirements.txt"))
    .pip_install_from_requirements(str(ROOT / "requirements-data.txt"), extra_options="--no-deps")
    .env({"PYTHONPATH": "/root/llm", "OMP_NUM_THREADS": "8", "GPU": GPU})
    .env({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"})
    .add_local_dir(str(ROOT), "/root/llm", ignore=LEFT_OUT)
)


def command(preset, tokens, store, parallel, gpus):
    """The training command, one rank for each GPU."""
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", gpus]
    flags = ["--preset", preset, "--tokens", tokens, "--store", store, "--parallel", parallel]
    return torchrun + ["05_scaling/run.py", "train"] + flags


@app.function(
    image=image,
    gpu=GPU,
    timeout=HOURS * 3600,
    retries=modal.Retries(max_retries=10, initial_delay=10.0, backoff_coefficient=1.0),
    secrets=[modal.Secret.from_name("s3")],
)
def train(preset, tokens, store, parallel):
    gpus = GPU.partition(":")[2] or "1"
    run = subprocess.Popen(command(preset, tokens, store, parallel, gpus), cwd="/root/llm")
    try:
        code = run.wait(HOURS * 3600 - 300)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # the limit; Modal's sign of preemption
        run.terminate()  # saves
        run.wait()
        raise RuntimeError("stopped and saved: the next attempt goes on from there") from None
    if code:
        raise RuntimeError(f"training ended with code {code}")


@app.local_entrypoint()
def main(preset: str = "gpt2-124m", tokens: str = "", store: str = "", parallel: str = "ddp"):
    if not store.startswith("s3://") or not tokens.startswith("s3://"):
        raise SystemExit("--tokens and --store are s3:// URLs: the container's disk does not stay")
    train.remote(preset, tokens, store, parallel)
