"""Reward functions that misbehave: what they return, raise, change or start, at the first call or a later one."""

import re
from typing import NamedTuple

from tests.faults.verdicts import CLEAR, Verdict, judge
from tests.faults.world import Case, unsound


class Fault(NamedTuple):
    """A body of the reward at the chosen call, and whether a run can end well (None: both are right)."""

    body: str
    fine: bool | None


MODULE = """
import atexit, decimal, fractions, gc, logging, math, multiprocessing, os, random, signal
import subprocess, sys, threading, time, warnings, numpy, torch

CALLS = 0
good = lambda completions: [float(len(text)) for text in completions]

def work(n):
    return n * n

def reward(prompts, completions, completion_ids, log_metric=None, log_extra=None, trainer_state=None, **kwargs):
    global CALLS
    CALLS += 1
    if CALLS < {first}:
        return good(completions)
    open("acted", "w").close()
    {body}
"""


def act(statement: str, fine: bool | None) -> Fault:
    """Return a fault that does something, and then returns good rewards."""
    return Fault(f"{statement}\n    return good(completions)", fine)


FAULTS = {
    # what is returned
    "dict": Fault("return {n: 1.0 for n in range(len(completions))}", False),
    "dict of the completions": Fault("return dict.fromkeys(completions, 1.0)", False),
    "set": Fault("return set(range(len(completions)))", False),
    "frozenset": Fault("return frozenset(range(len(completions)))", False),
    "text": Fault("return '1' * len(completions)", False),
    "bytes": Fault("return bytes(len(completions))", False),
    "texts": Fault("return ['1.0'] * len(completions)", False),
    "None": Fault("return None", False),
    "a number": Fault("return 1.0", False),
    "nothing": Fault("return []", False),
    "too many": Fault("return good(completions) + [0.0]", False),
    "too few": Fault("return good(completions)[1:]", False),
    "lists": Fault("return [[1.0]] * len(completions)", False),
    "all None": Fault("return [None] * len(completions)", False),
    "NaN": Fault("return [math.nan] + good(completions)[1:]", False),
    "infinite": Fault("return [-math.inf] + good(completions)[1:]", False),
    "1e300": Fault("return [1e300, *good(completions)[1:]]", None),
    "a huge integer": Fault("return [10 ** 400] * len(completions)", False),
    "complex": Fault("return [1j] * len(completions)", False),
    "a class": Fault("return [object()] * len(completions)", False),
    "a tensor of 2": Fault("return torch.ones(len(completions), 2)", False),
    "an array of texts": Fault("return numpy.array(['a'] * len(completions))", False),
    "a lambda": Fault("return lambda: 1", False),
    "a generator": Fault("return (float(len(text)) for text in completions)", None),
    "a map": Fault("return map(len, completions)", None),
    "a tensor": Fault("return torch.tensor(good(completions))", True),
    "a bfloat16 tensor": Fault("return torch.tensor(good(completions)).bfloat16()", True),
    "a tensor with a gradient": Fault("return torch.tensor(good(completions), requires_grad=True)", None),
    "an array": Fault("return numpy.array(good(completions))", True),
    "a tuple": Fault("return tuple(good(completions))", True),
    "booleans": Fault("return [len(text) > 3 for text in completions]", True),
    "decimals": Fault("return [decimal.Decimal(len(text)) for text in completions]", None),
    "fractions": Fault("return [fractions.Fraction(len(text), 3) for text in completions]", None),
    "an async generator": Fault("async def gen():\n        yield 1.0\n    return gen()", False),
    "a coroutine": Fault("async def later():\n        return good(completions)\n    return later()", None),
    "itself, endless": Fault("import itertools\n    return itertools.count()", False),
    # what is raised
    "ValueError": Fault("raise ValueError('no reward today')", False),
    "KeyError": Fault("return {}['a']", False),
    "an assertion": Fault("assert False", False),
    "StopIteration": Fault("raise StopIteration", False),
    "sys.exit(0)": Fault("sys.exit(0)", False),
    "sys.exit()": Fault("sys.exit()", False),
    "sys.exit('bye')": Fault("sys.exit('bye')", False),
    "SystemExit in a thread pool": Fault(
        "from concurrent.futures import ThreadPoolExecutor\n    return list(ThreadPoolExecutor(1).map(sys.exit, [0]))", False
    ),
    "GeneratorExit": Fault("raise GeneratorExit", False),
    "a BaseException": Fault("class Own(BaseException): pass\n    raise Own('mine')", False),
    "RecursionError": Fault("f = lambda: f()\n    f()", False),
    "MemoryError": Fault("return bytearray(10 ** 14)", False),
    "an error with a broken text": Fault(
        "class Odd(Exception):\n        def __str__(self): raise RuntimeError('no text')\n    raise Odd", False
    ),
    "an error with escapes": Fault("raise ValueError('\\x1b[31mred\\nsecond line')", False),
    "an error of surrogates": Fault("raise ValueError('\\ud800')", False),
    "an exception group": Fault("raise ExceptionGroup('two', [ValueError('a'), TypeError('b')])", False),
    "CancelledError": Fault("import asyncio\n    raise asyncio.CancelledError", False),
    # what is changed
    "completions emptied": Fault("found = good(completions)\n    completions.clear()\n    return found", True),
    "prompts changed": act("prompts[:] = ['x'] * len(prompts)", True),
    "ids emptied": act("[ids.clear() for ids in completion_ids]", True),
    "state changed": act("trainer_state.global_step = 99; trainer_state.log_history.clear()", True),
    "rows popped": act("kwargs.clear()", True),
    "another folder": act("os.chdir('/')", None),
    "stdout gone": act("sys.stdout = None", None),
    "another seed": act("torch.manual_seed(7); random.seed(7); numpy.random.seed(7)", True),
    "no gradients": act("torch.set_grad_enabled(False)", None),
    "another default type": act("torch.set_default_dtype(torch.float64)", None),
    "warnings as errors": act("warnings.simplefilter('error')", None),
    "logging off": act("logging.disable(logging.CRITICAL)", True),
    "no collector": act("gc.disable()", True),
    "signals ignored": act("signal.signal(signal.SIGTERM, signal.SIG_IGN)", True),
    "odd environment": act("os.environ.clear()", None),
    "metrics of text": act("log_metric('a', 'b')", None),
    "metrics of NaN": act("log_metric('a', math.nan)", None),
    "a metric's name taken": act("log_metric('loss', 5.0)", None),
    "extra of a wrong length": act("log_extra('a', [1])", None),
    # what is started
    "a thread": act("threading.Thread(target=time.sleep, args=(0.2,)).start()", True),
    "a daemon": act("threading.Thread(target=time.sleep, args=(999,), daemon=True).start()", True),
    "a pool": act("with multiprocessing.get_context('fork').Pool(2) as pool: pool.map(work, range(4))", True),
    "a child that stays": act("if os.fork() == 0: time.sleep(1); os._exit(0)", True),
    "a child that goes on": act("subprocess.Popen(['sleep', '2'])", True),
    "sleep": act("time.sleep(0.3)", True),
    "output": act("print('x' * 100000)", True),
    "an error at the exit": act("atexit.register(lambda: 1 / 0)", None),
}  # fmt: skip
STAGES = ("ppo", "ppo", "evaluation", "best_of_n", "rloo", "grpo")


