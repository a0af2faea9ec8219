"""`pipeline.rl.trainer`: what an update is, and what each option does to it, on a two-layer GPT-2."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import PROMPTS, make_likely
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback

from pipeline.backbone.adapters import read_adapter
from pipeline.rl import rollout
from pipeline.rl import trainer as trainer_module
from pipeline.rl.trainer import PPOTrainer
from reward_models.composite import RewardError
from reward_models.functions import PROTOCOL
from reward_models.learned import KNOWN_SCORES, LearnedReward


pytestmark = pytest.mark.slow


def words(completions, **kwargs):
    return [float(len(completion.split())) for completion in completions]


EVERYTHING = {"critic": "head", "whiten_rewards": True, "kl_estimator": "k3", "normalize_scores": True, "beta": 0.3}


@pytest.mark.parametrize(
    "options",
    [{}, EVERYTHING | {"critic": "adapter"}, EVERYTHING],
    ids=["defaults", "all options", "all options and critic=head"],
)
def test_an_update_starts_at_ratio_one_and_kl_zero(make_trainer, options):
    trainer = make_trainer(**options)
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


TOP_LAYER = LoraConfig(
    task_type="CAUSAL_LM",
    r=4,
    target_modules=["c_attn", "c_fc"],
    fan_in_fan_out=True,
    layers_to_transform=[1],
    layers_pattern="h",
)


@pytest.mark.parametrize("options", [{"critic": "head"}, {"value_init": "policy"}, {"value_init": "reward"}], ids=str)
def test_the_trunk_changes_no_result(make_trainer, options, caplog):
    results = []
    for share in (True, False):
        torch.manual_seed(0)  # the policy's adapter is drawn
        trainer = make_trainer(policy=TOP_LAYER, **options)
        assert trainer.model.trunk_depth == 1
        if not share:
            trainer.model.trunk_depth, trainer.model.value_has_trunk = 0, False
        trainer.train()
        assert (trainer._rollout.trunk is not None) == share
        of_value = trainer._rollout.value_trunk
        assert (of_value is not None) == (share and options.get("value_init") == "reward")
        results.append({n: p for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, parameter in results[0].items():
        torch.testing.assert_close(parameter, results[1][name], atol=1e-5, rtol=0)


# The oldest transformers that is allowed has the old name alone.
IS_CHECKPOINTING = (
    f"is_{'activation' if hasattr(PreTrainedModel, 'is_activation_checkpointing') else 'gradient'}_checkpointing"
)


@pytest.mark.parametrize("policy", [None, TOP_LAYER], ids=["all layers", "top layer"])
def test_gradient_checkpointing_changes_no_result(make_trainer, policy):
    results, in_rollouts = [], []

    def count(completions, **kwargs):
        in_rollouts.append(getattr(trainer.model, IS_CHECKPOINTING))
        return words(completions)

    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer([count], policy=policy, gradient_checkpointing=checkpointing)
        trainer.train()
        assert getattr(trainer.model, IS_CHECKPOINTING) is checkpointing
        results.append([p.detach().clone() for p in trainer.model.role_parameters("policy", "value")])
    assert in_rollouts == [False] * 4  # where it would do away with the cache
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_where_the_trunk_is_not_shared(make_trainer, caplog):
    trainer = make_trainer(policy=TOP_LAYER, value_init="reward")
    assert trainer.model.trunk_depth == 1
    assert (
        "The value adapter is frozen in the lowest 1 layers, which the policy's adapter does not change" in caplog.text
    )
    trainer = make_trainer(policy=TOP_LAYER, disable_dropout=False)
    assert trainer.model.trunk_depth == 0 and "disable_dropout=False changes their states" in caplog.text


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
        return [tuple(row) for batch in batches for row in batch.completion_ids.tolist()]

    epochs = [rows(seen[start : start + 4]) for start in range(0, 16, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and sorted(epochs[2]) == sorted(epochs[3])
    assert epochs[0] != epochs[1] and epochs[2] != epochs[3]
    assert sorted(epochs[0]) != sorted(epochs[2])


def test_each_pass_over_the_prompts_has_an_order_of_its_own(make_trainer):
    passes = []

    def noting(prompts, **kwargs):
        passes.append(list(prompts))
        return [0.0] * len(prompts)

    make_trainer(reward_funcs=[noting], max_steps=12).train()
    assert len(passes) == 3 and all(sorted(asked) == sorted(PROMPTS) for asked in passes)
    assert passes[0] != passes[1] != passes[2]


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
    mask = rollout.completion_mask
    for prompt, ids, real in zip(PROMPTS, rollout.prompt_ids, rollout.prompt_mask, strict=True):
        assert tokenizer.decode(ids[real]) == prompt
    ends = rollout.completion_ids == tokenizer.eos_token_id
    assert (ends & mask).sum() == ends.any(dim=1).sum()  # the end-of-text token is real, and only the first one
    rows = [
        torch.cat([p[pm], c[cm]]).tolist()
        for p, pm, c, cm in zip(rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, mask, strict=True)
    ]
    scores = [
        trainer.model.scores(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)).item() for row in rows
    ]
    penalty = 0.5 * trainer._metrics["train"]["kl"][-1]
    assert abs(penalty) > 1e-3
    # With gamma = lambda = 1 the return of the first token is the whole reward: score less KL penalty.
    assert rollout.returns[:, 0].mean().item() == pytest.approx(sum(scores) / len(scores) - penalty, abs=1e-4)


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
    heads = trainer.model.heads
    assert torch.equal(heads["value"].weight, heads["reward"].weight)  # of the first reward, at its weight of 1
    heads = make_trainer(reward_weights=[-0.5]).model.heads
    assert torch.equal(heads["value"].weight, -0.5 * heads["reward"].weight)


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


def shortened(generate, length):
    """A trainer's `_generate`, its completions cut to `length(i)` tokens."""

    def cut(prompts):
        prompt_ids, rows, completions, logprobs = generate(prompts)
        rows, logprobs = ([row[: length(i)] for i, row in enumerate(found)] for found in (rows, logprobs))
        return prompt_ids, rows, completions, logprobs

    return cut


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
        trainer._generate = shortened(trainer._generate, lambda i: 1 + i % 6)
        trainer.train()
        assert sorted(trainer._rollout.completion_mask.sum(dim=1).tolist()) == [1, 1, 2, 2, 3, 4, 5, 6]
        results.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", [None, TOP_LAYER], ids=["all layers", "top layer"])
