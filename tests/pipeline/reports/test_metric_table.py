"""`pipeline.reports.metric_table` is what the trainers of all stages log, and its advice names options that exist."""

import re
from dataclasses import fields
from fnmatch import fnmatchcase
from importlib import import_module

import pytest
from conftest import PROMPTS
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, GRPOConfig, ModelConfig, RewardConfig, RLOOConfig, SFTConfig

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import Backbone
from pipeline.dpo import DPO
from pipeline.reports.healthy import HELD_OUT, find, healthy_range, is_outside, values_of
from pipeline.reports.metric_table import METRICS, STAGES, Metric, Times
from pipeline.reward import RewardModel
from pipeline.rl.online import GRPO, RLOO
from pipeline.sft import SFT
from reward_models.rules import get_length


PAIRS = [{"prompt": prompt, "chosen": " is good.", "rejected": " is not."} for prompt in PROMPTS]
# What no run below logs: it needs a mixture of experts, or vLLM.
ELSEWHERE = {"aux_loss", "sampling/importance_weight/mean"}
OF_VLLM = {name for name in (metric.name for metric in METRICS) if name.startswith("sampling/")}


def answer(completions, log_metric=None, **kwargs):
    """A reward that logs as an ensemble does."""
    log_metric("rewards/answer/disagreement", 0.5)
    return [float(len(completion)) for completion in completions]


@pytest.fixture
def logged(tiny, sft_adapter, tokenizer, make_trainer, tmp_path):
    """Trains a stage for two steps, with an evaluation where it has one, and returns the entries of its log."""

    def train(stage, **options):
        settings = {
            "output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4,
            "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
        }  # fmt: skip
        if stage == "PPO":
            trainer = make_trainer(
                reward_funcs=[answer], texts=[[5, 6, 7]], ptx_coef=0.1, held_out=PROMPTS[:2], max_steps=4,
                eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, include_num_input_tokens_seen="all",
            )  # fmt: skip
            trainer.train()
            return trainer.state.log_history
        base, _ = load_pretrained(ModelConfig(tiny), head=stage == "reward")
        lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        common = {"processing_class": tokenizer}
        if stage in ("SFT", "reward"):
            data = [{"text": row["prompt"] + row["chosen"]} for row in PAIRS] if stage == "SFT" else PAIRS
            rows = Dataset.from_list(data)
            lora.task_type = "CAUSAL_LM" if stage == "SFT" else "SEQ_CLS"
            kind, config = {"SFT": (SFT, SFTConfig), "reward": (RewardModel, RewardConfig)}[stage]
            settings |= {"eval_strategy": "steps", "eval_steps": 1}
            trainer = kind(
                model=base,
                args=config(**settings, **options),
                train_dataset=rows,
                eval_dataset=rows,
                peft_config=lora,
                **common,
            )
        else:
            model = Backbone(base, read_adapter(sft_adapter, base=base))
            if stage == "DPO":
                trainer = DPO(
                    model=model, args=DPOConfig(**settings), train_dataset=Dataset.from_list(PAIRS), **common
                )
                model.train_only("policy")
            else:
                kind, config = {"RLOO": (RLOO, RLOOConfig), "GRPO": (GRPO, GRPOConfig)}[stage]
                settings |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, **options}
                prompts = Dataset.from_dict({"prompt": PROMPTS})
                rewards = [answer, get_length(3)]
                trainer = kind(
                    model=model, args=config(**settings), reward_funcs=rewards, train_dataset=prompts, **common
                )
        trainer.train()
        return trainer.state.log_history

    return train


