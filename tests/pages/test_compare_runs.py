"""`pipeline.pages.compare_runs`: which adapters a run's folder holds, and what PPO's options were."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from pipeline.pages.compare_runs import DEFAULTS, Options, bare, find_run, find_runs, normalizes, read_options
from pipeline.rl.config import OF_TOKENS
from pipeline.runs.manifest import MANIFEST, manifest_digest
from tests.pages.compare_run import OPTIONS, make_run, other


@pytest.fixture
def run(tmp_path, sft_adapter, reward_adapter):
    return make_run(tmp_path / "demo", sft_adapter, reward_adapter)


def test_a_run_is_read_by_itself(run):
    (found,) = find_runs([str(run)])
    assert [policy.name for policy in found.policies] == ["sft", "ppo", "ppo/checkpoint-4"]
    assert [policy.is_checkpoint for policy in found.policies] == [False, False, True]
    assert found.rewards == [str(run / "reward")]
    for policy in found.policies:  # those without a value and options get PPO's
        assert policy.value == str(run / "ppo" / "value") and policy.reference == str(run / "sft")
        assert policy.options.values == OPTIONS and policy.options.beta == 0.3
    none = bare([found])
    assert none.folder is None and none.reference == str(run / "sft") and none.value == found.policies[0].value
    assert normalizes([found])


def test_an_adapter_is_a_run_of_its_own(run):
    found = find_run(str(run / "ppo" / "checkpoint-4"))
    assert [policy.name for policy in found.policies] == ["checkpoint-4"] and not found.rewards
    assert find_run(str(run / "reward")).rewards == [str(run / "reward")]


def test_a_baseline_is_measured_with_what_ppo_left(run, tmp_path, sft_adapter):
    other(sft_adapter, tmp_path / "baselines" / "rloo", 3)
    demo, baselines = find_runs([str(run), str(tmp_path / "baselines")])
    assert [policy.name for policy in demo.policies] == ["demo/sft", "demo/ppo", "demo/ppo/checkpoint-4"]
    (rloo,) = baselines.policies
    assert rloo.name == "baselines/rloo" and rloo.run == 1 and baselines.rewards == []
    assert rloo.value == str(run / "ppo" / "value") and rloo.reference == str(run / "sft") and rloo.options.beta == 0.3


def test_a_policy_is_known_as_sft_by_its_card(run):
    shutil.move(run / "sft", run / "start")
    (run / "start" / "README.md").write_text("---\ntags:\n- trl\n- sft\n---\n")
    (found,) = find_runs([str(run)])
    assert {policy.reference for policy in found.policies} == {str(run / "start")}
    (run / "start" / "README.md").unlink()
    (found,) = find_runs([str(run)])
    assert {policy.reference for policy in found.policies} == {None}
    (found,) = find_runs([str(run)], sft_adapter=str(run / "start"))
    assert {policy.reference for policy in found.policies} == {str(run / "start")}


def test_options_of_an_earlier_release_are_the_defaults_with_the_last_beta(run):
    (run / "ppo" / "metrics.json").write_text(json.dumps({"history": [{"beta": 0.4}]}))
    found = read_options(run / "ppo")
    assert found == Options(DEFAULTS, None, 0.4) and set(DEFAULTS) == set(OF_TOKENS)
    (run / "ppo" / "metrics.json").unlink()
    assert read_options(run / "ppo") is None
    (found,) = find_runs([str(run)])
    assert found.policies[1].options == Options(DEFAULTS) and found.policies[1].options.beta == DEFAULTS["beta"]


def test_options_of_a_checkpoint_stand_in_its_manifest(run):
    folder = run / "ppo" / "checkpoint-4"
    options = {"PPOConfig": {**OPTIONS, "beta": 0.1, "seed": 3}, "RewardArguments": {"normalize_scores": False}}
    manifest = {"files": {}, "holds": [], "world_size": 1, "order": {}, "written": 0, "options": options}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    history = {"global_step": 4, "log_history": [{"beta": 0.15}]}
    (folder / "trainer_state.json").write_text(json.dumps(history))
    found = read_options(folder)
    assert found.beta == 0.15 and found["beta"] == 0.1 and found["lam"] == 0.9 and found["normalize_scores"] is False
    assert found.source == str(folder) and "seed" not in found.values


def test_a_recipes_options_replace_all_but_the_last_beta(run):
    (found,) = find_runs([str(run)], options=Options({**OPTIONS, "lam": 0.5, "beta": 0.9}, "ppo.yaml"))
    assert found.policies[0].options["lam"] == 0.5 and found.policies[0].options.beta == 0.3


def test_scores_are_normalised_where_the_scale_is_known(run):
    (run / "ppo" / "metrics.json").unlink()
    (found,) = find_runs([str(run)])
    assert normalizes([found])
    (run / "reward" / "score_normalization.json").unlink()
    assert not normalizes([found]) and not normalizes([replace(found, rewards=[])])


def broken(run, what: str) -> list[str]:
    """Arguments that cannot be used."""
    if what == "nothing here":
        return [str(run / "missing")]
    if what == "no adapter":
        (run / "empty").mkdir()
        return [str(run / "empty")]
    if what == "rewards alone":
        return [str(run / "reward")]
    if what == "twice":
        return [str(run), f"{run}/ppo/.."]
    if what == "another base":
        path = run / "ppo" / "backbone.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"fingerprint": "0+1", "model_name_or_path": "gpt2"})
        )
    if what == "damaged options":
        (run / "ppo" / "metrics.json").write_text(json.dumps({"options": {"gamma": "1"}}))
    if what == "no weights":
        (run / "ppo" / "adapter_model.safetensors").unlink()
    return [str(run)]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing here", r"missing: no such folder\. Name the folder of a run"),
        ("no adapter", r"empty: no adapter in this folder \(adapter_config\.json\)\. Name the folder of a run"),
        ("rewards alone", r"reward: only rewards, and no policy\. Name the folder of a run with a policy"),
        ("twice", r"is named twice\. Name each run once"),
        ("another base", r"ppo were trained on different base models \(.*, gpt2\).* Compare runs on the same base"),
        ("damaged options", r"metrics\.json: 'options'\['gamma'\] is '1', but must be a number of at least 0"),
        ("no weights", r"adapter_model\.safetensors: no such file"),
    ],
)
def test_a_wrong_folder_is_one_clear_error(run, what, message):
    with pytest.raises((ValueError, OSError), match=message) as raised:
        find_runs(broken(run, what))
    assert "\n" not in str(raised.value) and not re.search(r"Traceback", str(raised.value))