def test_columns_of_padding_alone_are_left_out(make_trainer, monkeypatch, policy):
    """Pieces hold rows of about one length, cut to the longest, in scoring and in training; the result is that of whole
    rows, and the first ratio is exactly 1."""
    prompts = [" ".join(["film"] * (1 + 4 * (i % 3))) for i in range(8)]
    results = []
    for width in (rollout.WIDTH, 1000):
        monkeypatch.setattr(rollout, "WIDTH", width)
        torch.manual_seed(0)  # the policy's adapter is drawn
        trainer = make_trainer(prompts=prompts, policy=policy, max_completion_length=40, optim="sgd", max_grad_norm=0)
        loss, scored, trained, lengths = trainer._compute_loss, [], [], []
        uneven = shortened(trainer._generate, lambda i: 36 - 5 * i)

        def note(ids, mask, length, trunk=None, values=trainer.model.values, scored=scored, **role):
            scored.append(ids.shape[1])
            return values(ids, mask, length, trunk, **role)

        def learn(model, inputs, loss=loss, trained=trained, lengths=lengths):
            lengths.append((inputs.prompt_mask.sum(dim=1) + inputs.completion_mask.sum(dim=1)).tolist())
            trained.append(inputs.prompt_ids.shape[1] + inputs.completion_ids.shape[1])
            return loss(model, inputs)

        trainer._generate, trainer.model.values, trainer._compute_loss = uneven, note, learn
        trainer.train()
        rows = [row for row in trainer.state.log_history if "approxkl" in row]
        assert rows[0]["approxkl"] == 0 and rows[1]["approxkl"] > 0
        assert all(max(short) <= min(long) for short, long in zip(lengths[::2], lengths[1::2], strict=True))
        results.append([p.detach().clone() for p in trainer.model.role_parameters("policy", "value")])
        results[-1].append((scored, trained, trainer._rollout))
    (*ours, (scored, trained, kept)), (*whole, (_, widths, other)) = results
    full = kept.prompt_ids.shape[1] + kept.completion_ids.shape[1]
    assert set(widths) == {full}
    assert min(scored) < full and min(trained) < full and not any(width % 16 for width in scored + trained)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for name in ("completion_ids", "logprobs", "values", "advantages"):
        real = kept.completion_mask
        torch.testing.assert_close(getattr(kept, name)[real], getattr(other, name)[real], atol=1e-5, rtol=0)


