"""`pipeline.runs.worlds`: other processes go on with the same global batches, or are told what would fit."""

import json
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import PROMPTS
from torch.utils.data import BatchSampler, SequentialSampler
from trl.trainer.utils import RepeatSampler

from pipeline.rl.online import Online
from pipeline.runs import worlds
from pipeline.runs.optimizer_shards import weights_by_name
from pipeline.runs.state_files import save_state
from pipeline.runs.worlds import BATCH, check_world, fit_batch, recipe_batch, seed_of_process, state_of, told


KIND = {1: "no wrapper", 2: "DDP", 3: "DDP", 4: "DDP", 8: "DDP"}


@pytest.fixture
def launch(monkeypatch):
    """Makes the arguments of a launch."""
    monkeypatch.setattr(worlds, "kind_of", lambda state: state)

    def launch(processes: int, batch: int, accumulation: int, generation: int | None = None, **options):
        args = {
            "world_size": processes, "distributed_state": KIND[processes], "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation, "fp16": False, "train_sampling_strategy": "random",
            "accelerator_config": SimpleNamespace(use_seedable_sampler=True), "dataloader_drop_last": False,
            "process_index": 0, "num_iterations": 2,
        }  # fmt: skip
        args |= {"steps_per_generation": generation} if generation else {}
        return SimpleNamespace(**args | options)

    return launch


# What every state has besides.
DRAWS = {"torch": None, "sampler": None}
OTHER_STATE = {
    "metrics": {},
    "trained_for": 1.0,
    "seconds": 1.0,
    "epoch_start": DRAWS,
    "now": DRAWS,
    "rows": 8,
    "frozen": "0",
}


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint, as far as it is looked at here, and returns its folder and manifest."""

    def checkpoint(
        processes: int, batch: int, accumulation: int, generation: int | None = None, *, step: int = 4, **more
    ):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        order = dict(zip(BATCH, (batch, accumulation, generation), strict=True))
        passes = {"_step": step * accumulation} if generation else {}
        if generation:
            order["num_iterations"] = 2
        else:
            del order["steps_per_generation"]
        for process in range(processes):
            state = {
                "counters": {**passes, "_total_train_tokens": 7, "_buffered_inputs": [torch.zeros(2)]},
                "loop": {"_tr_loss": torch.tensor(float(process)), "_total_loss_scalar": 3.0},
                "ppo": {"beta": 0.3},
                **OTHER_STATE,
            }
            save_state(state, folder / f"state_{process}")
        return folder, {
            "world_size": processes, "kind": KIND[processes], "step": step, "order": order, "files": {}, **more
        }  # fmt: skip

    return checkpoint


# ------------------------------------------------------------------------------------------ the order of rows
def batches_of_steps(sampler: Callable, processes: int, batch: int, accumulation: int) -> list[list[int]]:
    """The rows of each optimizer step, as accelerate and Trainer share them out."""
    shards = [list(BatchSamplerShard(BatchSampler(sampler(), batch, False), processes, i)) for i in range(processes)]
    passes = [[row for of_process in each for row in of_process] for each in zip(*shards, strict=True)]
    steps = [passes[i : i + accumulation] for i in range(0, len(passes), accumulation)]
    return [sorted(row for each in step for row in each) for step in steps]


SHARES = [(1, 12, 1), (2, 6, 1), (3, 4, 1), (3, 2, 2), (4, 3, 1), (2, 2, 3), (1, 1, 12), (6, 1, 2)]


@pytest.mark.parametrize(("processes", "batch", "accumulation"), SHARES)
def test_a_step_learns_from_the_same_rows_in_any_number_of_processes(processes, batch, accumulation):
    rows = partial(SequentialSampler, range(36))
    assert batches_of_steps(rows, processes, batch, accumulation) == batches_of_steps(rows, 1, 12, 1)
    assert len(batches_of_steps(partial(SequentialSampler, range(43)), processes, batch, accumulation)) == 4


@pytest.mark.parametrize(("processes", "batch", "passes"), [(1, 8, 2), (2, 4, 2), (2, 2, 4), (4, 4, 1), (1, 1, 16)])
def test_a_rollout_has_the_same_prompts_in_any_number_of_processes(processes, batch, passes):
    """TRL's batches: 16 completions a rollout, 2 of each prompt, and each rollout comes for every pass of an update."""

    def rollouts(processes, batch, passes):
        sampler = partial(RepeatSampler, range(30), 2, batch_size=8, repeat_count=3 * passes, seed=1)
        found = batches_of_steps(sampler, processes, batch * passes, 1)
        assert found == [rows for rows in found[:: 3 * passes] for _ in range(3 * passes)]
        return found[:: 3 * passes]

    assert rollouts(processes, batch, passes) == rollouts(1, 16, 1)


