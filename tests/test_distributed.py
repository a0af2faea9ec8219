"""Two processes on the CPU (gloo), each with half of the batch, end with what one process ends with: every stage, under
DDP, DeepSpeed ZeRO-2 and ZeRO-3, and FSDP2."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.trainer_pt_utils import safe_globals


ROOT = Path(__file__).parents[1]
KINDS = {"cpu_ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP"}
TRAINED = ("sft", "reward", "ppo", "ppo_other")
OF_ENSEMBLE = ("members/member_0", "members/member_1", "ppo_members")
BEST = [
    "--load_best_model_at_end",
    "true",
    "--metric_for_best_model",
    "score",
    "--save_strategy",
    "steps",
    "--save_steps",
    "4",
]
# Stages that are killed when this step begins, in the middle of an update of PPO, and resumed.
RESUMED = {"noise": 2, "reward": 2, "ppo": 3}
NOISE = ["--lora_dropout", "0.1", "--train_sampling_strategy", "group_by_length"]
SAVE = ["--save_strategy", "steps", "--save_steps", "1"]
# Stages that other processes continue, and the step they continue after: for PPO the first update's last.
CONTINUED = {"sft": 1, "reward": 1, "ppo": 2}
SMALLER = ["--per_device_train_batch_size", "2"]  # half as many rows a pass as the plan has for two processes
written: dict[str, Path] = {}  # output folders of two processes, by config, as the tests of this module run
# What a resume reads, of each process where there is a number; and what accelerate, DeepSpeed and transformers would.
READ = [
    "optimizer_{}.json", "optimizer_{}.safetensors", "state_{}.json", "state_{}.safetensors", "rng_state_{}.pth",
    "trainer_state.json",
]  # fmt: skip
BESIDE = [
    "latest", "global_step2/mp_rank_00_model_states.pt", "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp.bin", "optimizer.bin", "optimizer.pt",
    "scheduler.pt", "scaler.pt", "training_args.bin", "adapter_model.bin", "pytorch_model.bin", "custom_checkpoint_0.pkl",
]  # fmt: skip
LARGE = ["--vf_coef", "1e30"]  # the loss is finite, and the square of its gradient is not: ZeRO-2 sums it in float32
# What PPO cannot do there: name, options, the error.
REFUSED = {
    "zero2": [
        (
            "early_stop",
            ["--max_approx_kl", "0.1"],
            "max_approx_kl=0.1 is not supported by DeepSpeed: it leaves gradients out of optimizer steps",
        ),
        ("not_finite", ["--learning_rate", "1e30"], "The loss is nan at step 2: training has diverged and ends"),
        ("norm", LARGE, "The gradient's norm is inf at step 1: training has diverged and ends"),
    ],
}
TIMEOUT = int(os.environ.get("T", 600))  # seconds
WORDS = "a the film story cast is was never always quite dull bright slow funny warm cold and but with without".split()


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(tiny, tmp_path_factory) -> dict[str, str]:
    """Small files for every stage, and a tiny model one in eight of whose tokens ends a completion."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))

    model = GPT2LMHeadModel.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model.config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(5, len(tokenizer), 8)]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = [{"prompt": text(4), "chosen": " " + text(9), "rejected": " " + text(9)} for _ in range(44)]
    return {
        "model": str(folder / "model"),
        "texts": write_rows(folder / "texts.jsonl", [{"text": text(12)} for _ in range(40)]),
        "held_texts": write_rows(folder / "held_texts.jsonl", [{"text": text(12)} for _ in range(8)]),
        "pairs": write_rows(folder / "pairs.jsonl", pairs[:32]),
        "held_pairs": write_rows(folder / "held_pairs.jsonl", pairs[32:]),
        "prompts": write_rows(folder / "prompts.jsonl", [{"prompt": text(7)} for _ in range(24)]),
        "held_prompts": write_rows(folder / "held_prompts.jsonl", [{"prompt": text(7)} for _ in range(19)]),
    }


