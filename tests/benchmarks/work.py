"""The work that each contender does, and how they take turns. Runs in both virtual environments."""

import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, TrainerCallback


PAD, EOS = 0, 1
TARGETS = {  # attention and MLP
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Work:
    """One PPO update of a model with random weights: its shape, and how many tokens go how often through it.

    With `key_heads` the model is a Llama, whose keys and values have so many heads and whose MLP is `inner` wide; else it
    is a GPT-2.
    """

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    key_heads: int = 0
    inner: int = 0
    vocabulary: int = 50_257
    batch: int = 8
    prompt: int = 64
    completion: int = 64
    epochs: int = 4
    minibatches: int = 1
    top: int = 4  # layers that `spine_top` adapts
    rank: int = 16

    def config(self, dtype: str, device: str = "cpu", **options) -> PreTrainedConfig:
        options |= {"vocab_size": self.vocabulary, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
        # On a CPU torch's fused attention in bfloat16 is slower than the product of matrices: NOTES.md.
        options["attn_implementation"] = "eager" if dtype == "bf16" and device == "cpu" else "sdpa"
        positions = max(self.prompt + self.completion, 1024)
        if not self.key_heads:
            return GPT2Config(
                n_layer=self.layers, n_embd=self.hidden, n_head=self.heads, n_positions=positions, **options
            )
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            **options,
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word for each token: `w5` is token 5."""
        words = {"[pad]": PAD, "[eos]": EOS} | {f"w{i}": i for i in range(2, self.vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "[pad]", "eos_token": "[eos]"}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)

    def prompts(self, updates: int = 16) -> Dataset:
        """Prompts of the one length, as text and as tokens."""
        rows = torch.randint(2, self.vocabulary, (updates * self.batch, self.prompt)).tolist()
        return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows], "input_ids": rows})

    def lora(self, top: int | None) -> dict:
        """Options of peft's LoraConfig on all layers, or on the top so many."""
        layers = list(range(self.layers))[-top:] if top else None
        return {
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "target_modules": TARGETS["llama" if self.key_heads else "gpt2"],
            "fan_in_fan_out": not self.key_heads,  # GPT-2 keeps its weights transposed
            "layers_to_transform": layers,
            "layers_pattern": ("layers" if self.key_heads else "h") if top else None,
        }


def now() -> float:
    """Seconds, once a GPU has done all that it was told to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds of one update: generation, scoring and training."""

    def restart(self) -> None:
        self.began, self.generation, self.training_began = now(), 0.0, None

    @contextmanager
    def generating(self) -> Iterator[None]:
        began = now()
        yield
        self.generation += now() - began

    def training_begins(self) -> None:
        self.training_began = self.training_began or now()

    def read(self) -> dict[str, float]:
        ended = now()
        training = ended - self.training_began
        seconds = ended - self.began
        return {
            "seconds": seconds,
            "generation": self.generation,
            "scoring": seconds - self.generation - training,
            "training": training,
        }


class Turns(TrainerCallback):
    """Holds a trainer before each update until a line comes on stdin, and writes on `out` what the update took.

    Between turns free memory goes back to the system, so that those who wait take no more than they must.
    """

    def __init__(self, work: Work, clock: Clock, steps: int, out):
        self.work, self.clock, self.steps, self.out = work, clock, steps, out
        self.completion_tokens = 0  # of this update, counted where they are sampled
        self.state_bytes: Callable[[], int] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if (args.device.type == "cpu") != args.use_cpu:
            raise RuntimeError(f"this process is on {args.device}: torch {torch.__version__} finds no GPU.")
        self._wait()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        measured = self.clock.read()
        expected = self.work.batch * self.work.completion
        if self.completion_tokens != expected:
            raise RuntimeError(f"{self.completion_tokens} completion tokens were sampled instead of {expected}.")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        measured |= {"peak_rss_gb": peak / 1e9, "state_bytes": self.state_bytes()}
        if torch.cuda.is_initialized():
            measured["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._tell(measured)
        self._wait()

    def _tell(self, answer: dict) -> None:
        print(json.dumps(answer), file=self.out, flush=True)

    def _wait(self) -> None:
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        if not sys.stdin.readline():
            os._exit(0)  # the driver has gone on; there is nothing to save
        self.completion_tokens = 0
        self.clock.restart()


def state_bytes(trained: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that live from update to update: every live parameter once, a gradient for each that is trained, and the
    optimizer's state."""
    gc.collect()  # what is dead is not counted
    # By type: `isinstance` would ask proxies and deprecated objects, which warn.
    found = [p for p in gc.get_objects() if issubclass(type(p), nn.Parameter) and not p.is_meta]
    parameters = {p.data_ptr(): p.nbytes for p in found}
    gradients = {p.data_ptr(): p.nbytes for p in trained.parameters() if p.requires_grad}
    moments = [x.nbytes for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return sum(parameters.values()) + sum(gradients.values()) + sum(moments)


def arguments() -> tuple[Work, dict, object]:
    """The work and the contender's options from the command line, and a stream that is the driver's alone: whatever
    libraries print goes to stderr."""
    given = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return Work(**given["work"]), given["options"], out


def command(python: str, module: str, work: Work, options: dict) -> list[str]:
    """The command line that `arguments` reads."""
    return [python, "-m", module, json.dumps({"work": asdict(work), "options": options})]