# ------------------------------------------------------------------------------------------ the global batch
@pytest.mark.parametrize(
    ("then", "now", "fitted"),
    [
        ((2, 4, 1), (1, 8, 1), (1, None)),  # the launch divides the batch itself
        ((2, 4, 1), (1, 4, 1), (2, None)),
        ((1, 8, 1), (2, 2, 1), (2, None)),
        ((4, 2, 6), (3, 4, 6), (4, None)),
        ((1, 8, 1), (1, 8, 1), (1, None)),
        ((2, 2, 2, 4), (1, 2, 2, 4), (4, 8)),
        ((1, 4, 2, 8), (2, 4, 2, 8), (1, 4)),
    ],
)
def test_the_global_batch_stays_the_same(then, now, fitted, launch, checkpoint, capsys):
    folder, manifest = checkpoint(*then, step=8)
    args = launch(*now)
    fit_batch(manifest, args)
    found = args.gradient_accumulation_steps, getattr(args, "steps_per_generation", None)
    assert found == fitted
    checked = check_world(folder, manifest, args, {})
    assert set(checked) == (set(BATCH) if then[0] != now[0] else set())
    said = capsys.readouterr().out
    if fitted[0] != now[2]:
        total = then[0] * then[1] * then[2]
        assert f"gradient_accumulation_steps is {fitted[0]} instead of {now[2]}" in said
        assert f"so that the global batch stays {total}." in said
        if len(then) == 4:
            assert f"steps_per_generation is {fitted[1]} instead of {now[3]}" in said
            assert args.generation_batch_size == then[0] * then[1] * then[3]
    else:
        assert not said and not recipe_batch(args)


def test_the_same_command_resumes_the_run_again(launch, checkpoint, capsys):
    _, manifest = checkpoint(2, 4, 1)
    args = launch(1, 4, 1)
    fit_batch(manifest, args)
    assert recipe_batch(args) == {"recipe": {"gradient_accumulation_steps": 1}}
    order = {**manifest["order"], "gradient_accumulation_steps": 2}
    manifest |= {"world_size": 1, "kind": "no wrapper", "order": order, **recipe_batch(args)}
    again = launch(1, 4, 1)
    fit_batch(manifest, again)
    assert again.gradient_accumulation_steps == 2 and recipe_batch(again) == recipe_batch(args)
    changed = launch(1, 4, 3)  # by the user: this is refused as ever
    fit_batch(manifest, changed)
    assert changed.gradient_accumulation_steps == 3
    back = launch(2, 4, 1)
    fit_batch(manifest, back)
    assert back.gradient_accumulation_steps == 1 and not recipe_batch(back)


@pytest.mark.parametrize(
    ("then", "now", "options", "remedy"),
    [
        ((2, 4, 1), (1, 16, 1), {}, "Set per_device_train_batch_size to 8, gradient_accumulation_steps to 1; or launch"),
        ((1, 8, 1), (2, 8, 1), {}, "Set per_device_train_batch_size to 4, gradient_accumulation_steps to 1; or launch"),
        ((2, 4, 1), (3, 4, 1), {}, "number of steps. Launch with --num_processes 2."),
        ((1, 4, 1, 6), (2, 4, 1, 6), {}, "size to 2, gradient_accumulation_steps to 1, steps_per_generation to 6; or"),
        (
            (2, 4, 1), (1, 4, 1), {"dataloader_drop_last": True},
            "Set per_device_train_batch_size to 8, gradient_accumulation_steps to 1; or launch",
        ),
    ],
)  # fmt: skip
def test_a_launch_with_another_global_batch_is_told_what_fits(then, now, options, remedy, launch, checkpoint):
    folder, manifest = checkpoint(*then, step=12)
    args = launch(*now, **options)
    before = vars(args).copy()
    fit_batch(manifest, args)
    assert vars(args) == before
    total = then[0] * then[1] * then[2]
    with pytest.raises(ValueError, match=re.escape(remedy)) as caught:
        check_world(folder, manifest, args, {})
    assert f"{folder}: written with a global batch of {total} (processes={then[0]}" in str(caught.value)


# ------------------------------------------------------------------------------------------ what cannot go on
def test_in_the_middle_of_an_update_the_end_of_the_last_one_is_named(launch, checkpoint):
    others = dict(checkpoint(2, 2, 2, 4, step=step) for step in (4, 8, 10, 12))
    folder = next(path for path in others if path.name == "checkpoint-10")
    args = launch(1, 4, 2, 4)
    with pytest.raises(ValueError, match="written by 2 processes under DDP in the middle of an update") as caught:
        check_world(folder, others[folder], args, others)
    assert (
        f"Go back to the end of an update: --resume_from_checkpoint {folder.parent / 'checkpoint-8'}. Or launch 2 "
        in (str(caught.value))
    )
    with pytest.raises(ValueError, match="that sampled it. Launch 2 processes under DDP as before. SIGTERM then ends"):
        check_world(folder, others[folder], args, {folder: others[folder]})
    same = launch(2, 2, 2, 4, distributed_state="ZeRO-2")  # other wrappers hold the same rollout
    assert check_world(folder, others[folder], same, others) == ()
    assert check_world(folder.parent / "checkpoint-8", others[folder.parent / "checkpoint-8"], args, others) == BATCH