def plan(inputs: dict[str, str], out: Path, start: Path, processes: int, use_cpu: bool) -> list[list]:
    """Every stage on a global batch of 8. PPO and evaluation take the adapters in `start`."""
    common = {"model_name_or_path": inputs["model"]}
    training = {
        **common,
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,  # with 1e-8 the step of a tiny gradient tells in which order it was summed
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "lora_dropout": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "max_steps": 3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": use_cpu,
        "disable_tqdm": True,
    }
    sft = {
        **training,
        "lora_top_layers": 1,  # so that PPO computes the layer below once a rollout
        "dataset_name": inputs["texts"],
        "eval_dataset_name": inputs["held_texts"],
        "max_length": 64,
    }
    reward = {
        **training,
        "lora_embeddings": True,
        "dataset_name": inputs["pairs"],
        "eval_dataset_name": inputs["held_pairs"],
        "max_length": 64,
        "sft_adapter": start / "sft",
        "sft_completions": 21,
        "max_completion_length": 6,
    }
    rewards = {"sft_adapter": start / "sft", "reward_adapter": start / "reward", "normalize_scores": True}
    ppo = {
        **training,
        **rewards,
        "dataset_name": inputs["prompts"],
        "eval_dataset_name": inputs["held_prompts"],
        "per_device_train_batch_size": 4 // processes,
        "steps_per_generation": 2,  # an update: 2 epochs of one minibatch of 8, in two pieces
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 6,
        "top_k": 1,  # the most likely token: sampling draws nothing, and so the same in any number of processes
        "max_completion_length": 8,
        "min_reward_accuracy": 0,
        "disable_dropout": True,
        "missing_eos_penalty": 0.5,
        "kl_target": 5.0,
        "sample_updates": 1,
        "sample_prompts": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_prompts": 16,
    }
    evaluation = {
        **common,
        **rewards,
        "dataset_name": inputs["held_prompts"],
        "policy_adapter": start / "ppo",
        "max_completion_length": 8,
        "batch_size": 4,
    }
    reward_eval = {**common, "dataset_name": inputs["held_pairs"], "reward_adapter": start / "reward", "batch_size": 4}
    # Other parts of PPO: a fresh policy in all layers and on the embeddings, a value that is a head on it, texts, an
    # entropy bonus.
    other = {
        **{key: value for key, value in ppo.items() if not key.startswith(("eval_", "sample_"))},
        "sft_adapter": "",
        "lora_embeddings": True,
        "critic": "head",
        "entropy_coef": 0.01,
        "whiten_rewards": True,
        "ptx_coef": 0.1,
        "ptx_dataset_name": inputs["texts"],
        "max_steps": 4,
    }
    # Two members above a layer that they share, and PPO by the lower score of the two.
    members = {**reward, "lora_embeddings": False, "lora_top_layers": 1, "num_members": 2, "max_steps": 2}
    by_members = {key: value for key, value in ppo.items() if not key.startswith("eval_")}
    by_members |= {"reward_adapter": start / "members", "reward_combination": "min", "max_steps": 4}
    stages = {"sft": sft, "reward": reward, "ppo": ppo, "ppo_other": other, "evaluation": evaluation}
    stages |= {"reward_eval": reward_eval, "reward_members": members, "ppo_members": by_members}
    commands = {"ppo_other": "ppo", "reward_members": "reward", "ppo_members": "ppo"}
    return [
        entry(
            name, commands.get(name, name), {**options, "output_dir": out / name.replace("reward_members", "members")}
        )
        for name, options in stages.items()
    ]


def entry(name: str, stage: str, options: dict, error: str | None = None) -> list:
    return [name, stage, [word for key, value in options.items() for word in (f"--{key}", str(value))], error, {}]


def resumed(stages: list[list], out: Path) -> list[list]:
    """SFT with all the noise there can be, since no stage of the plan draws any; then `RESUMED`, killed and resumed."""
    plan = {name: (stage, words) for name, stage, words, *_ in stages}
    bf16 = str("zero" in out.name).lower()  # transformers refuses it on a CPU that plays an accelerator
    plan["noise"] = ("sft", [*plan["sft"][1], *NOISE, "--bf16", bf16, "--output_dir", str(out / "noise")])
    added = [["noise", *plan["noise"], None, {}]]
    for name, step in RESUMED.items():
        stage, words = plan[name]
        folder = str(out / f"{name}_resumed")
        words = [*words, *SAVE, "--output_dir", folder, "--resume_from_checkpoint", "auto"]
        added += [[f"{name}_killed", stage, words, "Killed", {"kill": step}]]
        added += [[f"{name}_resumed", stage, words, None, {}]]
    still = [*plan["noise"][1], "--learning_rate", "0", "--output_dir", str(out / "still")]
    still += ["--resume_from_checkpoint", str(out / "noise_resumed" / "checkpoint-2")]
    return [*added, ["still", "sft", still, None, {}]]