def test_a_score_from_the_trunk_is_that_of_its_row(make_trainer, tokenizer):
    """Rows are scored in order of length; each gets back what the reward model gives it by itself."""
    trainer = make_trainer(policy=TOP_LAYER, max_completion_length=12)
    reward = LearnedReward(trainer.model, tokenizer)
    with torch.no_grad():  # in layer 0 the reward model sees what the bare backbone sees
        below = [p for n, p in trainer.model.named_parameters() if ".h.0." in n and ".lora_B.reward." in n]
        assert below and all(p.zero_().sum() == 0 for p in below)
    trainer._roles_on_trunk = [reward.role]
    score, seen = trainer._scores, []
    uneven = shortened(trainer._generate, lambda i: 8 - i)

    def note(inputs, prompts, completions, rows):
        seen.append(([row[KNOWN_SCORES][reward.role] for row in inputs], reward._scores(prompts, rows)))
        return score(inputs, prompts, completions, rows)

    trainer._generate, trainer._scores = uneven, note
    trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    ((known, alone),) = seen
    assert len({round(score, 4) for score in known}) == len(PROMPTS)
    assert known == pytest.approx(alone, abs=1e-5)


def test_a_learned_reward_scores_without_dropout(backbone, tokenizer):
    reward, asked = LearnedReward(backbone, tokenizer), {"prompts": ["A", "The film"], "completion_ids": [[5, 6], [7]]}
    expected = reward(**asked)
    backbone.train()
    assert reward(**asked) == expected and backbone.training


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


