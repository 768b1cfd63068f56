"""PyTorch's side of `experiments.benchmark peers`: diffusers' UNet2DModel, timed on request.

Runs in an environment of its own, with PyTorch and diffusers and without JAX, so it imports nothing
of this project. `experiments.peers` starts it, writes a request to its standard input, one JSON
object a line, and reads the answer from its standard output; "error" in it says what failed.

A side is how the same model is run:

  eager           as it comes
  channels_last   parameters and activations with the channels innermost
  compiled        by torch.compile, channels innermost

On a GPU, each of them in bfloat16 by autocast where asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(request: dict[str, Any]) -> torch.nn.Module:
    """Returns the model; compiled ones compile when they are first called."""
    torch.manual_seed(0)
    side, model = request["side"], UNet2DModel(**request["fields"]).to(DEVICE)
    if request["remat"]:
        model.enable_gradient_checkpointing()
    if side != "eager":
        model = model.to(memory_format=torch.channels_last)
    return torch.compile(model) if side == "compiled" else model


def make_forward(request: dict[str, Any]) -> Callable[[], Any]:
    """Returns a call of the network."""
    model = make_model(request).eval()
    x, t = images(request), torch.full((request["batch_size"],), 500, device=DEVICE)

    @torch.inference_mode()
    def call() -> None:
        with precision(request):
            model(x, t)

    return call


def make_train_step(request: dict[str, Any]) -> Callable[[], Any]:
    """Returns a train step: noise, the eps-loss, Adam and a moving average of the parameters."""
    model = make_model(request).train()
    parameters = list(model.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=True)
    schedule = DDPMScheduler(num_train_timesteps=1000)
    x = images(request)

    def step() -> None:
        t = torch.randint(0, 1000, (len(x),), device=DEVICE)
        noise = torch.randn_like(x)
        with precision(request):
            predicted = model(schedule.add_noise(x, noise, t), t).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1e-4)

    return step


def make_sample(request: dict[str, Any]) -> Callable[[], Any]:
    """Returns diffusers' own DDIM pipeline, drawing a batch."""
    model = make_model(request).eval()
    pipeline = DDIMPipeline(unet=model, scheduler=DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> None:
        with precision(request):
            pipeline(
                batch_size=request["batch_size"],
                num_inference_steps=request["steps"],
                output_type="np",
            )

    return draw


MAKE = {"forward": make_forward, "train": make_train_step, "sample": make_sample}


def images(request: dict[str, Any]) -> torch.Tensor:
    """Returns a batch of noise, laid out as the side wants it."""
    channels, size = request["fields"]["in_channels"], request["fields"]["sample_size"]
    x = torch.randn(request["batch_size"], channels, size, size, device=DEVICE)
    return x if request["side"] == "eager" else x.to(memory_format=torch.channels_last)


def precision(request: dict[str, Any]) -> contextlib.AbstractContextManager:
    """Returns what the network is to be called under."""
    if request["dtype"] == "float32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE.type, getattr(torch, request["dtype"]))


@functools.lru_cache(maxsize=4)
def prepared(text: str) -> tuple[Callable[[], Any], float]:
    """Returns a program that is compiled and has run, and how long it took to get there."""
    request = json.loads(text)
    start = time.perf_counter()
    call = MAKE[request["program"]](request)
    for _ in range(1 if request["program"] == "sample" else 2):  # of many calls of the network
        call()
    wait()
    return call, time.perf_counter() - start


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Returns what was asked for: the time of one or more calls, memory, or what this is."""
    if request["what"] == "about":
        model = UNet2DModel(**request["fields"])
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "threads": torch.get_num_threads(),
            "device": DEVICE.type,
        }
    if request["what"] == "memory":
        return {"bytes": peak_memory(request["of"])}
    call, ready = prepared(json.dumps(request["of"], sort_keys=True))
    start = time.perf_counter()
    for _ in range(request["times"]):
        call()
    wait()
    return {"seconds": (time.perf_counter() - start) / request["times"], "ready_s": ready}


def peak_memory(request: dict[str, Any]) -> int:
    """Returns the most memory that a program takes, above what the process had before it.

    On CPU of calls after the first two, as jaxdiff's is measured (`experiments.fresh`).
    """
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prepared(json.dumps(request, sort_keys=True))
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    call, _ = prepared(json.dumps(request, sort_keys=True))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(2):
        call()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Returns a field of Linux's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


def wait() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Answers requests until there are no more."""
    # Answers go where nothing else can write: libraries print to standard output.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # the other side is to be told, whatever it is
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
