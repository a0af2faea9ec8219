"""`pipeline.pages.compare_models`: the figures are PPO's, the policies are adapters on one backbone, and texts stream."""

import json
import shutil
import threading

import pytest
import torch
from conftest import PROMPTS, make_likely
from trl import ModelConfig

from data.prompts import tokenize_prompts
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.roles import load_backbone
from pipeline.backbone.sampling import sample
from pipeline.pages.compare_models import ADVANTAGE, KL, PREFIX, REWARD, VALUE, Completion, Sampling
from pipeline.pages.compare_tokens import pieces
from reward_models.composite import Composite, RewardError
from tests.pages.compare_run import OPTIONS, comparison_of, make_run, other


SAMPLING = Sampling(temperature=0.8, max_completion_length=6, seed=3)


@pytest.fixture
def run(tmp_path, sft_adapter, reward_adapter):
    return make_run(tmp_path / "demo", sft_adapter, reward_adapter)


@pytest.fixture
def comparison(run, tiny):
    return comparison_of(run, model=ModelConfig(tiny))


def completed(comparison, name="ppo", prompt="The film", sampling=SAMPLING) -> Completion:
    *_, last = comparison.complete(name, prompt, sampling)
    return last


@pytest.mark.slow
def test_figures_are_those_of_a_rollout(make_trainer, tiny, sft_adapter, reward_adapter, tmp_path):
    """Trained for two updates, so that policy, reference and value differ; then one more rollout is compared."""
    options = {name: x for name, x in OPTIONS.items() if name not in ("normalize_scores", "max_completion_length")}
    options |= {"kl_estimator": "k3", "reward_clip_range": [-0.25, 0.25]}
    torch.manual_seed(0)  # the value's adapter is drawn, whatever ran before
    trainer = make_trainer(normalize_scores=True, normalize_advantages=False, **options)
    trainer.train()
    end = trainer.processing_class.eos_token_id
    make_likely(trainer.model, end)
    seen = []
    trainer._record_rollout = lambda *args: seen.append(args)
    rollout = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    ((_, _, mask, scores, kl, rewards, advantages),) = seen
    # The policy has moved in most rows, scores are clipped, and some completions end before the limit.
    assert kl.abs().median() > 1e-3 and scores.abs().max() == 0.25 and not mask.all()
    run = tmp_path / "run"
    trainer.save_model(str(run / "ppo"))
    shutil.copytree(sft_adapter, run / "sft")
    shutil.copytree(reward_adapter, run / "reward")
    metrics = {"options": {**OPTIONS, **options}, "history": [{"beta": trainer.beta}]}
    (run / "ppo" / "metrics.json").write_text(json.dumps(metrics))
    comparison = comparison_of(run, model=ModelConfig(tiny))
    make_likely(comparison.backbone, end)
    prompt_ids = tokenize_prompts(PROMPTS, comparison.tokenizer)
    for row, prompt in enumerate(PROMPTS):
        real = mask[row]
        ids = rollout.completion_ids[row][real].tolist()
        found = comparison.measured("ppo", prompt, prompt_ids[row], ids, OPTIONS["temperature"])
        assert found.score == pytest.approx(scores[row].item(), abs=1e-5)
        assert sum(found.layers[KL]) == pytest.approx(kl[row].item(), abs=1e-5)
        for name, expected in ((VALUE, rollout.values), (REWARD, rewards), (ADVANTAGE, advantages)):
            torch.testing.assert_close(torch.tensor(found.layers[name]), expected[row][real], atol=1e-5, rtol=0)


