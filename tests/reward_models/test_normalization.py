"""`reward_models.normalization`: scores of the SFT policy's completions come to mean 0 and deviation 1."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from trl import ModelConfig

from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.rewards import learned_rewards, measure
from pipeline.backbone.roles import Backbone
from pipeline.backbone.sampling import sample
from reward_models.functions import RewardArguments
from reward_models.normalization import FILE, Normalization, read_normalization


ASKED = ["The film", "A", "It's a", "One of the best"] * 4


@pytest.fixture
def roles(tiny, sft_adapter):
    def roles(folders, tokenizer, **options):
        base, _ = load_pretrained(ModelConfig(tiny))
        backbone = Backbone(base, read_adapter(sft_adapter, base=base)).eval()
        return backbone, learned_rewards(RewardArguments(reward_adapter=folders, **options), backbone, tokenizer)

    return roles


def test_what_is_stored_is_read(tmp_path):
    found = Normalization(mean=-0.25, std=1.5, completions=3)
    found.save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == {"mean": -0.25, "std": 1.5, "completions": 3}
    assert read_normalization(str(tmp_path)) == found


def test_scores_by_hand(roles, reward_adapter, tokenizer):
    """The fixture's mean is 0.5 and its deviation 2: a score s becomes (s - 0.5) / 2."""
    given = {"prompts": ["The film", "A"], "completion_ids": [[5, 6, 7], [8]]}
    _, (plain,) = roles([reward_adapter], tokenizer)
    _, (normal,) = roles([reward_adapter], tokenizer, normalize_scores=True)
    expected = [(score - 0.5) / 2 for score in plain(**given)]
    assert normal(**given) == pytest.approx(expected, abs=1e-6)


def test_measured_scores_come_to_mean_0_and_deviation_1(roles, reward_adapter, tokenizer, tmp_path):
    folder = Path(shutil.copytree(reward_adapter, tmp_path / "reward"))
    backbone, _ = roles([str(folder)], tokenizer)
    found = measure(backbone, ASKED, tokenizer, seed=0, max_completion_length=5, batch_size=8)
    assert found.completions == 16 and found.std > 0.01
    found.save(folder)
    backbone, _ = roles([str(folder)], tokenizer, normalize_scores=True)
    again = measure(backbone, ASKED, tokenizer, seed=0, max_completion_length=5, batch_size=8)  # the same completions
    # The head in memory has the deviation taken out. The mean is taken from scores, and is mean / std here.
    assert again.std == pytest.approx(1, abs=1e-5)
    assert again.mean == pytest.approx(found.mean / found.std, abs=1e-5)


def test_what_is_measured_are_the_policys_completions(roles, reward_adapter, tokenizer, monkeypatch):
    backbone, (reward,) = roles([reward_adapter], tokenizer)
    rows, original = [], backbone.scores

    def scores(ids, mask, **options):
        rows.extend(row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True))
        return original(ids, mask, **options)

    monkeypatch.setattr(backbone, "scores", scores)
    found = measure(backbone, ASKED[:4], tokenizer, seed=0, max_completion_length=5)
    monkeypatch.undo()
    asked = [tokenizer(text)["input_ids"] for text in ASKED[:4]]
    options = {"max_completion_length": 5, "temperature": 1.0, "batch_size": 4, "share_seed": (0,)}
    (batch,) = sample(backbone, "policy", asked, tokenizer, **options)
    assert sorted(rows) == sorted(ids + chosen for ids, chosen in zip(asked, batch.rows(), strict=True))
    expected = [original(torch.tensor([row]), torch.ones(1, len(row))).item() for row in rows]
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.std == pytest.approx(np.std(expected), abs=1e-5)


def test_each_adapter_has_its_own(roles, reward_adapter, other_reward_adapter, tokenizer, tmp_path):
    other = Path(shutil.copytree(other_reward_adapter, tmp_path / "other"))
    Normalization(mean=-3.0, std=0.5, completions=8).save(other)
    given = {"prompts": ["The film", "A"], "completion_ids": [[5, 6, 7], [8]]}
    folders = [reward_adapter, str(other)]
    _, plain = roles(folders, tokenizer)
    _, normal = roles(folders, tokenizer, normalize_scores=True)
    for before, after, mean, std in zip(plain, normal, (0.5, -3.0), (2.0, 0.5), strict=True):
        expected = [(score - mean) / std for score in before(**given)]
        assert after(**given) == pytest.approx(expected, abs=1e-5)


def test_the_folder_stays_as_it_was(roles, reward_adapter, tokenizer):
    before = read_adapter(reward_adapter).head
    roles([reward_adapter], tokenizer, normalize_scores=True)
    assert torch.equal(read_adapter(reward_adapter).head, before)


def test_values_start_on_the_scale_of_normalised_scores(roles, reward_adapter, tokenizer):
    backbone, _ = roles([reward_adapter], tokenizer, normalize_scores=True)
    backbone.add_value()
    raw = read_adapter(reward_adapter, needs_head=True).head
    torch.testing.assert_close(backbone.heads["value"].weight.data, raw / 2)
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4)
    with torch.no_grad():  # the value before a token that follows the four reads what the score reads
        value = backbone.values(torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5), 1)
        torch.testing.assert_close(value[0], backbone.scores(ids, mask), atol=1e-5, rtol=0)


def test_an_adapter_without_its_numbers(roles, other_reward_adapter, tokenizer):
    message = (
        rf"normalize_scores: .* has no {FILE}\. Train the reward model with --sft_adapter.*normalize_scores: false"
    )
    with pytest.raises(ValueError, match=message):
        roles([other_reward_adapter], tokenizer, normalize_scores=True)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_numbers_that_are_no_scale(tmp_path, mean, std):
    Normalization(mean, std, 8).save(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{FILE}: '(mean|std)' is .*, but must be a number.*\. Measure the scores anew"
    ):
        read_normalization(str(tmp_path))


def test_nothing_to_normalise():
    with pytest.raises(ValueError, match=r"normalize_scores scales reward adapters\. Name one in reward_adapter"):
        RewardArguments(reward_funcs=["reward_models.rules.contains"], normalize_scores=True)