class Recorder(TrainerCallback):
    """The weights that train and Adam's moments of them, as each step ends, by the step's number; 0 is the start."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.moments = trainer, {}, {}
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self._record(0)

    def on_step_end(self, args, state, control, **kwargs):
        self._record(state.global_step)

    def _record(self, step):
        named = {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        self.weights[step] = {name: p.detach().clone() for name, p in named.items()}
        states = self.trainer.optimizer.state
        self.moments[step] = {
            name: {key: torch.as_tensor(value).clone() for key, value in states[p].items()}
            for name, p in named.items()
            if p in states
        }

    def changed(self, first, last):
        """Names of the weights that are not bit-identical."""
        return {name for name, p in self.weights[first].items() if not torch.equal(p, self.weights[last][name])}


def all_equal(some, others):
    return some.keys() == others.keys() and all(
        all_equal(x, others[name]) if isinstance(x, dict) else torch.equal(x, others[name]) for name, x in some.items()
    )


# ------------------------------------------------------------------------------------------ early stop, warm-up, beta
def test_an_update_that_went_too_far_takes_no_further_step(make_trainer):
    recorders, passes = {}, {}
    for bound in (None, 1e-12):
        recorder, passes[bound] = Recorder(make_trainer(max_approx_kl=bound)), []
        original = recorder.trainer._compute_loss
        recorder.trainer._compute_loss = lambda *args, f=original, p=passes[bound]: (p.append(1), f(*args))[1]
        recorder.trainer.train()
        recorders[bound] = recorder
    plain, stopped = recorders.values()
    # The second minibatch is the first with an approxkl above 0, seen in the first of its two pieces. Its step has
    # begun, and is taken whole: two steps of two passes an update, instead of four.
    assert [len(seen) for seen in passes.values()] == [16, 8]
    assert all_equal(stopped.weights[2], plain.weights[2])
    for step in (3, 4, 7, 8):
        assert all_equal(stopped.weights[step], stopped.weights[step - 1])
        assert all_equal(stopped.moments[step], stopped.moments[step - 1])
    assert stopped.changed(4, 5) == set(stopped.weights[0])  # the next update begins anew
    history = stopped.trainer.state.log_history
    rates = [row["learning_rate"] for row in history if "learning_rate" in row]
    assert rates == pytest.approx([1e-2 * (8 - step) / 8 for step in range(8)])  # goes on to 0 through skipped steps
    assert [row["grad_norm"] > 0 for row in history if "grad_norm" in row] == [True, True, False, False] * 2


def test_how_far_an_update_went_is_that_of_whole_steps(make_trainer, tokenizer, monkeypatch):
    """Over the tokens of both pieces of a step, whose completions differ in length."""
    trainer, pieces, steps = make_trainer(max_approx_kl=100.0), [], []
    make_likely(trainer.model, tokenizer.eos_token_id)
    original = PPOTrainer._compute_loss

    def compute(self, model, inputs):
        loss = original(self, model, inputs)
        pieces.append((self._metrics["train"]["approxkl"][-1], inputs.completion_mask.sum().item()))
        steps.append(self._approx_kl)
        return loss

    monkeypatch.setattr(PPOTrainer, "_compute_loss", compute)
    trainer.train()
    for (first, tokens), (second, others), found in zip(pieces[::2], pieces[1::2], steps[1::2], strict=True):
        assert found == pytest.approx((first * tokens + second * others) / (tokens + others), rel=1e-5)
    assert max(steps) > 0 and any(a[1] != b[1] for a, b in zip(pieces[::2], pieces[1::2], strict=True))


def test_gradients_are_clipped(make_trainer):
    """A step of plain descent is as long as the gradient times the learning rate."""
    for bound in (1.0, 0.1):
        recorder = Recorder(make_trainer(max_grad_norm=bound, optim="sgd", lr_scheduler_type="constant"))
        recorder.trainer.train()
        moved = [(p - recorder.weights[0][name]).square().sum() for name, p in recorder.weights[1].items()]
        assert sum(moved).sqrt().item() == pytest.approx(1e-2 * bound, rel=1e-3)


def test_what_was_measured_is_logged_though_an_evaluation_came_between(make_trainer):
    """Steps 3 and 4 are skipped; the evaluation after step 2 left the model in evaluation mode, by which logs go."""
    given = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "logging_steps": 4}
    trainer = make_trainer(max_approx_kl=1e-12, held_out=PROMPTS[:2], **given)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert [row["step"] for row in rows] == [4, 8]
    assert all(row.keys() >= {"kl", "approxkl", "score"} for row in rows)


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_in_the_warm_up_the_value_alone_trains(make_trainer, critic):
    recorder = Recorder(make_trainer(critic=critic, critic_warmup_updates=1, weight_decay=0.1, entropy_coef=0.1))
    recorder.trainer.train()
    of_value = {name for name in recorder.weights[0] if "value" in name}
    assert "heads.value.weight" in of_value and len(of_value) > (critic == "adapter")
    assert recorder.changed(0, 4) == of_value
    assert recorder.moments[4].keys() == of_value
    assert recorder.changed(4, 8) == set(recorder.weights[0])
    firsts = [row for row in recorder.trainer.state.log_history if "kl" in row]
    assert [row["kl"] for row in firsts] == [0, 0]


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_the_value_has_its_own_learning_rate(make_trainer, critic):
    recorder = Recorder(make_trainer(critic=critic, value_learning_rate=0.0, weight_decay=0.1))
    recorder.trainer.train()
    of_value = {name for name in recorder.weights[0] if "value" in name}
    assert of_value and recorder.changed(0, 8) == set(recorder.weights[0]) - of_value
    groups = recorder.trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(recorder.weights[0])
    assert all(group["weight_decay"] == 0.1 for group in groups if group["params"])


def test_the_same_learning_rate_by_another_name_changes_nothing(make_trainer):
    """Each group of the optimizer is stepped by itself, and a linear schedule scales each group's own rate."""
    weights = []
    for rate in (None, 1e-2):
        trainer = make_trainer(learning_rate=1e-2, value_learning_rate=rate)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_beta_moves_towards_the_target(make_trainer):
    # 8 completions, horizon 8: a factor of 1 - 0.2 at the KL of 0 of the first rollout, and 1 + 0.2 at most after it.
    for target, factor in ((1e9, 0.8), (1e-9, 1.2)):
        trainer = make_trainer(beta=0.5, kl_target=target, kl_horizon=8, max_steps=12, learning_rate=0.1)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "kl" in row]
        assert rows[1]["kl"] > 0
        assert [row["beta"] for row in rows] == pytest.approx([0.5, 0.5 * 0.8, 0.5 * 0.8 * factor])