def test_all_policies_are_adapters_on_one_backbone(comparison, run, tiny):
    names = ["sft", "ppo", "ppo/checkpoint-4", "bare backbone"]
    assert list(comparison.policies) == names
    found = {name: completed(comparison, name) for name in names}
    base = sum(parameter.numel() for parameter in load_pretrained(ModelConfig(tiny))[0].parameters())
    own = [parameter for name, parameter in comparison.backbone.named_parameters() if "lora_" not in name]
    assert sum(parameter.numel() for parameter in own) == base + 2 * 32  # and the heads of reward and value
    assert not any(parameter.requires_grad for parameter in comparison.backbone.parameters())
    assert not any(module.training for module in comparison.backbone.modules())
    assert len({each.answer for each in found.values()}) > 1
    (prompt_ids,) = tokenize_prompts(["The film"], comparison.tokenizer)
    for name in names[1:3]:  # added after the first policy, which is the one that was loaded with the backbone
        alone, tokenizer = load_backbone(ModelConfig(tiny), comparison.policies[name].folder)
        options = {"max_completion_length": 6, "temperature": 0.8, "batch_size": 1, "share_seed": (3,)}
        (batch,) = sample(alone.eval(), "policy", [prompt_ids], tokenizer, **options)
        assert found[name].pieces == pieces(batch.rows()[0], tokenizer)
    assert found["sft"].layers[KL] == [0.0] * len(found["sft"].pieces)
    assert max(map(abs, found["bare backbone"].layers[KL])) > 0.01


def test_a_prefix_score_is_the_score_of_the_text_up_to_the_token(comparison):
    assert comparison.layers == [KL, REWARD, VALUE, ADVANTAGE, PREFIX]
    (prompt_ids,) = tokenize_prompts(["The film"], comparison.tokenizer)
    end = comparison.tokenizer.eos_token_id
    ids = [11, 48, 1077, end]
    found = comparison.measured("ppo", "The film", prompt_ids, ids, 1.0)
    (learned,) = comparison.learned.values()
    expected = learned(["The film"] * 4, [ids[:length] for length in range(1, 5)])
    assert found.layers[PREFIX] == pytest.approx(expected, abs=1e-5)
    assert found.ended and found.rewards == {"reward": pytest.approx(expected[-1], abs=1e-5)}
    # Where one token pads and ends texts, a score is read before it.
    comparison.backbone.get_base_model().config.pad_token_id = end
    last = comparison.measured("ppo", "The film", prompt_ids, ids, 1.0).layers[PREFIX]
    assert last[:3] == pytest.approx(expected[:3], abs=1e-5) and last[3] == last[2]


def test_a_text_grows_and_ends_as_the_completion(comparison):
    *texts, last = comparison.complete("ppo", "The film", SAMPLING)
    assert len(texts) >= len(last.pieces) and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert texts[-1] == last.answer
    assert [len(values) for values in last.layers.values()] == [len(last.pieces)] * 5
    again = completed(comparison)
    assert again == last  # the same seed
    assert completed(comparison, sampling=Sampling(0.8, 6, seed=4)).pieces != last.pieces


def test_sampling_stops_when_nobody_waits(comparison):
    drawn = comparison.complete("ppo", "The film", Sampling(max_completion_length=100, seed=1))
    next(drawn)
    drawn.close()
    assert [thread.name for thread in threading.enumerate() if "work" in thread.name] == []
    assert completed(comparison).pieces  # the model is free again


def test_policies_without_a_value_or_a_reward_have_the_other_figures(run, tiny):
    shutil.rmtree(run / "ppo" / "value")
    comparison = comparison_of(run, model=ModelConfig(tiny))
    assert comparison.layers == [KL, REWARD, PREFIX] and set(completed(comparison).layers) == {KL, REWARD, PREFIX}
    shutil.rmtree(run / "reward")
    comparison = comparison_of(run, model=ModelConfig(tiny))
    found = completed(comparison)
    assert comparison.layers == [KL] == list(found.layers) and found.score is None and found.rewards == {}


def test_whitened_rewards_give_no_advantages(run, tiny):
    path = run / "ppo" / "metrics.json"
    path.write_text(json.dumps({"options": OPTIONS | {"whiten_rewards": True}}))
    assert set(completed(comparison_of(run, model=ModelConfig(tiny))).layers) == {KL, REWARD, VALUE, PREFIX}


