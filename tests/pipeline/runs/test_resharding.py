"""`pipeline.runs.resharding`: an optimizer's state is the same, to the bit, after it was cut for any other processes."""

import copy
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.placement_types import Shard

from pipeline.runs.resharding import FLAT, LAYOUTS, PIECES, ROWS, Layout, gather, share_out


SHAPES = {
    "a": [5, 3], "b": [1, 7], "c": [4], "d": [2, 3, 2], "e": [1], "f": [8, 2], "g": [3, 1],
}  # fmt: skip
GROUPS = [["a", "b", "d", "f"], ["c", "e", "g"]]  # with weight decay and without
WORLDS = [(kind, processes) for kind in ("FSDP", "ZeRO-1", "ZeRO-3") for processes in (1, 2, 3, 5)] + [("DDP", 1)]


def numel(name: str) -> int:
    return torch.Size(SHAPES[name]).numel()


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def layout_of(kind: str, processes: int, *, padding: int = 0) -> tuple[Layout, list[int]]:
    """The layout that the wrapper has, with the size of each flat tensor of a process, as the wrapper computes it."""
    if LAYOUTS[kind] == ROWS:
        return Layout(ROWS, processes, [{name: 0} for group in GROUPS for name in group], SHAPES), [0] * len(SHAPES)
    held = [
        [
            numel(name) + padding if LAYOUTS[kind] == FLAT else padded(numel(name), processes) // processes
            for name in group
        ]
        for group in GROUPS
    ]
    units = [dict(zip(group, accumulate(of, initial=0), strict=False)) for group, of in zip(GROUPS, held, strict=True)]
    sizes = [sum(of) if LAYOUTS[kind] == PIECES else padded(sum(of), 2 * processes) // processes for of in held]
    return Layout(LAYOUTS[kind], processes, units, SHAPES), sizes


def groups_of(layout: Layout) -> list[dict]:
    """The parameter groups of a new optimizer's state dict."""
    ends = [0, len(GROUPS[0]), len(SHAPES)] if layout.kind == ROWS else [0, 1, 2]
    return [{"lr": 0.0, "fused": None, "params": list(range(*ends))} for ends in pairwise(ends)]


@pytest.fixture
def one() -> dict:
    """The one part of a process that holds everything: what torch's AdamW keeps after three updates."""
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    options = [
        {"params": [weights[name] for name in group], "weight_decay": 0.1 / i} for i, group in enumerate(GROUPS, 1)
    ]
    optimizer = torch.optim.AdamW(options, lr=1e-2, betas=(0.8, 0.9))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 0.5**step])
    for _ in range(3):
        for weight in weights.values():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        scheduler.step()
    return {
        "optimizer": optimizer.state_dict(),
        "weights": [weights[name].detach() for group in GROUPS for name in group],
        "scheduler": scheduler.state_dict(),
    }


def whole_of(one: dict):
    return gather(layout_of("DDP", 1)[0], [one])