def test_beta_waits_for_the_warm_up(make_trainer):
    trainer = make_trainer(beta=0.5, kl_target=1.0, kl_horizon=8, max_steps=12, critic_warmup_updates=1)
    trainer.train()
    # The KL of 0 of the first rollout is that of a policy that cannot move; that of the second is 0 still.
    rows = [row for row in trainer.state.log_history if "kl" in row]
    assert [row["beta"] for row in rows] == pytest.approx([0.5, 0.5, 0.4])


# ------------------------------------------------------------------------------------------ the reward of a token
def rollout_of(trainer):
    """A rollout of a policy away from its reference."""
    torch.manual_seed(3)
    trainer.model.train()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])


def test_rewards_are_whitened_before_advantages(make_trainer):
    """With gamma = lambda = 1, returns are sums of rewards to come, and their differences are the rewards."""
    rewards = []
    for whiten in (False, True):
        options = {"gamma": 1.0, "lam": 1.0, "beta": 0.5, "normalize_advantages": False}
        rollout = rollout_of(make_trainer(whiten_rewards=whiten, **options))
        to_go = rollout.returns
        following = torch.cat([to_go[:, 1:], torch.zeros(len(to_go), 1)], dim=1)
        rewards.append((to_go - following)[rollout.completion_mask].double())
    plain, whitened = rewards
    assert whitened.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert whitened.mean().item() == pytest.approx(plain.mean().item(), abs=1e-4)  # it stays
    scale = plain.std(correction=0)
    torch.testing.assert_close(whitened - plain.mean(), (plain - plain.mean()) / scale, atol=1e-4, rtol=0)


def test_k3_is_what_is_punished_and_k1_what_is_logged(make_trainer):
    sums, logged = {}, {}
    for kl_estimator in ("k1", "k3"):
        trainer = make_trainer(reward_funcs=[nought], beta=1.0, gamma=1.0, lam=1.0, kl_estimator=kl_estimator)
        sums[kl_estimator] = rollout_of(trainer).returns[:, 0]
        logged[kl_estimator] = trainer._metrics["train"]["kl"][-1]
    assert logged["k1"] == logged["k3"] == pytest.approx(-sums["k1"].mean().item(), abs=1e-5)
    assert (sums["k3"] < 0).all() and not torch.allclose(sums["k3"], sums["k1"], atol=1e-3)