def continued(
    stages: list[list], out: Path, steps: dict[str, int], source: Path, ending: str, **options: list[str]
) -> list[list]:
    """Stages of the plan, each from a checkpoint in `source`/<stage><ending>, with folders of their own in `out`.

    `options` are those of a stage, beside the plan's."""
    plan = {name: (stage, words) for name, stage, words, *_ in stages}
    added = []
    for name, step in steps.items():
        stage, words = plan[name]
        checkpoint = source / f"{name}{ending}" / f"checkpoint-{step}"
        words = [*words, "--output_dir", str(out / name), "--resume_from_checkpoint", str(checkpoint)]
        words += options.get(name, [])
        added.append([f"{out.name}: {name}", stage, words, None, {}])
    return added


def planted(words: list[str], out: Path) -> list[list]:
    """SFT with an adapter that its checkpoint does not have, and from checkpoints that a stranger has planted payloads in."""
    other = [*words, "--lora_r", "2", "--resume_from_checkpoint", str(out / "noise_resumed" / "checkpoint-2")]
    error = "this cannot change on resume: lora_r=2 instead of"
    added = [["other_adapter", "sft", [*other, "--output_dir", str(out / "other")], error, {}]]
    for name in (*READ, "beside"):
        names = BESIDE if name == "beside" else [name.format(process) for process in range(2)]
        folder = out / f"planted_{name.format('')}"
        source, target = out / "noise_resumed" / "checkpoint-2", folder / "checkpoint-2"
        words = [*words, "--output_dir", str(folder), "--resume_from_checkpoint", str(target)]
        error = None if name == "beside" else ""
        added += [[folder.name, "sft", words, error, {"plant": [str(source), str(target), sorted(set(names))]}]]
    return added


def launch(config: str, processes: int, stages: list, folder: Path, *words: str) -> tuple[list[dict], str]:
    """What each process saw, and what all of them printed. `words` are options of accelerate's."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(stages))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{config}.yaml",
    ]
    command += ["--num_processes", str(processes), "--main_process_port", "0", *words, "tests/distributed_worker.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    printed = folder / "printed.txt"
    with printed.open("w") as file:
        group = subprocess.Popen(
            [*command, str(folder / "plan.json"), str(folder)],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            group.wait(timeout=TIMEOUT)
        finally:  # a launch that hangs leaves its processes otherwise
            with suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)
    files = [folder / f"process_{i}.json" for i in range(processes)]
    assert all(file.is_file() for file in files), printed.read_text()[-6000:]
    return [json.loads(file.read_text()) for file in files], printed.read_text()


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory) -> tuple[Path, dict]:
    """The stages' output folders, and what the process saw, of one process with the whole batch."""
    out = tmp_path_factory.mktemp("one")
    stages = plan(inputs, out, out, 1, use_cpu=True)
    for name, stage, words, *_ in stages[:]:
        if name in CONTINUED:
            words = [*words, *SAVE, "--output_dir", str(out / f"{name}_saved")]
            stages.append([f"{name}_saved", stage, words, None, {}])
    (saw,), _ = launch("cpu", 1, stages, out)
    return out, saw


@pytest.fixture(scope="module", params=KINDS)
def two(request, inputs, one, tmp_path_factory) -> tuple[str, Path, list[dict], str]:
    """The name of the accelerate config, and the same of two processes, which take PPO's adapters from `one`."""
    if request.param.startswith("zero") and not find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed (pip install spine-rlhf[deepspeed])")
    out = tmp_path_factory.mktemp(request.param)
    stages = plan(inputs, out, one[0], 2, use_cpu=request.param != "fsdp2")
    ppo = next(words for name, _, words, *_ in stages if name == "ppo")
    for name, options, error in REFUSED.get(request.param, []):
        stages.append([name, "ppo", [*ppo, *options, "--output_dir", str(out / name)], error, {}])
    stages.append(["best", "ppo", [*ppo, *BEST, "--output_dir", str(out / "best")], None, {}])
    stages += continued(stages, out / "from_one", CONTINUED, one[0], "_saved", sft=SMALLER)
    if written:  # a rollout stays with its processes, so a run changes its wrapper also in the middle of an update
        source = list(written.values())[-1]
        stages += continued(stages, out / "from_two", {"reward": 2, "ppo": 3}, source, "_resumed")
    stages += resumed(stages, out)
    if request.param != "cpu_ddp":
        stages += planted(next(words for name, _, words, *_ in stages if name == "noise"), out)
    saw, printed = launch(request.param, 2, stages, out)
    written[request.param] = out
    return request.param, out, saw, printed


