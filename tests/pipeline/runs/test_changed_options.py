"""`pipeline.runs.changed_options`: an option that changes on resume takes effect and is said, or is refused by name."""

import json
import re
import shutil
from collections import Counter
from dataclasses import fields, make_dataclass
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS
from datasets import Dataset
from distributed_worker import KillAt, Killed
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from pipeline.pretrain import BackboneConfig
from pipeline.rl.config import PPOConfig
from pipeline.runs import changed_options as table
from pipeline.runs.changed_options import changed_options, effect, options_of
from pipeline.runs.manifest import MANIFEST, manifest_digest
from pipeline.runs.resumed_options import MOST_ROWS, rows_digest
from tests.pipeline import test_stages


pytestmark = pytest.mark.slow


run_stage = test_stages.run
TRAINING = ("sft", "reward", "ppo", "rloo", "grpo", "dpo")
PARTS = {stage: test_stages.TYPES[stage] for stage in TRAINING} | {"pretrain": (BackboneConfig, TrainingArguments)}
OPTIONS = sorted(
    {(part.__name__, option.name) for parts in PARTS.values() for part in parts for option in fields(part)}
)
# Options that only the oldest or only the newest transformers has.
OTHER_RELEASES = {
    "warmup_ratio", "logging_dir", "activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order",
    "dataloader_multiprocessing_context",
}  # fmt: skip


# ------------------------------------------------------------------------------------------ the table
def test_every_option_of_every_stage_is_in_the_table():
    """A new one, also of a new release of TRL or transformers, must be entered."""
    assert len(OPTIONS) > 700
    assert not [option for option in OPTIONS if effect(*option) == table.UNKNOWN]
    new = make_dataclass("SFTConfig", [("brand_new", int, 1)])
    assert effect("SFTConfig", fields(new)[0].name) == table.UNKNOWN


def test_no_option_is_in_the_table_twice_or_without_reason():
    refused = [name for names in table.REFUSED.values() for name in names.split()]
    names = [*table.APPLIED.split(), *refused, *table.COMPARED.split(), *table.HARMLESS.split()]
    assert [name for name, times in Counter(names).items() if times > 1] == []
    assert set(names) - {name for _, name in OPTIONS} <= OTHER_RELEASES
    assert table.OF_ROLLOUT | table.OPTIMIZER <= set(table.APPLIED.split())


def recorded(monkeypatch, options, step=8, **order):
    order = {"gradient_accumulation_steps": 1, **order}
    manifest = {"step": step, "order": order, "options": options}
    monkeypatch.setattr(table, "read_manifest", lambda folder: manifest)


@pytest.mark.parametrize("stage", PARTS)
def test_a_changed_option_is_said_or_refused_by_name(stage, monkeypatch):
    names = [(part.__name__, option.name) for part in PARTS[stage] for option in fields(part)]
    args = object.__new__(PARTS[stage][-1])
    compared = [*table.COMPARED.split(), *table.HARMLESS.split()]
    for owner, name in names:
        then = {part.__name__: {} for part in PARTS[stage]}
        recorded(monkeypatch, then | {owner: {name: 1}})
        now = then | {owner: {name: 2}}
        reason = effect(owner, name)
        if reason is None:
            assert name in compared
        elif reason == "applied":
            assert changed_options("checkpoint-8", args, now) == {name: (1, 2)}
        else:
            message = re.escape(
                f"checkpoint-8: this cannot change on resume: {name}=2 instead of 1 ({reason}). Set it as"
            )
            with pytest.raises(ValueError, match=message):
                changed_options("checkpoint-8", args, now)
        assert changed_options("checkpoint-8", args, then | {owner: {name: 1}}) == {}