def nought(completions, **kwargs):
    return [0.0 for _ in completions]


# ------------------------------------------------------------------------------------------ the loss
TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [19, 20, 21]]


def test_the_loss_has_the_gradients_of_finite_differences(make_trainer):
    """Policy, value, entropy and text loss together, in float64, in both branches of both clips."""
    trainer = make_trainer(
        entropy_coef=0.3, ptx_coef=0.7, vf_coef=0.5, texts=TEXTS, per_device_train_batch_size=8,
        steps_per_generation=1, gradient_accumulation_steps=1, temperature=0.7,
    )  # fmt: skip
    trainer.model.double()
    rollout = rollout_of(trainer)
    moved = {"logprobs": 0.3, "values": 0.3}  # as if the policy and the value had been elsewhere
    noise = {name: size * torch.randn_like(getattr(rollout, name)) for name, size in moved.items()}
    inputs = replace(rollout, **{name: getattr(rollout, name) + noise[name] for name in moved})

    trainer._compute_loss(trainer.model, inputs).backward()
    shares = [trainer._metrics["train"][f"clipfrac/{name}"][-1] for name in ("policy", "value")]
    assert all(0.05 < share < 0.95 for share in shares)
    for part in ("lora_A.default", "lora_B.default", "lora_A.value", "lora_B.value", "heads.value"):
        name, weight = next((n, p) for n, p in reversed(list(trainer.model.named_parameters())) if part in n)
        index = divmod(weight.grad.abs().argmax().item(), weight.shape[1])
        around = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                weight[index] += step
                around.append(trainer._compute_loss(trainer.model, inputs).item())
            weight[index] += 1e-6
        expected = (around[0] - around[1]) / 2e-6
        assert abs(expected) > 1e-4
        assert weight.grad[index].item() == pytest.approx(expected, rel=1e-5), name


def test_the_entropy_bonus_raises_the_entropy(make_trainer):
    ends = []
    for coefficient in (0.0, 10.0):
        trainer = make_trainer(entropy_coef=coefficient)
        trainer.train()
        ends.append([row["entropy"] for row in trainer.state.log_history if "entropy" in row][-1])
    assert ends[1] > ends[0] + 0.01


def test_texts_keep_their_likelihood(make_trainer):
    losses = {}
    for coefficient in (1e-9, 5.0):
        trainer = make_trainer(ptx_coef=coefficient, texts=TEXTS, learning_rate=3e-2)
        trainer.train()
        losses[coefficient] = [row["loss/ptx"] for row in trainer.state.log_history if "loss/ptx" in row]
        assert len(losses[coefficient]) == 8
    assert losses[5.0][-1] < losses[1e-9][-1] - 0.1


def texts_of(trainer, step):
    trainer._step = step
    ids, mask = trainer._next_texts()
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def test_the_order_of_texts_depends_on_seed_and_pass_alone(make_trainer):
    first, again, other = (make_trainer(ptx_coef=0.1, texts=TEXTS, seed=seed) for seed in (0, 0, 1))
    orders = [texts_of(first, step) for step in range(10)]
    torch.manual_seed(99)
    assert [texts_of(again, step) for step in reversed(range(10))] == orders[::-1]
    assert [texts_of(other, step) for step in range(10)] != orders
    rows = [row for order in orders for row in order]  # 10 passes of 2 texts: 4 epochs of 5
    for start in range(0, 20, 5):
        assert sorted(rows[start : start + 5]) == sorted(TEXTS)
    assert rows[:5] != rows[5:10]


@pytest.mark.parametrize("given", [{"ptx_coef": 0.1}, {"texts": TEXTS}, {"ptx_coef": 0.1, "texts": []}])
def test_texts_and_their_coefficient_belong_together(make_trainer, given):
    with pytest.raises(ValueError, match="ptx_coef=.* and ptx_dataset_name belong together. Set both or neither"):
        make_trainer(**given)


