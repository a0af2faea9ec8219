import inspect

import pytest
import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import ModelConfig, RLOOTrainer

from pipeline.backbone import Backbone, load_pretrained, read_adapter
from pipeline.configs import PPOConfig
from pipeline.ppo_trainer import PPOTrainer
from reward_models.composite import PROTOCOL
from reward_models.learned import LearnedReward


PROMPTS = ["The film", "A", "It's a", "One of the best", "This is", "An", "For all its", "Not"]


def words(completions, **kwargs):
    return [float(len(completion.split())) for completion in completions]


@pytest.fixture
def make_trainer(tiny, sft_adapter, reward_adapter, tokenizer, tmp_path):
    def make(reward_funcs=None, prompts=PROMPTS, **options):
        base, _ = load_pretrained(ModelConfig(tiny))
        backbone = Backbone(base, read_adapter(sft_adapter, base=base))
        backbone.add_role("reward", read_adapter(reward_adapter, needs_head=True, base=base))
        settings = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 2,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": 2,
            "max_completion_length": 6,
            "max_steps": 8,  # two updates of two epochs of two minibatches
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return PPOTrainer(
            backbone=backbone,
            reward_funcs=reward_funcs or [LearnedReward(backbone, tokenizer)],
            args=PPOConfig(**{**settings, **options}),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
        )

    return make


