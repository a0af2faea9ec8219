"""`pipeline.rl.preflight`: a sound run passes, and each fault that PPO would turn into a riddle is refused by name."""

import json
import math
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, make_likely
from peft import LoraConfig

from pipeline.backbone.adapters import read_adapter
from pipeline.rl.checks import Check
from pipeline.rl.config import PPOConfig
from pipeline.rl.policy_checks import sampled_with
from pipeline.rl.preflight import preflight


pytestmark = pytest.mark.slow


MEASURED = {"accuracy": 0.7, "ece": 0.05}
NAMES = [
    "dropout is off",
    "sampled and rescored logprobs agree",
    "importance ratios start near 1",
    "sampling and scoring run the same adapters",
    "tokens are drawn from the policy",
    "KL is 0 at step 0",
    "logprobs do not depend on the side of the padding",
    "logprobs are the model's own",
    "reward model's accuracy",
    "reward model's calibration error",
    "scores vary on SFT completions",
    "scores do not depend on batch and padding",
    "scores are not lengths",
]


@pytest.fixture
def check(make_trainer, reward_adapter, tokenizer, tmp_path):
    """Runs the checks on a trainer's backbone, after `spoil` has changed something about it."""

    def check(spoil=lambda trainer: None, metrics=MEASURED, adapter=True, **options):
        folder = Path(shutil.copytree(reward_adapter, tmp_path / "reward", dirs_exist_ok=True))
        if metrics is not None:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        trainer = make_trainer(**options)
        spoil(trainer)
        return preflight(trainer.model, PROMPTS, tokenizer, trainer.args, {"reward": str(folder)} if adapter else None)

    return check


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_sound_run_passes(check):
    checks = check()
    assert [found.name for found in checks] == NAMES
    assert {found.result for found in checks} <= {"passed", "warning"}
    found = by_name(checks)
    assert found["dropout is off"].measured == found["KL is 0 at step 0"].measured == 0
    assert 0 <= found["sampled and rescored logprobs agree"].measured < 1e-5
    assert found["importance ratios start near 1"].measured == 0
    assert found["sampling and scoring run the same adapters"].measured == 0
    assert 0 < found["tokens are drawn from the policy"].measured < 4
    assert found["scores do not depend on batch and padding"].measured < 1e-5
    assert found["reward model's accuracy"].measured == 0.7


def test_the_bar_ends_with_the_preflight(check, monkeypatch):
    """Completions that end early, and each reward model, are counted too."""
    seen = []

    class Bar(AbstractContextManager):
        def __init__(self, total, **options):
            self.left = total
            seen.append(self)

        def update(self, passes=1):
            self.left -= passes

        def __exit__(self, *error):
            return None

    monkeypatch.setattr("pipeline.rl.preflight.tqdm", Bar)
    check(lambda trainer: make_likely(trainer.model, trainer.processing_class.eos_token_id), max_completion_length=20)
    assert [bar.left for bar in seen] == [0]


def test_without_a_reward_model_the_policy_alone_is_looked_at(check):
    assert [found.name for found in check(adapter=False)] == NAMES[:8]


def test_every_reward_model_is_looked_at(make_trainer, reward_adapter, other_reward_adapter, tokenizer, tmp_path):
    """The second is named, and refused where it is the one without spread."""
    trainer = make_trainer()
    base, folder = trainer.model.get_base_model(), Path(shutil.copytree(reward_adapter, tmp_path / "reward"))
    (folder / "metrics.json").write_text(json.dumps(MEASURED))
    trainer.model.add_role("reward_2", read_adapter(other_reward_adapter, needs_head=True, base=base))
    adapters = {"reward": str(folder), "reward_2": other_reward_adapter}
    checks = preflight(trainer.model, PROMPTS, tokenizer, trainer.args, adapters)
    second = [name for name in NAMES[8:] if "calibration" not in name]  # it has no metrics file
    assert [found.name for found in checks] == NAMES + [f"{name} (reward_2)" for name in second]
    trainer.model.heads["reward_2"].weight.data.zero_()
    with pytest.raises(ValueError, match=r"scores vary on SFT completions \(reward_2\): 0, ") as caught:
        preflight(trainer.model, PROMPTS, tokenizer, trainer.args, adapters)
    assert "completions: " not in str(caught.value)


def test_the_mode_and_the_weights_are_left_as_they_were(make_trainer, tokenizer):
    trainer = make_trainer()
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    for training in (True, False):
        trainer.model.train(training)
        preflight(trainer.model, PROMPTS, tokenizer, trainer.args)
        assert trainer.model.training is training
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())