@pytest.mark.slow
def test_adapters_equal_those_of_one_process(one, two):
    _, out, _, _ = two
    for folder in (*TRAINED, *OF_ENSEMBLE, "ppo/value", "ppo_other/value"):
        ours, theirs = (load_file(path / folder / "adapter_model.safetensors") for path in (out, one[0]))
        assert ours.keys() == theirs.keys(), folder
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=f"{folder}: {name}")
    start, ppo, value = (load_file(one[0] / x / "adapter_model.safetensors") for x in ("sft", "ppo", "ppo/value"))
    assert max((ppo[name] - start[name]).abs().max() for name in ppo) > 1e-4  # six steps have moved it
    assert value.keys() > ppo.keys()


@pytest.mark.slow
def test_processes_run_as_launched_and_end_alike(two):
    config, _, saw, printed = two
    assert printed.count(f"Runs as 2 processes on cpu: {KINDS[config]}") >= len(TRAINED)
    assert [seen["process"] for seen in saw] == [0, 1]
    for name in TRAINED:
        first, second = (seen[name] for seen in saw)
        assert first["wrapper"] == second["wrapper"] == KINDS[config]
        assert first["processes"] == second["processes"] == 2
        assert first["digest"] == second["digest"]


@pytest.mark.slow
def test_sharded_in_bfloat16_nothing_is_rounded_that_is_not_without(inputs, one, tmp_path):
    """FSDP2 could round logprobs, values and heads to bfloat16, where autocast alone leaves them in float32: the ratio would
    not start at 1. With a learning rate of 0 it stays there."""
    found = {}
    for config in ("cpu_ddp", "fsdp2"):
        stages = plan(inputs, tmp_path / config, one[0], 2, use_cpu=config != "fsdp2")
        ppo = next(stage for stage in stages if stage[0] == "ppo")
        ppo[2] += ["--dtype", "bfloat16", "--learning_rate", "0", "--max_steps", "2", "--eval_strategy", "no"]
        (saw, _), _ = launch(config, 2, [ppo], tmp_path / config, "--mixed_precision", "bf16")
        assert saw["ppo"]["wrapper"] == KINDS[config]
        found[config] = [row for row in saw["ppo"]["history"] if "approxkl" in row]
    assert len(found["fsdp2"]) == 2
    for ours, theirs in zip(found["fsdp2"], found["cpu_ddp"], strict=True):
        assert ours["approxkl"] == 0
        for name in ("entropy", "loss/policy", "loss/value", "grad_norm"):
            assert_close(ours[name], theirs[name], name)


@pytest.mark.slow
def test_figures_are_those_of_all_processes(one, two):
    """What is measured on the whole batch is the same to the last digits that sums of another order leave."""
    _, out, saw, _ = two

    def read(folder: Path, name: str) -> dict:
        return json.loads((folder / name).read_text())

    for name in ("reward/score_normalization.json", "evaluation/report.json", "reward_eval/reward_eval.json"):
        ours, theirs = read(out, name), read(one[0], name)
        ours.pop("seconds", None), theirs.pop("seconds", None)
        assert_close(ours, theirs, name)
    ours, theirs = read(out, "reward/metrics.json"), read(one[0], "reward/metrics.json")
    for name in ("accuracy", "ece", "reliability"):
        assert_close(ours[name], theirs[name], name)
    ours, theirs = ([row for row in read(x, "ppo/metrics.json")["history"] if "score" in row] for x in (out, one[0]))
    assert len(ours) == len(theirs) == 3  # updates
    for row, other in zip(ours, theirs, strict=True):
        for name in ("score", "kl", "reward", "value", "beta", "completions/mean_length", "completions/max_length"):
            if name in other:
                assert_close(row[name], other[name], name)
    assert any(row["completions/min_length"] < row["completions/max_length"] for row in ours if "kl" in row)
    ours, theirs = ((x / "ppo" / "samples.jsonl").read_text().splitlines() for x in (out, one[0]))
    assert_close([json.loads(line) for line in ours], [json.loads(line) for line in theirs], "samples")
    for first, second in zip(*(seen["ppo"]["history"] for seen in saw), strict=True):
        assert without_clock(first) == without_clock(second)