def test_an_update_starts_at_ratio_one_and_kl_zero(make_trainer):
    trainer = make_trainer()
    trainer.train()
    rows = [row for row in trainer.state.log_history if "approxkl" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    firsts = [row for row in rows if "kl" in row]
    assert [row["step"] for row in firsts] == [1, 5]
    assert firsts[0]["kl"] == 0  # the policy starts as the reference
    assert firsts[1]["kl"] != 0
    for first in firsts:
        assert first["approxkl"] == 0 and first["clipfrac/policy"] == 0 and first["clipfrac/value"] == 0
    assert all(row["approxkl"] > 0 for row in rows if "kl" not in row)


def test_policy_and_value_train_and_nothing_else_changes(make_trainer):
    trainer = make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {
        n for n in before if ("lora_" in n and (".default." in n or ".value." in n)) or n == "heads.value.weight"
    }


def test_every_epoch_reshuffles_the_same_rollout(make_trainer):
    trainer = make_trainer()
    seen, original = [], PPOTrainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (seen.append(inputs), original(trainer, model, inputs))[1]
    trainer.train()

    def rows(batches):
        return [tuple(row) for batch in batches for row in batch["completion_ids"].tolist()]

    epochs = [rows(seen[start : start + 4]) for start in range(0, 16, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and sorted(epochs[2]) == sorted(epochs[3])
    assert epochs[0] != epochs[1] and epochs[2] != epochs[3]
    assert sorted(epochs[0]) != sorted(epochs[2])


def test_a_seed_fixes_the_result(make_trainer):
    results = []
    for seed in (0, 0, 1):
        trainer = make_trainer(seed=seed)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_a_rollout_holds_what_it_says(make_trainer, tokenizer):
    trainer = make_trainer(beta=0.5, normalize_advantages=False, gamma=1.0, lam=1.0)
    trainer.model.train()
    with torch.no_grad():  # a policy away from its reference, so that the penalty counts
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    rollout = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    mask = rollout["completion_mask"]
    for prompt, ids, real in zip(PROMPTS, rollout["prompt_ids"], rollout["prompt_mask"], strict=True):
        assert tokenizer.decode(ids[real]) == prompt
    ends = rollout["completion_ids"] == tokenizer.eos_token_id
    assert (ends & mask).sum() == ends.any(dim=1).sum()  # the end-of-text token is real, and only the first one
    rows = [
        torch.cat([p[pm], c[cm]]).tolist()
        for p, pm, c, cm in zip(
            rollout["prompt_ids"], rollout["prompt_mask"], rollout["completion_ids"], mask, strict=True
        )
    ]
    scores = [
        trainer.model.scores(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)).item() for row in rows
    ]
    penalty = 0.5 * trainer._metrics["train"]["kl"][-1]
    assert abs(penalty) > 1e-3
    # With gamma = lambda = 1 the return of the first token is the whole reward: score less KL penalty.
    assert rollout["returns"][:, 0].mean().item() == pytest.approx(sum(scores) / len(scores) - penalty, abs=1e-4)


def test_an_unfinished_completion_is_penalised(make_trainer, tokenizer):
    trainer = make_trainer(reward_funcs=[words], missing_eos_penalty=3.0)
    trainer.model.train()
    eos = tokenizer.eos_token_id
    rows = [{"prompt": "A"}, {"prompt": "B"}]
    scores = trainer._scores(rows, ["A", "B"], ["one two", "one two three"], [[5, 6, 7], [5, 6, eos]])
    assert scores.tolist() == [2 - 3, 3]


def test_rewards_are_weighed_and_clipped(make_trainer):
    trainer = make_trainer(reward_funcs=[words, words], reward_weights=[1.0, -3.0], reward_clip_range=[-5, 5])
    trainer.model.train()
    scores = trainer._scores([{"prompt": "A"}] * 2, ["A"] * 2, ["one two", "one two three"], [[5], [6]])
    assert scores.tolist() == [2 - 6, -5]


async def short_words(completions, **kwargs):
    return [None if len(completion) > 25 else 2 * len(completion.split()) for completion in completions]


def test_each_reward_is_logged_by_itself(make_trainer):
    trainer = make_trainer(reward_funcs=[words, short_words, words], reward_weights=[1.0, 0.5, 0.0])
    trainer.train()
    row = [row for row in trainer.state.log_history if "score" in row][-1]
    texts = list(trainer._logs["completion"])  # of the last rollout
    counts = words(texts)
    doubles = [2 * n if len(text) <= 25 else None for n, text in zip(counts, texts, strict=True)]
    applied = [value for value in doubles if value is not None]
    assert 0 < len(applied) < len(texts) == 8
    for name, values in {"words": counts, "short_words": doubles, "words_2": counts}.items():
        assert [None if value != value else value for value in trainer._logs["rewards"][name]] == values
    assert row["rewards/words/mean"] == row["rewards/words_2/mean"] == pytest.approx(sum(counts) / 8, abs=1e-4)
    assert row["rewards/short_words/mean"] == pytest.approx(sum(applied) / len(applied), abs=1e-4)
    assert row["score"] == pytest.approx((sum(counts) + 0.5 * sum(applied)) / 8, abs=1e-4)


def test_reward_functions_get_what_we_check_them_against(make_trainer):
    given = {}

    def curious(**kwargs):
        given.update(kwargs)
        return [1.0]

    trainer = make_trainer(reward_funcs=[curious])
    row = {"prompt": "A", "solution": "s", "completion": "c", "completion_ids": [9]}
    trainer._scores([row], ["A"], ["b"], [[5]])
    assert given.keys() == {*PROTOCOL, "solution"}
    assert (given["completions"], given["completion_ids"], given["solution"]) == (["b"], [[5]], ["s"])


def test_how_a_minibatch_is_cut_changes_nothing(make_trainer):
    """One step on 8 rows at once, and the same 8 rows of uneven length accumulated in 4 pieces."""
    results = []
    for rows, pieces in ((8, 1), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=rows,
            steps_per_generation=pieces,
            gradient_accumulation_steps=pieces,
            num_iterations=1,
            max_steps=1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
        )
        sample = trainer._generate

        def uneven(prompts, sample=sample):
            prompt_ids, completion_ids, completions = sample(prompts)
            return prompt_ids, [row[: 1 + i % 6] for i, row in enumerate(completion_ids)], completions

        trainer._generate = uneven
        trainer.train()
        assert sorted(trainer._rollout["completion_mask"].sum(dim=1).tolist()) == [1, 1, 2, 2, 3, 4, 5, 6]
        results.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-6, rtol=1e-5)


def test_what_reward_functions_log_is_logged(make_trainer):
    def chatty(completions, log_extra, log_metric, **kwargs):
        log_extra("shout", [completion.upper() for completion in completions])
        log_metric("words", 7.0)
        return words(completions)

    trainer = make_trainer(reward_funcs=[chatty])
    trainer.train()
    assert [row["words"] for row in trainer.state.log_history if "words" in row] == [7, 7]
    assert list(trainer._logs["extra"]["shout"]) == [text.upper() for text in trainer._logs["completion"]]
    assert not trainer._pending_extra_logs and not trainer._pending_metrics


def test_resuming_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=4)
    trainer.train()
    with pytest.raises(ValueError, match="PPO cannot resume yet"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def nothing(completions, **kwargs):
    return [None for _ in completions]


def boundless(completions, **kwargs):
    return [float("inf") for _ in completions]


@pytest.mark.parametrize("function", [nothing, boundless])
def test_a_row_without_a_finite_score_is_an_error_that_shows_it(make_trainer, function):
    trainer = make_trainer(reward_funcs=[function])
    with pytest.raises(ValueError, match=rf"{function.__name__}.* for prompt .*, completion "):
        trainer.train()


def test_saved_roles_are_those_that_trained(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    policy, value = read_adapter(str(tmp_path)), read_adapter(str(tmp_path / "value"), needs_head=True)
    assert torch.equal(value.head, trainer.model.heads["value"].weight)
    for adapter, name in ((policy, "default"), (value, "value")):
        parameters = dict(trainer.model.named_parameters())
        for key, tensor in adapter.weights.items():
            assert torch.equal(tensor, parameters[key.replace(".weight", f".{name}.weight")])


def test_trl_has_what_we_override():
    """Each name below is overridden or called here; if TRL moves one, this names it."""
    for name, arguments in {
        "_prepare_inputs": ["self", "generation_batch"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_generate": ["self", "prompts"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["self", "model", "inputs"],
        "_save_checkpoint": ["self", "model", "trial"],
    }.items():
        assert list(inspect.signature(getattr(RLOOTrainer, name)).parameters) == arguments, name
    source = inspect.getsource(RLOOTrainer)
    for attribute in (
        "_buffered_inputs",
        "_step",
        "_metrics",
        "_logs",
        "reward_func_names",
        "eos_token_ids",
        "temperature",
    ):
        assert f"self.{attribute}" in source, attribute
    assert 'model.add_adapter("ref", default_config)' in source


def test_peft_switches_adapters_through_these_attributes():
    assert BaseTunerLayer._disable_adapters is False
    assert BaseTunerLayer._active_adapter == "default"
    source = inspect.getsource(BaseTunerLayer)
    assert "return self._disable_adapters" in source and "return self._active_adapter" in source