def test_a_signal_ends_every_online_trainer_where_others_can_go_on():
    args = SimpleNamespace(steps_per_generation=4)
    ends = [
        step
        for step in range(17)
        if Online.between_updates.fget(SimpleNamespace(_step=step, args=args, num_iterations=2))
    ]
    assert ends == [0, 8, 16]


def test_what_is_not_carried_over_is_refused(launch, checkpoint):
    folder, manifest = checkpoint(2, 4, 1, kind="ZeRO-2")
    (folder / "optimizer_0.json").write_text(json.dumps({"trained": {}, "scheduler": {}}))
    manifest["files"]["optimizer_0.json"] = {}
    with pytest.raises(
        ValueError, match="written by 2 processes under ZeRO-2 of an older release, and this launch is 1"
    ):
        check_world(folder, manifest, launch(1, 8, 1), {})
    (folder / "optimizer_0.json").write_text(json.dumps({"trained": {}, "layout": [], "scheduler": {}}))
    assert check_world(folder, manifest, launch(1, 8, 1), {}) == BATCH
    with pytest.raises(
        ValueError, match="The loss scale of fp16 is not carried over. Launch 2 processes under ZeRO-2"
    ):
        check_world(folder, manifest, launch(2, 4, 1, fp16=True), {})
    with pytest.raises(ValueError, match="With train_sampling_strategy=group_by_length the order of the rows depends"):
        check_world(folder, manifest, launch(1, 8, 1, train_sampling_strategy="group_by_length"), {})
    unseeded = SimpleNamespace(use_seedable_sampler=False)
    with pytest.raises(ValueError, match="With use_seedable_sampler=False the order of the rows depends"):
        check_world(folder, manifest, launch(1, 8, 1, accelerator_config=unseeded), {})


def test_a_run_says_who_goes_on(launch, checkpoint):
    _, manifest = checkpoint(2, 4, 1, kind="ZeRO-2")
    ending = "Random states begin anew, from seed, step and process"
    assert told(manifest, launch(1, 8, 1)) == f", which 2 processes under ZeRO-2 wrote; 1 process goes on. {ending}"
    assert told(manifest, launch(4, 2, 1)).endswith(f"wrote; 4 processes under DDP go on. {ending}")
    assert told(manifest, launch(2, 4, 1)) == ", which 2 processes under ZeRO-2 wrote; 2 processes under DDP go on"
    assert told({**manifest, "kind": "DDP"}, launch(2, 4, 1)) == ""


# ------------------------------------------------------------------------------------------ the state of a process
def test_the_state_of_other_processes_is_that_of_all_which_wrote_it(launch, checkpoint):
    folder, manifest = checkpoint(3, 2, 2, 4, step=8)
    state = state_of(folder, manifest, launch(1, 2, 6, 12))
    assert state["loop"] == {"_tr_loss": torch.tensor(1.0), "_total_loss_scalar": 3.0}  # the mean of 0, 1 and 2
    assert state["counters"] == {"_step": 2 * 12 * 2, "_total_train_tokens": 7}  # two updates
    assert state["ppo"] == {"beta": 0.3} and state["draws_anew"]
    own = state_of(folder, manifest, launch(3, 2, 2, 4, process_index=2))
    assert own["loop"]["_tr_loss"] == 2 and own["counters"]["_step"] == 16 and "draws_anew" not in own


def test_random_states_are_the_same_each_time_and_different_in_each_process():
    seeds = {(s, t, p): seed_of_process(s, t, p) for s in (0, 1, 42) for t in (0, 1, 12) for p in range(3)}
    assert len(set(seeds.values())) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds.values())
    assert seed_of_process(42, 8, 1) == 1326302518


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_saved_adapters_are_read_under_the_names_of_the_parameters(critic, make_trainer, tmp_path):
    trainer = make_trainer(prompts=PROMPTS, critic=critic, value_init="auto")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data = torch.randn_like(p)
    trainer._trained = {name: list(p.shape) for name, p in trained.items()}
    trainer._save(str(tmp_path / "saved"))
    found = trainer._saved_weights(str(tmp_path / "saved"))
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], p) for name, p in trained.items())
    assert weights_by_name(trainer.model, trained, {}, "reward") == {}
