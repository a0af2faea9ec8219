"""`pipeline.runs.agreement`: who has not come is said, and processes that do not run the same are refused at the start."""

import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta

import pyarrow as pa
import pytest
from datasets import Dataset
from torch.distributed import TCPStore

from data import waiting
from pipeline.runs import agreement
from pipeline.runs.agreement import awaiting_processes, check_rendezvous, check_same_options, check_same_rows
from pipeline.runs.resumed_options import rows_digest


@dataclass
class Options:
    learning_rate: float = 1e-5
    reward_weights: list[float] | None = None
    optim: str = "adamw_torch"
    hub_token: str = "secret"
    local_rank: int = 0
    found: object = field(init=False, default=None)


@pytest.fixture
def processes(monkeypatch):
    """Has a function see what the calls of several processes gather: one call for each, the last of which is made here."""
    monkeypatch.setattr(agreement, "is_initialized", lambda: True)

    def processes(check, *given) -> None:
        brought = []

        def gather(mine):
            brought.extend(mine)
            return brought * (2 if len(brought) < len(given) else 1)

        monkeypatch.setattr(agreement, "gather_object", gather)
        for each in given:
            check(each)

    return processes


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"learning_rate": 1e-4},
            "learning_rate=1e-05 in process 0, and learning_rate=0.0001 in process 1. All processes",
        ),
        ({"reward_weights": [1.0]}, r"reward_weights=None in process 0, and reward_weights=\[1.0\] in process 1"),
        ({"optim": "sgd"}, "optim='adamw_torch' in process 0, and optim='sgd' in process 1"),
    ],
)
def test_an_option_of_one_process_is_refused_by_name(other, message, processes):
    with pytest.raises(ValueError, match=message):
        processes(check_same_options, Options(), Options(**other))


def test_a_rank_and_a_secret_may_differ(processes):
    processes(check_same_options, Options(), Options(local_rank=1, hub_token="other"))


ROWS = {"text": [f"row {i}" for i in range(2500)], "ids": [[i, i + 1] for i in range(2500)]}
OTHER_ROWS = {
    "one value": Dataset.from_dict({**ROWS, "ids": [*ROWS["ids"][:-1], [0, 0]]}),
    "another order": Dataset.from_dict(ROWS).shuffle(seed=1),
    "one row less": Dataset.from_dict(ROWS).select(range(2499)),
    "another name": Dataset.from_dict(ROWS).rename_column("text", "prompt"),
}


@pytest.mark.parametrize("change", OTHER_ROWS)
def test_rows_of_one_process_are_refused(change, processes):
    with pytest.raises(
        ValueError, match="train_dataset: process 0 has other rows than process 1 .*need the same data"
    ):
        processes(
            lambda rows: check_same_rows({"train_dataset": rows_digest(rows)}),
            Dataset.from_dict(ROWS),
            OTHER_ROWS[change],
        )


def test_the_same_rows_are_the_same_however_they_were_read(processes, tmp_path):
    Dataset.from_dict(ROWS).save_to_disk(tmp_path)
    kept = Dataset.from_dict(
        {name: ["x", *column] if name == "text" else [[], *column] for name, column in ROWS.items()}
    )
    made = Dataset.from_dict(ROWS), Dataset.load_from_disk(str(tmp_path)), kept.select(range(1, 2501))
    assert len({rows_digest(rows) for rows in made}) == 1
    assert len({rows_digest(Dataset(pa.table({"a": [[{"x": 1}], None]}))) for _ in range(2)}) == 1


# ------------------------------------------------------------------------------------------ who is missing
@pytest.fixture
def launch(monkeypatch):
    """Makes this process look like one of a launch of three, whose store is at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 3, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(waiting, "SILENCE", 0.6)
    monkeypatch.setattr(agreement, "PATIENCE", timedelta(seconds=1))
    return port


def said(capsys) -> str:
    with awaiting_processes():
        time.sleep(1.0)
    return capsys.readouterr().err.splitlines()[0]


@pytest.mark.slow
def test_who_has_not_come_is_named(launch, capsys, monkeypatch):
    store = TCPStore("127.0.0.1", launch, is_master=True, wait_for_workers=False, multi_tenant=True)
    monkeypatch.setenv("RANK", "1")
    with awaiting_processes():
        time.sleep(0.4)
    monkeypatch.setenv("RANK", "0")
    assert said(capsys).startswith(f"Waiting for 1 of 3 processes at 127.0.0.1:{launch}: not yet here is rank 2 (")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with awaiting_processes():
        time.sleep(0.4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "WORLD_SIZE=3), but process 2 was started with WORLD_SIZE=4. End all of them" in said(capsys)
    del store


@pytest.mark.slow
def test_a_main_process_that_is_missing_is_said(launch, capsys):
    assert f"the other processes (WORLD_SIZE=3); nothing answers at 127.0.0.1:{launch}" in said(capsys)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2, and no MASTER_ADDR .* Unset WORLD_SIZE to run one"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "", "RANK": "1"}, "WORLD_SIZE=2, and no MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', which is no whole number. Unset WORLD_SIZE"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='', which is no whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is no whole number. Unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "RANK": "-1"}, "RANK='-1', which is no whole number"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT='auto', which is no whole number"),
    ],
)
def test_variables_that_no_launcher_has_set_are_named(given, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_rendezvous()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_rendezvous()


def test_a_launch_is_connected(launch):
    check_rendezvous()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "MASTER_ADDR"])
def test_one_process_waits_for_nobody(launch, variable, monkeypatch):
    monkeypatch.delenv(variable)
    before = threading.active_count()
    with awaiting_processes():
        assert threading.active_count() == before
