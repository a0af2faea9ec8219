r"""Reward completions with a Python function of your own.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.ppo \
        --config pipeline/recipes/hello_world/ppo.yaml --output_dir runs/own_reward \
        --reward_funcs examples.own_reward.greets_briefly

Start it in the folder of this repository. It takes a minute and a half on 2 CPU cores. `runs/own_reward/samples.jsonl` shows
how the completions of "Hello" change.
"""


def greets_briefly(
    completions: list[str], completion_ids: list[list[int]], contains: list[str], **columns
) -> list[float]:
    """Return 1 for a completion with the word of its row, less a twentieth for each of its tokens.

    PPO calls a reward function with lists of one entry a row: `prompts`, `completions` (texts), `completion_ids` (tokens), and
    every column of the dataset. `contains` is a column of the recipe's prompts.jsonl. The function returns one number a row.
    """
    rows = zip(completions, completion_ids, contains, strict=True)
    return [float(word in text) - len(tokens) / 20 for text, tokens, word in rows]