def with_dropout(trainer):
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1


def with_a_moved_policy(trainer):
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data += 0.05


def with_no_positions(trainer):
    """As a model that counts padding as positions when it is scored."""
    original = trainer.model.hidden_states

    def hidden_states(role, input_ids, attention_mask, trunk=None):
        return original(role, input_ids, torch.ones_like(attention_mask), trunk)

    trainer.model.hidden_states = hidden_states


def with_pads_attended(trainer):
    """Scored with attention to the padding at the left, and positions that are right."""
    base = trainer.model.get_base_model().base_model
    original = base.forward
    base.forward = lambda *args, attention_mask=None, **kwargs: original(
        *args,
        attention_mask=attention_mask
        if kwargs.get("use_cache", True) or attention_mask is None
        else torch.ones_like(attention_mask),
        **kwargs,
    )


def with_no_temperature_in_scoring(trainer):
    original = trainer.model.logprobs_and_entropy
    trainer.model.logprobs_and_entropy = lambda role, ids, mask, chosen, temperature=1.0, trunk=None: original(
        role, ids, mask, chosen, 1.0, trunk
    )


def with_no_temperature_in_sampling(trainer):
    """As a warper that is lost: the recorded logprobs know nothing of it."""
    base = trainer.model.get_base_model()
    original = base.generate

    def generate(generation_config, **asked):
        generation_config.temperature = 1.0
        return original(generation_config=generation_config, **asked)

    base.generate = generate


def with_tokens_suppressed(trainer):
    """Half of the vocabulary is never drawn."""
    base = trainer.model.get_base_model()
    original = base.generate

    def generate(generation_config, **asked):
        generation_config.suppress_tokens = list(range(0, base.config.vocab_size, 2))
        return original(generation_config=generation_config, **asked)

    base.generate = generate


def with_a_layer_left_out(trainer):
    """One LoRA layer that scoring does not switch on."""
    original = trainer.model.logprobs_and_entropy
    layer = trainer.model._tuned[3]

    def logprobs(role, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(layer), "disable_adapters", property(lambda self: self is layer or self._disable_adapters)
            )
            return original(role, *args, **options)

    trainer.model.logprobs_and_entropy = logprobs


def with_another_sampler(trainer):
    """The bare backbone samples."""
    base = trainer.model.get_base_model()
    original = base.generate

    def generate(**asked):
        with trainer.model.role(None):
            return original(**asked)

    base.generate = generate


def with_scaled_logits(trainer):
    """The model's own forward halves its logits, which nothing that reads the head knows of."""

    def halve(module, args, kwargs, output):
        output.logits = output.logits / 2
        return output

    trainer.model.get_base_model().register_forward_hook(halve, with_kwargs=True)


def with_a_dead_head(trainer):
    trainer.model.heads["reward"].weight.data.zero_()


def with_nan_logprobs(trainer):
    """Of the reference alone, in its first batch."""
    original, calls = trainer.model.logprobs_and_entropy, []

    def logprobs(role, *args, **options):
        found, entropy = original(role, *args, **options)
        calls.append(role)
        return (found * math.nan if role == "reference" and calls.count(role) == 1 else found), entropy

    trainer.model.logprobs_and_entropy = logprobs


@pytest.mark.parametrize(
    ("spoil", "name", "remedy"),
    [
        (with_dropout, "dropout is off", "set disable_dropout: true"),
        (with_a_moved_policy, "KL is 0 at step 0", "which start as the same adapter"),
        (with_nan_logprobs, "KL is 0 at step 0: nan", "which start as the same adapter"),
        (with_no_positions, "sampled and rescored logprobs agree", "check positions, padding, attention"),
        (with_no_positions, "scores do not depend on batch and padding", "alone and its scores in batches padded"),
        (with_pads_attended, "sampled and rescored logprobs agree", "check positions, padding, attention"),
        (with_pads_attended, "scores do not depend on batch and padding", "alone and its scores in batches padded"),
        (with_no_temperature_in_scoring, "sampled and rescored logprobs agree", "attention and temperature"),
        (with_no_temperature_in_sampling, "tokens are drawn from the policy", "options that cut or penalise tokens"),
        (with_tokens_suppressed, "sampled and rescored logprobs agree", "attention and temperature"),
        (with_a_layer_left_out, "sampling and scoring run the same adapters: 1, ", "transformer.h.0"),
        (with_another_sampler, "importance ratios start near 1", "where PPO clips"),
        (with_another_sampler, "sampling and scoring run the same adapters: 8, ", "Backbone.role"),
        (with_no_positions, "logprobs do not depend on the side of the padding", "counts padding as tokens"),
        (with_scaled_logits, "logprobs are the model's own", "a different model from the one that samples"),
        (with_a_dead_head, "scores vary on SFT completions: 0, bound at least 0.001", "there is nothing to learn"),
    ],
)
def test_a_fault_is_refused(check, spoil, name, remedy):
    with pytest.raises(ValueError, match="^PPO is refused before it starts") as caught:
        check(spoil, temperature=0.5, max_completion_length=24)
    assert name in str(caught.value) and remedy in str(caught.value)


