"""Merge a trained policy into its base, and sample from it with plain transformers.

    python examples/merge_and_generate.py

It reads the policy that `make demo` leaves in runs/demo/ppo, and writes runs/merged, a model folder as transformers, vLLM
and the hub know it.
"""

import sys

from transformers import pipeline as transformers_pipeline
from transformers import set_seed

from pipeline import merge


adapter, folder = sys.argv[1:] or ("runs/demo/ppo", "runs/merged")
merge.main([adapter, folder])

generate = transformers_pipeline("text-generation", model=folder)
set_seed(0)
for prompt in ("The film", "It's", "What's surprising about"):
    (answer,) = generate(prompt, max_new_tokens=24, do_sample=True)
    print(answer["generated_text"])