VARIANTS = {
    "SFT": [{}],
    "reward": [{}],
    "PPO": [{}],
    "RLOO": [{}],
    "GRPO": [{}, {"loss_type": "cispo"}, {"loss_type": "vespo"}, {"entropy_coef": 0.1}],
    "DPO": [{}],
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_table_is_what_a_stage_logs(stage, logged):
    """Nothing that is logged is missing in the table, and nothing in the table is not logged."""
    names = {name for options in VARIANTS[stage] for row in logged(stage, **options) for name in row}
    assert not sorted(name for name in names if find(name, stage) is None)
    plain = {name.removeprefix(HELD_OUT) for name in names} | names
    rest = ELSEWHERE | (OF_VLLM if stage == "GRPO" else set())
    rest |= set() if stage == "PPO" else {"num_input_tokens_seen", "train_tokens_per_second"}
    for metric in METRICS:
        if stage in metric.stages and metric.name not in rest and not metric.name.startswith(HELD_OUT):
            assert any(fnmatchcase(name, metric.name) for name in plain), metric.name


def test_a_name_has_one_record_in_each_stage():
    for stage in STAGES:
        names = [metric.name for metric in METRICS if stage in metric.stages]
        assert sorted(names) == sorted(set(names))


def test_every_record_is_filled_in():
    for metric in METRICS:
        assert metric.stages and set(metric.stages) <= set(STAGES)
        assert metric.unit and metric.group
        for text in (metric.meaning, metric.healthy, metric.remedy):
            assert text.endswith(".") and "  " not in text, metric.name


def test_the_advice_names_options_and_figures_that_exist():
    known = {"get_length", "mean_minus_std", "processed_logprobs"} | {metric.name for metric in METRICS}
    for stage in STAGES:
        known |= {field.name for kind in import_module(f"pipeline.{stage.lower()}").OPTIONS for field in fields(kind)}
    for metric in METRICS:
        said = f"{metric.meaning} {metric.healthy} {metric.remedy}"
        named = set(re.findall(r"[a-z]+(?:_[a-z]+)+", re.sub(r"\S+/\S+", " ", said)))
        assert named <= known, (metric.name, named - known)
        bounds = (bound.of for bound in (*metric.low, *metric.high) if isinstance(bound, Times))
        assert set(bounds) - {"first"} <= known


# ------------------------------------------------------------------------------------------ ranges, by hand
KL = next(metric for metric in METRICS if metric.name == "kl" and metric.stages == ("PPO",))
LOG = [{"kl": 0.0, "completions/mean_length": 20.0}, {"kl": 8.0}, {"loss": 1.0, "completions/mean_length": 16.0}]


@pytest.mark.parametrize(
    ("options", "high"),
    [({"kl_target": 9.0}, 13.5), ({"kl_target": None}, 16.0), ({}, 16.0), ({"kl_target": True}, 16.0)],
)
def test_the_first_bound_that_is_known(options, high):
    assert healthy_range(KL, LOG, options) == (-0.1, high)


def test_a_bound_that_is_not_known_yet():
    assert healthy_range(KL, [], {}) == (-0.1, None)


def test_a_multiple_of_the_first_value():
    entropy = find("entropy", "PPO")
    assert healthy_range(entropy, [{"entropy": None}, {"entropy": 4.0}, {"entropy": 2.0}], {}) == (0.4, None)
    assert healthy_range(entropy, [{"eval_entropy": 5.0}], {}, "eval_entropy") == (0.5, None)


def test_values_are_finite_numbers():
    odd = [{"x": value} for value in (1, 2.5, None, float("nan"), float("inf"), True, "3", 10**400)]
    assert values_of(odd, "x") == [1, 2.5]


@pytest.mark.parametrize(
    ("values", "outside"),
    [([9.0, 9.0], False), ([0.5] * 2 + [9.0], False), ([9.0] * 3, True), ([9.0, 9.0, 0.5], True), ([9.0, 0.5, 0.5], False),
     ([-1.0] * 4, True), ([1.0] * 4, False)],
)  # fmt: skip
def test_the_median_of_the_last_three_decides_once_settled(values, outside):
    metric = Metric("x", ("PPO",), "g", "u", "m", "h", "r", settles=2)
    assert is_outside(metric, values, 0.0, 1.0) == outside


@pytest.mark.parametrize(
    ("name", "stage", "found"),
    [("kl", "PPO", "nats a sequence"), ("kl", "GRPO", "nats a token"), ("eval_kl", "PPO", "nats a sequence"),
     ("rewards/my_rule/mean", "RLOO", "units of that reward"), ("eval_runtime", "SFT", "seconds"), ("margin", "PPO", None),
     ("mine", None, None), ("rewards/margins", None, "nats, times beta")],
)  # fmt: skip
def test_find(name, stage, found):
    metric = find(name, stage)
    assert (metric and metric.unit) == found