def rewards(case: Case) -> Verdict:
    """A reward function misbehaves."""
    stage = case.draw.choice(STAGES)
    name = case.draw.choice(sorted(FAULTS))
    fault = FAULTS[name]
    first = case.draw.choice((1, 1, 2, 3))
    case.note(f"{stage}, {name}, call {first}")
    case.write("drawn_reward.py", MODULE.replace("{first}", str(first)).replace("{body}", fault.body))
    before = case.files()
    learned = case.draw.random() < 0.3
    options = {} if learned else {"reward_adapter": []}
    if case.draw.random() < 0.3 and stage in ("ppo", "rloo", "grpo"):
        options |= {"save_strategy": "steps", "save_steps": 1}
    ended = case.run(stage, reward_funcs=["drawn_reward.reward"], **options)
    acted = (case.folder / "acted").exists()  # it may be called fewer times

    def wrong() -> str | None:
        if fault.fine is False and acted and not (learned and name == "all None"):  # as for rows of another task
            return f"a reward that gives {name} was taken"
        return unsound(stage, case.folder / "out")

    if name == "warnings as errors" and re.search(r"^\w*Warning: ", ended.message):
        return Verdict(CLEAR, "a library's warning, which the reward function has made an error")
    verdict = judge(ended, names=["drawn_reward", "reward"], lost=case.changed(before), wrong=wrong)
    if fault.fine and verdict.name == "clear error":
        return Verdict("unclear", f"a sound reward is refused: {verdict.why}")
    return verdict