def test_each_run_is_scored_by_its_own_rewards(run, tmp_path, tiny, sft_adapter, other_reward_adapter):
    more = tmp_path / "more"
    other(sft_adapter, more / "ppo", 4)
    shutil.copytree(other_reward_adapter, more / "reward")
    (run / "ppo" / "metrics.json").write_text(json.dumps({"options": OPTIONS | {"normalize_scores": False}}))
    comparison = comparison_of(run, more, model=ModelConfig(tiny))
    assert comparison.layers[-2:] == [f"{PREFIX}: demo/reward", f"{PREFIX}: more/reward"]
    clipped = comparison.policies["demo/ppo"].options["reward_clip_range"]
    for name, own in (("demo/ppo", "demo/reward"), ("more/ppo", "more/reward")):
        found = completed(comparison, name)
        assert set(found.rewards) == {"demo/reward", "more/reward"}
        penalty = 0 if found.ended else 0.5
        assert found.score == pytest.approx(min(max(found.rewards[own] - penalty, clipped[0]), clipped[1]), abs=1e-5)


def test_a_conversation_goes_through_the_chat_template(comparison):
    comparison.tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": "user", "content": "Is it good?"}]
    assert comparison.tokenizer.decode(comparison.tokens_of(turns, 6)) == "user: Is it good?\nassistant:"
    assert completed(comparison, prompt=turns).score is not None
    with pytest.raises(
        ValueError, match=r"is refused by the chat template \(no system turn\).*If the template takes no"
    ):
        comparison.tokens_of([{"role": "system", "content": "x"}, *turns], 6)


@pytest.mark.parametrize(
    ("prompt", "most", "message"),
    [
        ("", 6, r"The prompt is empty\. Write the beginning of a text, or a message\."),
        (" \n", 6, r"The prompt is empty"),
        ([{"role": "user", "content": " "}], 6, r"The prompt is empty"),
        (
            "A" * 300,
            6,
            r"With max_completion_length=6 it exceeds the model's context of 128 tokens\. Shorten the prompt",
        ),
        ("A", 128, r"The prompt has 1 tokens\. With max_completion_length=128 it exceeds"),
        ("A<|endoftext|>", 6, r"'prompt' must not end with '<\|endoftext\|>', which ends texts"),
    ],
)
def test_a_wrong_prompt_is_one_clear_error(comparison, prompt, most, message):
    with pytest.raises(ValueError, match=message):
        next(comparison.complete("ppo", prompt, Sampling(max_completion_length=most)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"temperature=0 must be"),
        ({"top_p": 1.5}, r"top_p=1\.5 must be above 0 and at most 1"),
        ({"seed": None}, r"seed is empty\. Write a number\."),
        ({"max_completion_length": 0}, r"max_completion_length=0 must be"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_errors_of_sampling_and_of_rewards_reach_the_page(comparison, run):
    path = comparison.policies["ppo"].folder + "/adapter_model.safetensors"
    with open(path, "wb") as file:
        file.write(b"damaged")
    with pytest.raises(ValueError, match=r"ppo/adapter_model\.safetensors"):
        completed(comparison)

    def fails(completions, **kwargs):
        raise KeyError("no")

    comparison.composites[0] = Composite([fails])
    with pytest.raises(RewardError, match=r"reward function 'fails' raised KeyError"):
        completed(comparison, "sft")
    comparison.composites[0] = Composite([lambda completions, **kwargs: [None]])
    assert completed(comparison, "sft").score is None


def test_a_character_of_several_tokens_belongs_to_the_last(tokenizer):
    text = "A naïve 🎬 film<|endoftext|>"
    ids = tokenizer(text)["input_ids"]
    found = pieces(ids, tokenizer)
    assert "".join(found) == text and len(found) == len(ids) and "" in found
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