def test_every_refused_option_is_named(monkeypatch):
    recorded(
        monkeypatch, {"PPOConfig": {"critic": "head", "brand_new": None, "beta": 1.0}, "ModelConfig": {"lora_r": 4}}
    )
    now = {"PPOConfig": {"critic": "adapter", "brand_new": [1], "beta": 2.0}, "ModelConfig": {"lora_r": 8}}
    with pytest.raises(ValueError) as caught:
        changed_options("checkpoint-8", object.__new__(PPOConfig), now)
    assert "brand_new=[1] instead of unset (this release does not know" in str(caught.value)
    assert "critic='adapter' instead of 'head' (" in str(caught.value)
    assert "lora_r=8 instead of 4 (it changes the adapter" in str(caught.value) and "beta" not in str(caught.value)


def test_what_an_update_was_sampled_with_can_change_after_it(monkeypatch):
    """An update is of 4 passes an epoch, 3 epochs, 2 passes a step: 6 steps."""
    then, now = {"PPOConfig": {"temperature": 1.0}}, {"PPOConfig": {"temperature": 0.7}}
    args, update = object.__new__(PPOConfig), {"steps_per_generation": 4, "num_iterations": 3}
    recorded(monkeypatch, then, step=12, gradient_accumulation_steps=2, **update)
    assert changed_options("checkpoint", args, now) == {"temperature": (1.0, 0.7)}
    recorded(monkeypatch, then, step=13, gradient_accumulation_steps=2, **update)
    with pytest.raises(
        ValueError, match="temperature=0.7 instead of 1.0 .*within an update.* at a step that 6 divides"
    ):
        changed_options("checkpoint", args, now)


def test_grpo_gets_no_reference_on_resume(monkeypatch):
    args = object.__new__(PARTS["grpo"][-1])
    for then, now in ((0.0, 0.1), (0.1, 0.0)):
        recorded(monkeypatch, {"GRPOConfig": {"beta": then}})
        with pytest.raises(ValueError, match=f"beta={now} instead of {then} .without beta GRPO has no reference"):
            changed_options("checkpoint", args, {"GRPOConfig": {"beta": now}})
    with pytest.raises(
        ValueError, match="written by another stage, with the options of GRPOConfig, and this one has PPO"
    ):
        changed_options("checkpoint", object.__new__(PPOConfig), {"PPOConfig": {"beta": 0.1}})


def test_a_record_is_json_and_holds_no_secret(tmp_path):
    args = PPOConfig(
        str(tmp_path), hub_token="secret", lr_scheduler_kwargs={"x": float("inf")}, bf16=False, use_cpu=True
    )
    record = options_of(args)
    assert json.loads(json.dumps(record, allow_nan=False)) == record and "secret" not in json.dumps(record)
    assert record["PPOConfig"]["lr_scheduler_kwargs"] == {"x": "Infinity"}
    assert (
        record["PPOConfig"]["lr_scheduler_type"] == "linear"
        and record["PPOConfig"]["accelerator_config"]["even_batches"]
    )


# ------------------------------------------------------------------------------------------ taken up
class Look(TrainerCallback):
    """Keeps what the optimizer steps with as training begins, and ends it there."""

    def on_train_begin(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        self.groups = [{name: x for name, x in group.items() if name != "params"} for group in optimizer.param_groups]
        self.state, self.rates = state, lr_scheduler.get_last_lr()
        raise Killed


@pytest.fixture
def resumed(make_trainer, tmp_path):
    """Kills a PPO run of 12 steps at a step; then gives what a resumed run begins with."""
    prompts = PROMPTS + [text.lower() for text in PROMPTS]

    def trainer(**options):
        settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1, **options}
        return make_trainer(**{"prompts": prompts, "output_dir": str(tmp_path / "run"), **settings})

    def kill(step, **options):
        first = trainer(**options)
        first.add_callback(KillAt(step))
        with pytest.raises(Killed):
            first.train()

        def resume(look=True, **changes):
            second = trainer(**{**options, **changes})
            if look:
                second.look = Look()
                second.add_callback(second.look)
                with pytest.raises(Killed):
                    second.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
            return second

        return resume

    return kill