# ------------------------------------------------------------------------------------------ what is no number
def poison(trainer, monkeypatch, where, number):
    """From pass `number` on (counting from 0), NaN in the loss, in the text loss, or in gradients alone."""
    passes, original = [], trainer._compute_loss

    def compute_loss(*args):
        passes.append(1)
        return original(*args)

    def ill():
        return len(passes) > number

    trainer._compute_loss = compute_loss
    if where == "gradients":
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_B.default" in name)
        weight.register_hook(lambda gradient: gradient * math.nan if ill() else gradient)
        return
    name = {"loss": "value_loss", "texts": "text_loss"}[where]
    function = getattr(trainer_module, name)

    def poisoned(*args, **options):
        result = function(*args, **options)
        if not ill():
            return result
        return result * math.nan if isinstance(result, torch.Tensor) else tuple(x * math.nan for x in result)

    monkeypatch.setattr(trainer_module, name, poisoned)


@pytest.mark.parametrize(
    ("where", "number"),  # of the pass: steps have two of them
    [("loss", 0), ("loss", 4), ("loss", 5), ("texts", 5), ("gradients", 4), ("gradients", 5)],
)
def test_what_is_no_number_stops_training_with_finite_weights(make_trainer, monkeypatch, tmp_path, where, number):
    options = {"ptx_coef": 0.1, "texts": TEXTS} if where == "texts" else {}
    recorder = Recorder(make_trainer(max_grad_norm=1.0, **options))
    trainer = recorder.trainer
    poison(trainer, monkeypatch, where, number)
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    taken = number // 2
    for name, parameter in trainer.model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.requires_grad:
            assert torch.equal(parameter, recorder.weights[taken][name]), name
    assert trainer.state.global_step < 8
    said = str(caught.value)
    assert said.startswith("The gradient's norm is nan" if where == "gradients" else "The loss is nan")
    assert f"at step {taken + 1}: training has diverged" in said
    assert "NaN" not in json.dumps(trainer.state.log_history)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    for folder in (checkpoint, checkpoint / "value"):
        assert all(tensor.isfinite().all() for tensor in read_adapter(str(folder)).weights.values())


def test_a_reward_function_that_exits_in_mid_training_leaves_a_checkpoint(make_trainer, tmp_path):
    calls = []

    def leaves(completions, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise SystemExit(0)
        return list(map(float, range(len(completions))))

    with pytest.raises(RewardError, match=r"'leaves' raised SystemExit: 0\. .* resume from .*checkpoint-4 with"):
        make_trainer([leaves]).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    trainer = make_trainer([leaves])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8


# ------------------------------------------------------------------------------------------ evaluation, best checkpoint
def fading(completions, trainer_state, **kwargs):
    """Worth less with every step, so that the first checkpoint is the best."""
    return [-1.0 - trainer_state.global_step] * len(completions)


@pytest.mark.parametrize("critic", ["adapter", "head"])
@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_the_best_checkpoint_is_what_remains(make_trainer, tmp_path, critic, save_strategy):
    recorder = Recorder(
        make_trainer(
            reward_funcs=[fading], held_out=PROMPTS[:5], critic=critic, save_strategy=save_strategy, save_steps=4,
            eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=2, load_best_model_at_end=True,
            metric_for_best_model="score",
        )
    )  # fmt: skip
    trainer = recorder.trainer
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_score" in row]
    assert [row["eval_score"] for row in rows] == [-5, -9]
    assert all(row.keys() >= {"eval_kl", "eval_loss", "eval_value", "eval_rewards/fading/mean"} for row in rows)
    assert all(row["eval_kl"] != 0 for row in rows)
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert saved == ({"checkpoint-4"} if save_strategy == "best" else {"checkpoint-4", "checkpoint-8"})
    assert recorder.changed(4, 8) == set(recorder.weights[0])
    for name, expected in recorder.weights[4].items():
        assert torch.equal(trainer.model.get_parameter(name), expected), name


def test_metrics_of_an_evaluation_are_returned(make_trainer):
    metrics = make_trainer(held_out=PROMPTS[:3]).evaluate()
    assert metrics["eval_kl"] == 0 and metrics.keys() >= {"eval_score", "eval_reward", "eval_completions/mean_length"}


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_saved_values_are_those_that_trained(make_trainer, tmp_path, critic):
    trainer = make_trainer(critic=critic)
    trainer.train()
    trainer.save_model()
    fresh = make_trainer(critic=critic).model
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4)
    with torch.no_grad():
        expected = trainer.model.eval().values(ids, mask, 3)
        assert not torch.allclose(fresh.eval().values(ids, mask, 3), expected, atol=1e-3)
        fresh.load_role("policy", read_adapter(str(tmp_path)))
        fresh.load_role("value", read_adapter(str(tmp_path / "value"), needs_head=True))
        assert torch.equal(fresh.values(ids, mask, 3), expected)
        assert torch.equal(fresh.hidden_states("policy", ids, mask), trainer.model.hidden_states("policy", ids, mask))