def test_a_trunk_that_is_not_the_full_pass_is_refused(check):
    def spoil(trainer):
        assert trainer.model.trunk_depth == 1
        original = trainer.model.trunk
        trainer.model.trunk = lambda *args: original(*args) * 1.5

    top = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        layers_to_transform=[1],
        layers_pattern="h",
    )
    found = by_name(check(adapter=False, policy=top))
    assert found["a pass from the trunk is the full pass"].measured < 1e-5
    with pytest.raises(ValueError, match="a pass from the trunk is the full pass: .* train an adapter of all layers"):
        check(spoil, adapter=False, policy=top)


@pytest.mark.parametrize(("accuracy", "bound", "result"), [(0.56, 0.55, "passed"), (0.5, 0.5, "passed")])
def test_a_reward_model_that_is_good_enough(check, accuracy, bound, result):
    found = by_name(check(metrics={"accuracy": accuracy, "ece": 0.0}, min_reward_accuracy=bound))
    assert found["reward model's accuracy"].result == result


def test_a_reward_model_at_chance_is_refused(check):
    message = r"reward model's accuracy: 0\.52, bound at least 0\.55\. .* lower min_reward_accuracy"
    with pytest.raises(ValueError, match=message):
        check(metrics={"accuracy": 0.52, "ece": 0.0})


def test_a_reward_model_that_nobody_measured_is_a_warning(check):
    found = by_name(check(metrics=None))["reward model's accuracy"]
    assert (found.result, found.measured) == ("warning", None)
    assert str(found).startswith(
        "reward model's accuracy: unknown, bound at least 0.55. The adapter's metrics.json is missing"
    )


def test_an_overconfident_reward_model_is_a_warning(check):
    assert (
        by_name(check(metrics={"accuracy": 0.7, "ece": 0.2}))["reward model's calibration error"].result == "warning"
    )


def test_scores_that_are_lengths_are_a_warning(check):
    def by_length(trainer):
        end = trainer.processing_class.eos_token_id
        make_likely(trainer.model, end)
        original = trainer.model.scores
        trainer.model.scores = lambda ids, mask, role: original(ids, mask) * 1e-3 - mask.sum(dim=1)

    found = by_name(check(by_length))["scores are not lengths"]
    assert found.result == "warning" and found.measured > 0.5
    assert "(-" in found.why and "will write shorter texts before it writes better texts" in found.why


@pytest.mark.parametrize("option", [{"top_k": 50}, {"top_p": 0.9}, {"generation_kwargs": {"typical_p": 0.9}}], ids=str)
def test_sampling_from_another_distribution_is_a_warning(check, option):
    ((name, value),) = option.items()
    found = by_name(check(**option))[f"{name} is unset"]
    assert (
        found.result == "warning"
        and f"{name}={value!r} changes the distribution that tokens are sampled from" in found.why
    )


def test_several_refusals_come_together(check):
    with pytest.raises(ValueError) as caught:
        check(with_a_dead_head, metrics={"accuracy": 0.4, "ece": 0.0})
    assert "reward model's accuracy: 0.4" in str(caught.value) and "scores vary" in str(caught.value)


def test_a_check_shows_itself():
    shown = Check("KL is 0 at step 0", 0.123456, "at most 0.001", "refused", "Why.")
    assert str(shown) == "KL is 0 at step 0: 0.1235, bound at most 0.001. Why."


def test_what_only_sampling_follows_is_named():
    options = {"output_dir": "out", "report_to": "none", "use_cpu": True}
    assert sampled_with(PPOConfig(**options)) == ""
    assert sampled_with(PPOConfig(**options, repetition_penalty=2.0, top_k=5)) == (
        " Sampling also has top_k=5, repetition_penalty=2.0, which training does not follow."
    )