def test_the_optimizer_has_the_options_of_the_resumed_run(resumed, capsys):
    """At step 4 of 12 a linear schedule has come to 2/3 of the learning rate."""
    resume = resumed(4)
    capsys.readouterr()
    unchanged = resume().look
    assert unchanged.groups[0]["lr"] == pytest.approx(1e-2 * 2 / 3) and unchanged.groups[0]["weight_decay"] == 0.1
    assert "from here on" not in capsys.readouterr().out
    cases = [
        ({"learning_rate": 3e-3}, {"lr": 2e-3, "initial_lr": 3e-3}),
        ({"learning_rate": 0.0}, {"lr": 0.0, "initial_lr": 0.0}),
        ({"weight_decay": 0.3}, {"weight_decay": 0.3, "lr": 1e-2 * 2 / 3}),
        ({"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3}, {"betas": (0.5, 0.9), "eps": 1e-3}),
        ({"lr_scheduler_type": "constant"}, {"lr": 1e-2}),
        ({"lr_scheduler_type": "cosine"}, {"lr": 1e-2 * 0.75}),  # (1 + cos(pi / 3)) / 2
        ({"warmup_steps": 8}, {"lr": 1e-2 / 2}),
        ({"max_steps": 8}, {"lr": 1e-2 / 2}),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}},
            {"lr": 1e-2 * 4 / 9},
        ),
    ]
    for changes, expected in cases:
        look = resume(**changes).look
        found = [{name: group[name] for name in expected} for group in look.groups]
        expected = {name: pytest.approx(value) for name, value in expected.items()}
        decays = {"weight_decay": 0.0} if "weight_decay" in expected else {}  # biases and norms do not decay
        assert found == [expected, expected | decays] and look.rates == [group["lr"] for group in look.groups]
        said = capsys.readouterr().out
        for name, value in changes.items():
            assert re.search(f"^{name}: {re.escape(repr(value))} instead of .* from here on.$", said, re.MULTILINE), (
                said
            )