@pytest.mark.slow
def test_what_cannot_run_so_is_refused_and_leaves_no_adapter(two):
    config, out, saw, _ = two
    for name, _, _ in REFUSED.get(config, []):
        assert all(seen[name]["error"] for seen in saw)
        assert not (out / name / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_resumes_to_the_bit(name, two):
    """Dropout, bfloat16 over float32 master weights, a reward head, and PPO in the middle of an update."""
    _, out, saw, _ = two
    assert all("Killed" in seen[f"{name}_killed"]["error"] for seen in saw)
    once, again = out / name, out / f"{name}_resumed"
    assert (again / "adapter_model.safetensors").is_file()
    for path in [path for path in once.rglob("*") if path.name in ("adapter_model.safetensors", "samples.jsonl")]:
        assert (again / path.relative_to(once)).read_bytes() == path.read_bytes(), path
    for seen in saw:
        assert seen[f"{name}_resumed"]["digest"] == seen[name]["digest"]
        histories = [seen[which]["history"] for which in (name, f"{name}_resumed")]
        first, second = ([without_clock(row) for row in history] for history in histories)
        assert first == second


@pytest.mark.slow
def test_a_resumed_run_takes_up_its_learning_rate(two):
    """With a learning rate of 0 the adapter stays as it is in the checkpoint."""
    _, out, _, printed = two
    assert printed.count("learning_rate: 0.0 instead of 0.001 from here on.") == 1
    ours, theirs = (load_file(out / x / "adapter_model.safetensors") for x in ("still", "noise_resumed/checkpoint-2"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_each_process_draws_with_a_seed_of_its_own(two):
    """The random state that a checkpoint keeps of each process knows the seed it began with."""
    _, out, _, _ = two
    paths = [out / "ppo_resumed" / "checkpoint-2" / f"rng_state_{i}.pth" for i in range(2)]
    with safe_globals():  # numpy's state is beside torch's
        states = [torch.load(path, weights_only=True)["cpu"] for path in paths]
    drawn = [torch.Generator().set_state(state) for state in states]
    assert [generator.initial_seed() for generator in drawn] == [42, 43]  # the default of --seed, and the next


@pytest.mark.slow
def test_the_backbone_is_in_no_checkpoint(inputs, two):
    """Adapter, master weights and moments of all processes take less than an eighth of it."""
    _, out, _, _ = two
    written = sum(path.stat().st_size for path in (out / "noise_resumed" / "checkpoint-2").rglob("*.safetensors"))
    assert 0 < written < (Path(inputs["model"]) / "model.safetensors").stat().st_size / 8


def without_clock(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.endswith(("runtime", "per_second", "time"))}


@pytest.mark.slow
def test_nothing_planted_in_a_checkpoint_is_executed(two):
    config, out, saw, _ = two
    if config == "cpu_ddp":
        pytest.skip("test_checkpoints.py has it")
    for name in READ:
        assert all(seen[f"planted_{name.format('')}"]["error"] for seen in saw)  # it was read
    assert all(seen["planted_beside"]["digest"] == seen["noise"]["digest"] for seen in saw)
    assert not list(out.rglob("executed"))


@pytest.mark.slow
def test_the_best_checkpoint_is_what_training_ends_with(two):
    """Evaluated and saved after step 4 of 6."""
    _, out, saw, _ = two
    assert saw[0]["best"]["digest"] == saw[1]["best"]["digest"] != saw[0]["ppo"]["digest"]
    for path in ("adapter_model.safetensors", "value/adapter_model.safetensors"):
        assert (out / "best" / path).read_bytes() == (out / "best" / "checkpoint-4" / path).read_bytes()


def assert_same_adapters(ours: Path, theirs: Path) -> None:
    """Compare, to rounding, the adapters that two runs end with."""
    paths = [path for path in theirs.rglob("adapter_model.safetensors") if "checkpoint-" not in str(path)]
    assert paths
    for path in paths:
        expected, found = load_file(path), load_file(ours / path.relative_to(theirs))
        assert found.keys() == expected.keys(), path
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0, msg=f"{ours}: {name}")


@pytest.mark.slow
def test_two_processes_continue_what_one_process_began(one, two):
    config, out, saw, printed = two
    for name, step in CONTINUED.items():
        assert_same_adapters(out / "from_one" / name, one[0] / name)
        said = f"{name}_saved/checkpoint-{step}, which 1 process wrote; 2 processes under {KINDS[config]} go on."
        assert said in printed
        assert len({seen[f"from_one: {name}"]["digest"] for seen in saw}) == 1
    assert "gradient_accumulation_steps is 2 instead of 1, so that the global batch stays 8." in printed


@pytest.mark.slow
def test_two_processes_continue_under_another_wrapper(one, two):
    """Also in the middle of an update."""
    _, out, _, printed = two
    if list(written.values())[0] == out:
        pytest.skip("no other wrapper has run before")
    assert "reward_resumed/checkpoint-2, which 2 processes under " in printed
    for name in ("reward", "ppo"):
        assert_same_adapters(out / "from_two" / name, one[0] / name)


@pytest.mark.slow
def test_one_process_continues_what_two_began(inputs, one, two):
    """With their recipe, so that it takes twice as many passes for a step; but not from the middle of an update."""
    config, out, _, _ = two
    stages = plan(inputs, out, one[0], 2, use_cpu=True)
    back = out / "back"
    added = continued(stages, back, {"reward": 1, "ppo": 4}, out, "_resumed")
    refused = continued(stages, out / "refused", {"ppo": 3}, out, "_resumed")
    refused[0][3] = "in the middle of an update, and this launch is 1 process. The rollout belongs to the processes"
    grouped = continued(
        [["noise", "sft", [*stages[0][2], *NOISE], None, {}]], out / "grouped", {"noise": 2}, out, "_resumed"
    )
    grouped[0][3] = (
        "With train_sampling_strategy=group_by_length the order of the rows depends on the number of processes"
    )
    (saw,), printed = launch("cpu", 1, [*added, *refused, *grouped], back)
    for name in ("reward", "ppo"):
        assert_same_adapters(back / name, one[0] / name)
        rows = [[row for row in seen["history"] if "loss" in row] for seen in (saw[f"back: {name}"], one[1][name])]
        assert len(rows[0]) == len(rows[1])
        for row, other in zip(*rows, strict=True):
            assert_close(row["loss"], other["loss"], name)
            assert row["epoch"] == other["epoch"]
    assert f"which 2 processes under {KINDS[config]} wrote; 1 process goes on. Random states begin anew" in printed
    assert "gradient_accumulation_steps is 2 instead of 1, so that the global batch stays 8." in printed
    assert "is 4 instead of 2 and steps_per_generation is 4 instead of 2, so that the global batch stays 8." in printed
    back_to = out / "ppo_resumed" / "checkpoint-2"
    assert f"Go back to the end of an update: --resume_from_checkpoint {back_to}." in saw["refused: ppo"]["error"]


def assert_close(ours, theirs, name: str) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key in theirs:
            assert_close(ours[key], theirs[key], f"{name}: {key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), name
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_close(*pair, f"{name}[{i}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), name
    else:
        assert ours == theirs, name


WRONG = {
    "one process": (["--cpu", "--num_processes", "2"], "asks for 2 processes, and accelerate started 1"),
    "two runs": (
        ["--config_file", "accelerate_configs/ddp.yaml"],
        "2 processes were started, and each runs by itself",
    ),
    "DDP for FSDP": (["--config_file", "accelerate_configs/fsdp2.yaml"], "On cpu it would run DDP"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_launch_that_became_something_else_is_refused_before_any_work(wrong, inputs, tmp_path):
    options, message = WRONG[wrong]
    words = ["-m", "pipeline.sft", "--model_name_or_path", inputs["model"], "--dataset_name", inputs["texts"]]
    words += ["--bf16", "false", "--use_cpu", str(wrong != "two runs").lower(), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([*command, *options, *words], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
