"""Convert the config of another project to a recipe: of old TRL's PPO, of OpenRLHF, verl or LLaMA-Factory.

    python -m pipeline.migrate old.yaml > new.yaml
    python -m pipeline.migrate -- --learning_rate 1e-5 --num_ppo_epochs 4 > new.yaml
    python -m pipeline.migrate openrlhf train_ppo.sh > ppo.yaml
    python -m pipeline.migrate verl -- algorithm.adv_estimator=gae data.train_batch_size=256 > ppo.yaml
    python -m pipeline.migrate llama-factory qwen3_lora_reward.yaml > reward.yaml

The first word is the project; without one it is TRL. The input is a YAML or JSON file, a command line after --, or, of
OpenRLHF and verl, the shell script that starts the run. Every old key appears in the output: as a key of the recipe with the
old name beside it, or in a comment that says why there is no such key and what to do. A key that was left out appears with
the other project's default if our default differs. A model, a data set or a reward that is still to be named is marked TO DO.
"""

import sys

import yaml

from data.quoting import escaped
from pipeline.migration import llama_factory, openrlhf, trl, verl
from pipeline.migration.reading import flattened, read_command_line, read_file, read_overrides, read_script


SOURCES = ("trl", "openrlhf", "verl", "llama-factory")
USAGE = "give one file, or -- and the options. See the examples at the top of pipeline/migrate.py."


def convert(source: str, words: list[str]) -> str:
    """Return the recipe, in YAML, from a file or from options after --, both of this source.

    Raises the errors of the readers and of the source's `migrate`, and:
        ValueError: there is neither a file nor --.
    """
    options = words[1:] if words[:1] == ["--"] else None
    if options is None and (len(words) != 1 or words[0].startswith("-")):
        raise ValueError(USAGE)
    script = options is None and words[0].endswith((".sh", ".bash", ".slurm"))
    if source == "openrlhf":
        module = None
        if script:
            module, options = read_script(words[0], tuple(openrlhf.MODULES))
        given = flattened(read_file(words[0])) if options is None else read_command_line(options)
        return openrlhf.migrate(given, openrlhf.MODULES[module] if module else None)
    if source == "verl":
        if script:
            _, options = read_script(words[0], verl.MODULES)
        return verl.migrate(flattened(read_file(words[0])) if options is None else read_overrides(options))
    given = read_file(words[0]) if options is None else read_command_line(options)
    return llama_factory.migrate(given) if source == "llama-factory" else trl.migrate(given)


def main(words: list[str]) -> None:
    source, rest = (words[0], words[1:]) if words and words[0] in SOURCES else ("trl", words)
    try:
        print(convert(source, rest), end="")
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        file = f"{escaped(rest[0])}: " if len(rest) == 1 and rest[0] not in told else ""
        sys.exit(f"pipeline.migrate: {file}{told}")


if __name__ == "__main__":
    main(sys.argv[1:])