def test_a_schedule_that_goes_by_what_it_sees_begins_anew_only_if_it_changes(resumed):
    evaluation = {"held_out": PROMPTS[:2], "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    kind = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0}}
    resume = resumed(4, metric_for_best_model="score", **evaluation, **kind)
    kept = resume()
    assert kept.lr_scheduler.last_epoch == 2  # evaluations
    lowered = kept.look.groups[0]["lr"]
    decayed = resume(weight_decay=0.3)
    assert decayed.look.groups[0]["weight_decay"] == 0.3 and decayed.look.groups[0]["lr"] == lowered
    anew = resume(learning_rate=3e-3)
    assert anew.look.groups[0]["lr"] == 3e-3 and anew.lr_scheduler.last_epoch == 0
    other = resume(lr_scheduler_type="constant", lr_scheduler_kwargs=None)
    assert other.look.groups[0]["lr"] == 1e-2 and other.lr_scheduler.last_epoch == 4
    assert kept.state.best_metric is not None and resume(metric_for_best_model="kl").state.best_metric is None


def test_beta_is_that_of_the_resumed_run(resumed, capsys):
    resume = resumed(4, beta=0.5, kl_target=1.0, kl_horizon=20)
    adapted = resume().beta
    assert adapted != 0.5
    assert resume(kl_target=3.0).beta == adapted  # goes on from there
    assert resume(beta=0.2).beta == resume(beta=0.2, kl_target=None).beta == 0.2
    assert resume(beta=0.0, kl_target=None).beta == 0.0
    capsys.readouterr()
    assert resume(kl_target=None).beta == 0.5
    said = capsys.readouterr().out
    assert (
        f"kl_target: unset instead of 1.0 from here on.\nbeta: 0.5 instead of the adapted {adapted:g} from here on"
        in said
    )


def test_within_an_update_its_temperature_stays(resumed, capsys):
    """An update has 4 steps; 3 is within the first."""
    resume = resumed(3)
    with pytest.raises(ValueError, match="temperature=0.7 instead of 1.0 .*at a step that 4 divides it can change"):
        resume(look=False, temperature=0.7).train(str(checkpoint_of(resume)))
    options = {
        "gamma": 0.9,
        "lam": 0.5,
        "epsilon": 0.1,
        "value_clip": 0.3,
        "vf_coef": 0.5,
        "save_steps": 6,
        "logging_steps": 2,
    }
    look = resume(**options).look
    said = capsys.readouterr().out
    assert [name for name in options if f"{name}: {options[name]} instead of " in said] == list(options)[:-2]
    assert (look.state.save_steps, look.state.logging_steps) == (6, 2)  # Trainer would keep the checkpoint's


def checkpoint_of(resume) -> Path:
    return sorted(Path(resume(look=False).args.output_dir).glob("checkpoint-*"))[-1]


def short(completions, **kwargs):
    return [-float(len(text)) for text in completions]


def one(completions, **kwargs):
    return [1.0] * len(completions)


def test_rewards_change_from_the_next_rollout_on(resumed, capsys):
    resume = resumed(3, reward_funcs=[short], reward_weights=[1.0])
    trainer = resume(
        look=False, reward_funcs=[short, one], reward_weights=[-1.0, 2.0], max_steps=6, log_completions=True
    )
    trainer.train(str(checkpoint_of(resume)))
    assert "reward_weights: [-1.0, 2.0] instead of [1.0] from here on." in capsys.readouterr().out
    history = [row for row in trainer.state.log_history if "score" in row]
    assert history[0]["score"] == history[0]["rewards/short/mean"]
    assert history[-1]["score"] == pytest.approx(2 - history[-1]["rewards/short/mean"]) and len(history) == 2


def test_other_contents_of_the_same_shape_are_refused(resumed, capsys):
    resume = resumed(4, ptx_coef=0.1, texts=[[5, 6, 7], [8, 9]])
    checkpoint = str(checkpoint_of(resume))
    other = PROMPTS + [text.upper() for text in PROMPTS]
    with pytest.raises(
        ValueError, match="checkpoint-4: written with other rows to train on, of the same number. Restore"
    ):
        resume(look=False, prompts=other).train(checkpoint)
    with pytest.raises(
        ValueError, match="checkpoint-4: written with other texts for ptx_coef. Restore the rows of ptx_"
    ):
        resume(look=False, texts=[[5, 6, 7], [8, 10]]).train(checkpoint)
    resume(ptx_coef=0.0, texts=None)
    assert "ptx_coef: 0.0 instead of 0.1 from here on." in capsys.readouterr().out
    trainer = resume(look=False)
    trainer.processing_class.add_tokens("brand new")
    with pytest.raises(
        ValueError, match="checkpoint-4: written with another tokenizer: its vocabulary or its chat template"
    ):
        trainer.train(checkpoint)


def test_a_checkpoint_without_options_goes_on(resumed, capsys):
    """Make the checkpoint one of a former release, whose manifest has neither options nor contents."""
    resume = resumed(4, lr_scheduler_type="cosine", max_steps=6)
    expected = resume(look=False)
    checkpoint = checkpoint_of(resume)
    kept = shutil.copytree(checkpoint, checkpoint.parent / "kept")
    expected.train(str(checkpoint))
    shutil.rmtree(checkpoint)
    shutil.copytree(kept, checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["options"], manifest["contents"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    capsys.readouterr()
    found = resume(look=False)
    found.train(str(checkpoint))
    said = capsys.readouterr().out
    assert f"{checkpoint}: written by an earlier release, which recorded no options" in said
    assert "from here on" not in said
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (found, expected))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resume(learning_rate=0.0).look.groups[0]["lr"] == 0.0
    with pytest.raises(ValueError, match="written with 16 rows to train on, and this run has 8"):
        resume(look=False, prompts=PROMPTS).train(str(checkpoint))


def test_rows_are_compared_by_their_contents(tmp_path):
    columns = {"prompt": ["a", "b"], "n": [[1, 2], None], "ref_chosen_logps": [0.1, 0.2]}
    rows = Dataset.from_dict(columns)
    expected = rows_digest(rows)
    assert rows_digest(Dataset.from_dict(dict(reversed(columns.items()))).select([0, 1])) == expected
    assert rows_digest(Dataset.from_dict({**columns, "ref_chosen_logps": [0.3, 0.2]})) == expected
    assert rows_digest(rows.select([1, 0]).select([1, 0])) == expected != rows_digest(rows.select([1, 0]))
    for name, value in (("prompt", ["a", "c"]), ("n", [[1, 2], [0]]), ("n", [[1, 3], None])):
        assert rows_digest(Dataset.from_dict({**columns, name: value})) != expected
    many = {"x": list(range(3 * MOST_ROWS))}
    last = {"x": [*many["x"][:-3], -1, -1, -1]}
    assert rows_digest(Dataset.from_dict(many)) != rows_digest(Dataset.from_dict(last))


# ------------------------------------------------------------------------------------------ every stage
ROWS = [
    {"prompt": f"{prompt} film {i}", "chosen": f" is good {'indeed ' * (i % 4)}.", "rejected": " is not."}
    for i, prompt in enumerate(PROMPTS * 2)
]
ONLINE = {"num_generations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}
STAGES = {
    "sft": ({}, {"lora_r": 8, "dtype": "bfloat16", "max_length": 32, "optim": "adamw_torch"}),
    "reward": ({"sft_adapter": ""}, {"lora_alpha": 5, "lora_top_layers": 1, "use_margin": True, "optim": "sgd"}),
    "dpo": ({}, {"max_pairs": 12, "max_length": 32, "optim": "adafactor", "lora_r": 8}),
    "rloo": (ONLINE, {"optim": "sgd", "dataloader_drop_last": True, "lora_alpha": 5}),
    "grpo": (ONLINE, {"optim_args": "amsgrad=True", "shuffle_dataset": False, "lora_target_modules": "c_fc"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_up_or_refuses(stage, run_stage, tmp_path, monkeypatch, capsys):
    """With a learning rate of 0 from the checkpoint on, the adapter stays as the checkpoint has it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"text": row["prompt"] + row["chosen"]}) + "\n" for row in ROWS))
    given, refused = STAGES[stage]
    options = {
        "dataset_name": rows, "per_device_train_batch_size": 4, "max_steps": 3, "save_strategy": "steps", "save_steps": 1,
        "bf16": False, "weight_decay": 0.0, "logging_steps": 1, "resume_from_checkpoint": "auto", **given,
    }  # fmt: skip
    original, kill = Trainer._inner_training_loop, [2]

    def loop(self, *args, **kwargs):
        self.add_callback(KillAt(kill[0]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_inner_training_loop", loop)
    with pytest.raises(Killed):
        run_stage(stage, **options)
    kill[0] = None
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # nothing is loaded
        for name, value in refused.items():
            with pytest.raises(ValueError, match=f"checkpoint-2: this cannot change on resume: {name}="):
                run_stage(stage, **options, **{name: value})
    moved = shutil.move(rows, tmp_path / "moved.jsonl")
    lines = Path(moved).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match="checkpoint-2: written with other rows to train on, of the same number"):
        run_stage(stage, **{**options, "dataset_name": tmp_path / "other.jsonl"})
    capsys.readouterr()
    run_stage(stage, **{**options, "dataset_name": moved, "learning_rate": 0.0, "lr_scheduler_type": "constant"})
    said = capsys.readouterr().out
    assert re.search(r"^learning_rate: 0.0 instead of \S+ from here on.$", said, re.MULTILINE)
    assert "dataset_name: " not in said
    ours, theirs = (
        load_file(tmp_path / "out" / folder / "adapter_model.safetensors") for folder in (".", "checkpoint-2")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    assert [row["learning_rate"] for row in history if row["step"] == 3 and "learning_rate" in row] == [0.0]
