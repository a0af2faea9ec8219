"""Seconds of scoring with an ensemble beside those of one of its members: the layers below all adapters run once.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.ensemble

The model is GPT-2 124M with random weights, the adapters are in its top layers. Both score the same rows in turn, and the
ratio is that of the medians.
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from pipeline.backbone.loading import fuse_gelu
from pipeline.backbone.roles import Backbone
from tests.benchmarks.spine_contender import reward_adapter
from tests.benchmarks.work import Work


def make(work: Work, top: int, members: int) -> tuple[Backbone, list[str]]:
    """A backbone with reward roles that adapt the top so many layers."""
    torch.manual_seed(0)
    base = fuse_gelu(AutoModelForCausalLM.from_config(work.config("fp32"))).requires_grad_(False)
    backbone = Backbone(base, LoraConfig(task_type="CAUSAL_LM", **work.lora(top)))
    roles = [f"reward_{number}" for number in range(1, members + 1)]
    for role in roles:
        backbone.add_role(role, reward_adapter(work, backbone, top))
    return backbone.eval(), roles


@torch.no_grad()
def measure(work: Work, top: int, members: int, rounds: int) -> dict:
    """Seconds of one member and of all of them, in turn, on the same rows."""
    backbone, roles = make(work, top, members)
    ids = torch.randint(2, work.vocabulary, (work.batch, work.prompt + work.completion))
    mask = torch.ones_like(ids)
    passes = {
        "one": lambda: backbone.scores(ids, mask, roles[0]),
        "all": lambda: backbone.member_scores(ids, mask, roles),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):  # the first round warms up
        for name, run in passes.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"members": members, "top": top, "seconds": medians, "ratio": medians["all"] / medians["one"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("members", 5), ("top", 2), ("batch", 8), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    print(json.dumps(measure(Work(batch=given.batch), given.top, given.members, given.rounds), indent=2))


if __name__ == "__main__":
    main()