# ------------------------------------------------------------------------------------------ pad == eos
def test_a_pad_token_that_is_the_end_of_text(make_trainer, tokenizer):
    """As gpt2's: the first one in a completion is real, ends it, and spares it the penalty; the others are padding."""
    end = tokenizer.eos_token_id
    penalty = {"missing_eos_penalty": 3.0, "beta": 0.0, "gamma": 1.0, "lam": 1.0}
    # So short that about half of the completions end: all or none of eight in one rollout of a hundred.
    trainer = make_trainer(reward_funcs=[ones], learning_rate=1e-3, max_completion_length=3, **penalty)
    tokenizer.pad_token = tokenizer.eos_token
    trainer.model.get_base_model().config.pad_token_id = end
    make_likely(trainer.model, end)
    trainer.train()
    rollout = trainer._rollout
    ids, mask = rollout.completion_ids, rollout.completion_mask
    ended = ((ids == end) & mask).any(dim=1)
    lengths = mask.sum(dim=1)
    assert ended.any() and not ended.all() and (lengths[ended] < ids.shape[1]).any()
    for row, length, over in zip(ids.tolist(), lengths.tolist(), ended.tolist(), strict=True):
        assert row[:length].count(end) == over
        assert row[length:] == [end] * (len(row) - length)
        assert row[length - 1] == end or not over
    # gamma = lambda = 1 and no KL penalty: the return of every real token is the score, 1 or 1 - 3.
    expected = torch.where(ended, 1.0, -2.0).unsqueeze(1).expand_as(mask).masked_fill(~mask, 0)
    torch.testing.assert_close(rollout.returns, expected, atol=1e-5, rtol=0)
    firsts = [row for row in trainer.state.log_history if "kl" in row]
    assert [row["approxkl"] for row in firsts] == [0, 0]
    assert not trainer.summary()["warnings"]


def ones(completions, **kwargs):
    return [1.0 for _ in completions]


def test_rollouts_do_not_see_the_models_generation_config(make_trainer):
    """Two trainers of one seed, one of a model that ships such a config: the same tokens."""
    found = []
    for own in ({}, {"min_new_tokens": 6, "suppress_tokens": [3, 4, 5], "repetition_penalty": 5.0, "top_k": 3}):
        trainer = make_trainer()
        make_likely(trainer.model, 3, 4, trainer.processing_class.eos_token_id)
        trainer.model.get_base_model().generation_config.update(**own)
        torch.manual_seed(0)
        found.append(trainer._generate(PROMPTS)[1])
    assert found[0] == found[1]


def test_a_rollout_logs_what_sampler_and_trainer_disagree_about(make_trainer):
    trainer = make_trainer()
    trainer.train()
    rows = [row for row in trainer.state.log_history if "kl" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["sampling/sampling_logp_difference/mean"] <= row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert trainer._rollout.weights is None
