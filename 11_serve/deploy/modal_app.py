"""Serves on one of Modal's GPUs: the page, the API and the dashboard, with out/ on a volume.

    pip install modal && modal setup
    modal secret create llm API_KEY=...     # at least 16 characters
    modal volume create llm-out
    modal volume put llm-out out/05_scaling/RUN /05_scaling/RUN
    modal deploy 11_serve/deploy/modal_app.py

The last prints the address. GPU=A10 before it takes another kind than an L4, and
FLAGS="--model smollm2" before it gives the server flags. 20 minutes after the last request the
container goes, and with it a training run that was started from the page (an open page keeps
both): for long runs there is 05_scaling/launch/modal_app.py, with --store here to watch it.
"""

import os
import shlex
import subprocess
from pathlib import Path

import modal

GPU = os.environ.get("GPU", "L4")
FLAGS = os.environ.get("FLAGS", "")
PORT = 8000
# In the container, where Modal imports this file again, the repository is where it was copied to.
ROOT = Path(__file__).resolve().parents[2] if modal.is_local() else Path("/root/llm")
LEFT_OUT = [".*", "**/.*", "out", "build", "**/__pycache__", "**/node_modules", "*.egg-info"]

app = modal.App("llm-from-nothing-serve")
volume = modal.Volume.from_name("llm-out", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("gcc", "libc6-dev")  # torch.compile, in training, needs a C compiler
    .pip_install_from_requirements(str(ROOT / "requirements.txt"))
    .pip_install_from_requirements(str(ROOT / "requirements-serve.txt"))
    .pip_install_from_requirements(str(ROOT / "requirements-data.txt"), extra_options="--no-deps")
    .env({"OUT": "/out", "PYTHONPATH": "/root/llm", "GPU": GPU, "FLAGS": FLAGS})
    .add_local_dir(str(ROOT), "/root/llm", ignore=LEFT_OUT)
)


def command(flags):
    """The server's command. Modal's proxy needs 0.0.0.0, and for that the server needs API_KEY."""
    serve = ["python", "11_serve/run.py", "serve", "--host", "0.0.0.0", "--port", str(PORT)]
    return serve + shlex.split(flags)


@app.function(
    image=image,
    gpu=GPU,
    volumes={"/out": volume},  # Modal commits what is written every few seconds and at the end
    secrets=[modal.Secret.from_name("llm")],
    max_containers=1,  # two would overwrite each other's files on the volume
    scaledown_window=20 * 60,
    timeout=24 * 3600,  # of a request: the dashboard's WebSockets stay open
)
@modal.concurrent(max_inputs=256)  # the server's own --max_connections
@modal.web_server(PORT, startup_timeout=600)
def serve():
    if not os.environ.get("API_KEY"):  # told at once, where the server's end would be waited out
        raise RuntimeError("the secret llm holds no API_KEY")
    subprocess.Popen(command(FLAGS), cwd="/root/llm")
