"""`pipeline.backbone.members` and ensembles on the backbone: members scored together, and folders that are ensembles."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_adapter
from peft import LoraConfig
from test_trunk import LINEAR, base_model, batch
from trl import ModelConfig

from pipeline.backbone import roles as roles_module
from pipeline.backbone.adapters import read_adapter
from pipeline.backbone.loading import load_pretrained
from pipeline.backbone.members import MANIFEST, check_rewards, members_of, planned_members, write_members
from pipeline.backbone.rewards import get_reward_adapter, learned_rewards
from pipeline.backbone.roles import Backbone
from pipeline.backbone.trunk import decoder_layers
from reward_models.ensembles import EnsembleReward, combine
from reward_models.functions import RewardArguments
from reward_models.normalization import Normalization


def with_members(name: str, tops: tuple[int, ...], policy_top: int | None = None) -> Backbone:
    """A backbone of five layers with reward roles that adapt the top so many."""
    model = base_model(name)
    pattern = decoder_layers(model)[1]

    def config(top):
        layers = {"layers_to_transform": list(range(5))[-top:], "layers_pattern": pattern} if top else {}
        options = {"fan_in_fan_out": name == "gpt2", "init_lora_weights": False, **layers}
        return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR[name], **options)

    backbone = Backbone(model, config(policy_top))
    for number, top in enumerate(tops):
        backbone.add_adapter(f"member_{number}", config(top))
        backbone._add_head(f"member_{number}", torch.randn(1, backbone.hidden_size))
    return backbone.eval()


def count_layers(backbone: Backbone) -> list[int]:
    """Returns a list to which each layer adds its number as it runs."""
    ran: list[int] = []
    for number, layer in enumerate(decoder_layers(backbone.get_base_model())[2]):
        layer.register_forward_hook(lambda *args, number=number: ran.append(number))
    return ran


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(("tops", "depth"), [((2, 2, 2), 3), ((1, 2, 3), 2), ((2, None), 0)])
@torch.no_grad()
def test_members_scored_together_score_as_each_alone(name, tops, depth):
    backbone = with_members(name, tops)
    ids, mask, *_ = batch()
    roles = [f"member_{number}" for number in range(len(tops))]
    alone = torch.stack([backbone.scores(ids, mask, role) for role in roles], dim=1)
    backbone.member_scores(ids, mask, roles)  # tries once whether a pass can start there
    ran = count_layers(backbone)
    together = backbone.member_scores(ids, mask, roles)
    assert torch.equal(together, alone) and len(set(alone.flatten().tolist())) == 2 * len(tops)
    assert [ran.count(layer) for layer in range(5)] == [1 if layer < depth else len(tops) for layer in range(5)]


@torch.no_grad()
def test_members_go_on_from_the_policys_trunk():
    """The policy adapts three layers, the members two: the layer between them runs once too."""
    backbone = with_members("gpt2", (2, 2), policy_top=3)
    ids, mask, *_ = batch()
    roles = ["member_0", "member_1"]
    backbone.add_value(init="policy")
    backbone.share_trunk()
    assert backbone.trunk_depth == 2
    alone = torch.stack([backbone.scores(ids, mask, role) for role in roles], dim=1)
    trunk = backbone.trunk(ids, mask)
    backbone.member_scores(ids, mask, roles, trunk)
    ran = count_layers(backbone)
    assert torch.equal(backbone.member_scores(ids, mask, roles, trunk), alone)
    assert [ran.count(layer) for layer in range(5)] == [0, 0, 1, 2, 2]


@torch.no_grad()
def test_a_model_that_cannot_start_from_its_layers_runs_them_all(monkeypatch):
    backbone = with_members("gpt2", (2, 2))
    monkeypatch.setattr(roles_module, "trunk_fault", lambda *args, **kwargs: "a planted fault")
    ids, mask, *_ = batch()
    roles = ["member_0", "member_1"]
    ran = count_layers(backbone)
    together = backbone.member_scores(ids, mask, roles)
    assert [ran.count(layer) for layer in range(5)] == [2] * 5
    assert torch.equal(together, torch.stack([backbone.scores(ids, mask, role) for role in roles], dim=1))


# ------------------------------------------------------------------------------------ folders
@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """A folder as `pipeline.reward` leaves it for two members, whose normalizations differ."""
    folder = tmp_path_factory.mktemp("ensemble")
    for number in range(2):
        member = folder / f"member_{number}"
        make_adapter(tiny, member, head=True, seed=10 + number)
        Normalization(mean=3.0 * number, std=0.5 + number, completions=8).save(member)
    write_members(folder, {"member_0": 0, "member_1": 1}, members_in=folder)
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "ensemble"))


@pytest.fixture
def learned(tiny, sft_adapter, tokenizer):
    def learned(*folders, **options):
        base, _ = load_pretrained(ModelConfig(tiny))
        backbone = Backbone(base, read_adapter(sft_adapter, base=base)).eval()
        return learned_rewards(RewardArguments(list(map(str, folders)), **options), backbone, tokenizer)

    return learned


GIVEN = {"prompts": ["The film", "A"], "completion_ids": [[5, 6, 7], [8]]}


@pytest.mark.parametrize("normalize", [False, True])
def test_an_ensembles_folder_is_the_mean_of_its_members(learned, trained, normalize):
    (reward,) = learned(trained, normalize_scores=normalize)
    apart = learned(trained / "member_0", trained / "member_1", normalize_scores=normalize)
    expected = torch.tensor([member(**GIVEN) for member in apart]).mean(dim=0)
    assert reward(**GIVEN) == pytest.approx(expected.tolist(), abs=1e-5)
    assert isinstance(reward, EnsembleReward) and reward.__name__ == trained.name
    assert reward.adapters == {"reward": str(trained / "member_0"), "reward_2": str(trained / "member_1")}


@pytest.mark.parametrize("combination", ["mean", "min", "mean_minus_std"])
def test_adapters_trained_apart_are_an_ensemble(learned, trained, reward_adapter, combination):
    """Members of a folder and an adapter beside them are three members of one reward."""
    options = {"normalize_scores": True}
    if combination == "mean_minus_std":
        options["reward_std_coef"] = 0.5
    (reward,) = learned(trained, reward_adapter, reward_combination=combination, **options)
    apart = learned(trained / "member_0", trained / "member_1", reward_adapter, normalize_scores=True)
    scores = torch.tensor([member(**GIVEN) for member in apart]).T
    expected = combine(scores, combination, std_coef=0.5)
    assert reward.__name__ == "ensemble" and len(reward.members) == 3
    assert reward(**GIVEN) == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_ensemble_on_another_backbone(learned, trained, tokenizer):
    options = {"normalize_scores": True, "reward_combination": "min"}
    (reward,) = learned(trained, **options)
    elsewhere, logged = get_reward_adapter(str(trained), **options), {}
    texts = [" of wit and charm", " long yawn"]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    found = elsewhere(prompts=["The film", "A"], completions=texts, log_extra=logged.__setitem__)
    assert found == pytest.approx(reward(prompts=["The film", "A"], completion_ids=rows), abs=1e-5)
    assert elsewhere.__name__ == "ensemble" and len(logged["ensemble/disagreement"]) == 2


def test_several_ensembles_add_up_under_names_of_their_own(learned, trained, copied, tiny, tmp_path):
    other = tmp_path / "another" / trained.name
    shutil.copytree(copied, other)
    make_adapter(tiny, other / "member_0", head=True, seed=20)
    write_members(other, {"member_0": 0, "member_1": 1}, members_in=other)
    names = [reward.__name__ for reward in learned(trained, other)]
    assert names == [trained.name, f"{trained.name}_2"]


def test_members_that_are_one_adapter_are_refused(learned, trained, reward_adapter):
    message = r"are the same adapter, and two members of an ensemble that always agree are one\. Name adapters"
    with pytest.raises(ValueError, match=message):
        learned(trained / "member_0", reward_adapter, trained / "member_0", reward_combination="mean")


def test_one_adapter_alone_is_no_ensemble(reward_adapter):
    rewards = RewardArguments([reward_adapter], reward_combination="mean")
    with pytest.raises(ValueError, match=r"'mean' combines two or more adapters, and reward_adapter names \S+ alone"):
        check_rewards(rewards, None)


def test_a_plan_counts_members(copied, reward_adapter):
    assert planned_members(str(copied)) == 2
    assert planned_members(reward_adapter) == planned_members("runs/not/there/yet") == 1


def spoil_member(folder: Path) -> None:
    weights = folder / "member_1" / "adapter_model.safetensors"
    weights.write_bytes((folder / "member_0" / weights.name).read_bytes())


FAULTS = {
    "a member of another run": (
        spoil_member,
        ValueError,
        r"member_1: not the member that \S+ensemble\.json names\. A run with num_members has begun",
    ),
    "a member is missing": (
        lambda folder: shutil.rmtree(folder / "member_0"),
        FileNotFoundError,
        r"member_0/adapter_model\.safetensors: no such file, and \S+ensemble\.json names",
    ),
    "no manifest": (
        lambda folder: (folder / MANIFEST).write_text("[]"),
        ValueError,
        r"ensemble\.json: not a JSON object",
    ),
    "a member elsewhere": (
        lambda folder: (folder / MANIFEST).write_text(
            json.dumps({"members": [{"folder": "../x", "seed": 0, "sha256": ""}] * 2})
        ),
        ValueError,
        r"ensemble\.json: 'members'\[0\]\['folder'\] is '\.\./x', but must be the name of a file in this folder",
    ),
    "one member": (
        lambda folder: (folder / MANIFEST).write_text('{"members": []}'),
        ValueError,
        r"'members' is \[\], but must be a list of 2 or more entries",
    ),
}


@pytest.mark.parametrize(("spoil", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_a_folder_that_is_no_whole_ensemble(copied, spoil, kind, message):
    assert len(members_of(str(copied))) == 2
    spoil(copied)
    with pytest.raises(kind, match=message):
        members_of(str(copied))