def same(first, second) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize(("kind", "processes"), WORLDS)
def test_state_is_the_same_after_it_was_cut_for_other_processes(kind, processes, one):
    whole = whole_of(one)
    assert set(whole.weights) == set(whole.moments) == set(SHAPES)
    layout, sizes = layout_of(kind, processes)
    parts = [share_out(whole, layout, i, sizes, groups_of(layout)) for i in range(processes)]
    back = gather(layout, parts)
    assert same(back.weights, whole.weights)
    assert same(back.moments, whole.moments)
    assert same(back.schedule, whole.schedule)
    counts = [entries["step"] for entries in back.moments.values()]
    assert len({count.data_ptr() for count in counts}) == len(SHAPES)  # an optimizer counts in place
    again = share_out(back, layout_of("DDP", 1)[0], 0, [0] * len(SHAPES), one["optimizer"]["param_groups"])
    assert same(again, one)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_a_part_is_what_the_wrapper_would_hold(processes, one):
    """FSDP's rows are torch's own; DeepSpeed's flat tensors are made here as its source makes them."""
    whole = whole_of(one)
    layout, _ = layout_of("FSDP", processes)
    for unit, offsets in enumerate(layout.units):
        (name,) = offsets
        rows, _ = Shard(0)._split_tensor(whole.weights[name], processes, with_padding=False, contiguous=False)
        for process in range(processes):
            assert torch.equal(layout.cut(unit, whole.weights, process, 0), rows[process])
    layout, sizes = layout_of("ZeRO-2", processes)
    for unit, names in enumerate(GROUPS):
        flat = torch.cat([whole.weights[name].flatten() for name in names])
        flat = torch.cat([flat, torch.zeros(sizes[unit] * processes - len(flat))])
        for process, part in enumerate(flat.chunk(processes)):
            assert torch.equal(layout.cut(unit, whole.weights, process, sizes[unit]), part)
    layout, sizes = layout_of("ZeRO-3", processes)
    for unit, names in enumerate(GROUPS):
        for process in range(processes):
            pieces = []
            for name in names:
                flat = whole.weights[name].flatten()
                size = padded(len(flat), processes)
                flat = torch.cat([flat, torch.zeros(size - len(flat))])
                pieces.append(flat[process * size // processes : (process + 1) * size // processes])
            assert torch.equal(layout.cut(unit, whole.weights, process, sizes[unit]), torch.cat(pieces))


@pytest.mark.parametrize("processes", [2, 3])
def test_weights_without_their_padding_and_with_gaps_between_are_read(processes, one):
    """DeepSpeed writes moments with the padding at the end and weights without; `parameter_alignment` leaves gaps."""
    whole = whole_of(one)
    layout, sizes = layout_of("ZeRO-2", processes, padding=3)
    parts = [share_out(whole, layout, i, sizes, groups_of(layout)) for i in range(processes)]
    for unit, offsets in enumerate(layout.units):
        left = max(offset + numel(name) for name, offset in offsets.items())
        for part in parts:
            length = min(max(left, 0), sizes[unit])
            part["weights"][unit] = part["weights"][unit][:length]
            left -= length
    assert any(len(part["weights"][0]) < sizes[0] for part in parts)
    back = gather(layout, parts)
    assert same(back.weights, whole.weights) and same(back.moments, whole.moments)


def test_groups_without_weights_come_and_go(one):
    """DeepSpeed drops them, and torch's scheduler wants a value for each."""
    whole = whole_of(one)
    layout = Layout(FLAT, 2, [{"c": 0, "e": 4}], SHAPES)
    part = share_out(whole, layout, 0, [4], [{"lr": 0.0, "weight_decay": 0.0, "params": [0]}])
    assert part["scheduler"]["base_lrs"] == [1e-2] and part["scheduler"]["last_epoch"] == 3
    assert part["scheduler"]["_last_lr"] == [1e-2 * 0.5**3]
    assert part["optimizer"]["param_groups"] == [{"lr": 1e-2 * 0.5**3, "weight_decay": 0.05, "params": [0]}]
    with_empty = [*groups_of(layout_of("DDP", 1)[0]), {"lr": 0.0, "params": []}]
    part = share_out(whole, layout_of("DDP", 1)[0], 0, [0] * len(SHAPES), with_empty)
    assert part["scheduler"]["base_lrs"] == [1e-2] * 3 and len(part["optimizer"]["param_groups"]) == 3


def test_what_cannot_be_cut_is_refused(one):
    whole = whole_of(one)
    layout, sizes = layout_of("ZeRO-2", 2)
    whole.moments["d"]["step"] = torch.tensor(2.0)  # never updated in a first update
    with pytest.raises(ValueError, match="has updated a and d a different number of times"):
        share_out(whole, layout, 0, sizes, groups_of(layout))
    del whole.moments["d"]["step"]
    with pytest.raises(ValueError, match="has updated a and d a different number of times"):
        share_out(whole, layout, 0, sizes, groups_of(layout))
    factored = copy.deepcopy(one)
    factored["optimizer"]["state"][0]["exp_avg_sq_row"] = torch.zeros(5)  # as Adafactor keeps it
    with pytest.raises(ValueError, match=r"keeps 'exp_avg_sq_row' of a as a tensor of shape \(5,\).*cannot be cut"):
        gather(layout_of("DDP", 1)[0], [factored])
    layout, _ = layout_of("FSDP", 2)
    parts = [share_out(whole, layout, i, [0] * len(SHAPES), groups_of(layout)) for i in range(2)]
    with pytest.raises(ValueError, match="the parts of a have 9 elements, and the weight has 15"):
        gather(layout, parts[:1])
