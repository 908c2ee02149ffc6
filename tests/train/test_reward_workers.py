from __future__ import annotations

import gc
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import alive, cpu_seconds, gone, until

from rlhf_fast._guarded import has_ended
from rlhf_fast.config import RewardSource
from rlhf_fast.rewards import Call, ContractError, Failure, InProcess, Pool, RewardError, Scorer, load_callable
from rlhf_fast.train.rewards import Rewards

SCORERS = Path(__file__).parent / "scorers.py"
NAMES = ("result", "on_cue", "noisy", "selfish", "where", "many", "draws", "reads_input")
TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def spec(name: str) -> str:
    return f"{SCORERS}:{name}"


@pytest.fixture(scope="module")
def pool():
    pool = Pool([spec(n) for n in NAMES], 2, timeout=60.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def inside():
    return InProcess({spec(n): load_callable(spec(n)) for n in NAMES})


@pytest.fixture(params=["inside", "pool"])
def backend(request):
    return request.getfixturevalue(request.param)


def one(backend, name: str, completions: list[str]):
    (answer,) = backend.run([Call(spec(name), [""] * len(completions), completions)])
    return answer


GIVEN = {
    **dict.fromkeys(("number", "tuple", "numpy scalar", "numpy 0-d", "numpy array", "0-d tensor", "tensor"), 0.5),
    **dict.fromkeys(("true", "numpy int", "numpy bool"), 1.0),
    **dict.fromkeys(("none", "nan", "inf", "huge int"), math.nan),
}


# Tensors in a worker would take two seconds of importing torch to test the same lines.
EACH_GIVEN = [(b, k) for b in ("inside", "pool") for k in GIVEN if b == "inside" or "tensor" not in k]


@pytest.mark.parametrize(("backend", "kind"), EACH_GIVEN, indirect=["backend"])
def test_case_44_numbers_of_every_kind_count_and_none_nan_and_inf_are_unscorable(backend, kind):
    assert one(backend, "result", [kind, "x", "y"]) == pytest.approx([GIVEN[kind]] * 3, nan_ok=True)


REFUSED = {
    "text": "score 0 got str, expected a number",
    "lists": "score 0 got list, expected a number",
    "complex": "score 0 got complex, expected a number",
    "column": "score 0 got list, expected a number",
    "1": "got 1 scores for 3 completions",
    "n - 1": "got 2 scores for 3 completions",
    "n + 1": "got 4 scores for 3 completions",
    "a number": "got a float, expected a list of 3",
    "nothing": "got a NoneType, expected a list of 3",
    "generator": "got a generator, expected a list of 3",
    "dict": "got a dict, expected a list of 3",
    "set": "got a set, expected a list of 3",
    "str": "got a str, expected a list of 3",
    "bytes": "got a bytes, expected a list of 3",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_case_44_45_what_is_no_list_of_one_number_each_is_refused_with_both_counts(backend, kind):
    with pytest.raises(ContractError) as caught:
        one(backend, "result", [kind, "x", "y"])
    assert str(caught.value) == f"reward function {spec('result')}: {REFUSED[kind]}"
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, RewardError)
    assert one(backend, "result", ["number"]) == [0.5]


def test_case_45_a_refused_result_does_not_cost_the_calls_that_ran_beside_it(pool):
    with pytest.raises(ContractError):
        pool.run([Call(spec("many"), [""], ["x"]), Call(spec("result"), [""] * 2, ["1", "x"])])
    assert pool.run([Call(spec("many"), [""], ["x"])] * 4) == [[1.0]] * 4


def test_case_46_the_function_gets_lists_of_its_own(backend):
    prompts, completions = ["p"] * 3, ["x", "y", "z"]
    assert backend.run([Call(spec("selfish"), prompts, completions)]) == [[0.0] * 3]
    assert (prompts, completions) == (["p"] * 3, ["x", "y", "z"])


def test_case_46_megabytes_of_output_are_taken_and_cut(pool, caplog, capfd):
    with caplog.at_level(logging.INFO):
        assert one(pool, "noisy", ["x", "y"]) == [1.0, 1.0]
    (record,) = caplog.records
    assert "printed: first words\nxxx" in record.message and record.message.endswith("bytes more)")
    assert len(record.message) < 5000 and capfd.readouterr() == ("", "")


def test_case_46_there_is_nothing_to_read_for_it(pool):
    answer = one(pool, "reads_input", ["x"])
    assert isinstance(answer, Failure) and answer.headline.startswith("EOFError")


@pytest.mark.parametrize("kind", ["raise", "sys.exit"])
def test_case_42_what_raises_costs_its_own_completion_and_is_logged_once(backend, caplog, kind):
    scorer = Scorer(backend, size=5)
    for _ in range(2):
        found = scorer.scores(spec("on_cue"), [""] * 10, [*TEXTS, kind, *TEXTS[1:]], allowed=1)
        assert found == pytest.approx([1, 2, 3, 4, 5, math.nan, 2, 3, 4, 5], nan_ok=True)
    assert scorer.failures == {"raised": 4}  # twice: the call of five, and the one by itself
    (record,) = caplog.records
    assert "Traceback" in record.message and ("no such letter" in record.message) is (kind == "raise")


def test_case_42_over_the_limit_the_search_ends_and_the_run_stops(caplog):
    with Rewards(RewardSource(spec("on_cue"), workers=0)) as rewards:
        with pytest.raises(
            RewardError, match=r"20 of 20 completions .*max_unscorable is 10%\); calls that failed: 4 raised"
        ):
            rewards([""] * 20, [*["raise"] * 12, *["x"] * 8], None)
        raw = rewards([""] * 20, ["raise", "raise", *["x"] * 18], None)[1]
        assert int(raw.isnan().sum()) == 2 and rewards.failures() == {"raised": 3.0} and rewards.failures() == {}
    with Rewards(RewardSource(spec("on_cue"), workers=0, max_unscorable=1.0)) as rewards:
        assert rewards([""] * 4, ["raise"] * 4, None)[1].isnan().all()


def test_case_42_functions_that_compare_a_batch_are_not_asked_again(inside):
    scorer = Scorer(inside, whole_batch=True)
    assert all(map(math.isnan, scorer.scores(spec("on_cue"), [""] * 4, ["raise", "x", "y", "z"], allowed=4)))
    assert scorer.failures == {"raised": 1}


KILLED = {
    "hang": ("timeouts", "no answer within 2 s"),
    "hang in C": ("timeouts", "no answer within 2 s"),
    "segfault": ("crashes", "its process was ended by signal 11"),
    "exit": ("crashes", "its process ended with status 3"),
}


@pytest.fixture(scope="module")
def hasty():
    """For what hangs; the other calls have to be done in that time as well."""
    pool = Pool([spec("on_cue")], 2, timeout=2.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", KILLED)
def test_case_43_48_a_hang_or_a_crash_costs_its_completion_and_the_worker_is_replaced(request, kind):
    pool = request.getfixturevalue("hasty" if KILLED[kind][0] == "timeouts" else "pool")
    before = {w.process.pid for w in pool._workers}
    scorer = Scorer(pool, size=2)
    found = scorer.scores(spec("on_cue"), [""] * 6, ["a", "bb", "ccc", kind, "a", "bb"], allowed=1)
    assert found == pytest.approx([1, 2, 3, math.nan, 1, 2], nan_ok=True)
    failure, headline = KILLED[kind]
    assert scorer.failures == {failure: 2}
    assert scorer._logged == {(spec("on_cue"), failure, headline)}
    after = {w.process.pid for w in pool._workers}
    assert len(after) == 2 and all(gone(pid) for pid in before - after)


def test_case_48_the_last_words_of_a_crash_are_logged(pool, caplog):
    Scorer(pool).scores(spec("on_cue"), [""], ["exit"], allowed=1)
    assert "ended with status 3" in caplog.text and "it printed: last words" in caplog.text


def test_case_43_what_the_function_started_is_ended_too(tmp_path, monkeypatch):
    file = tmp_path / "pid"
    monkeypatch.setenv("SCORERS_PID_FILE", str(file))
    pool = Pool([spec("on_cue")], 1, timeout=2.0)
    assert one(pool, "on_cue", ["child"]).kind == "timeouts"
    pool.close()
    assert gone(int(file.read_text()))


@pytest.mark.parametrize("kind", ["interrupt", "terminate"])
def test_signals_of_the_job_do_not_end_a_worker(pool, kind):
    assert one(pool, "on_cue", [kind]) == [float(len(kind))]


def test_idle_workers_that_die_are_replaced_unnoticed(pool):
    pool.run([Call(spec("on_cue"), [""], ["a"])] * 4)
    while any(w.loading for w in pool._workers):
        pool._turn()
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        while not has_ended(worker.process):
            time.sleep(0.01)
    assert Scorer(pool).scores(spec("on_cue"), [""] * 4, ["a"] * 4, allowed=0) == [1.0] * 4


def test_a_batch_is_shared_among_the_workers_unless_it_has_to_be_whole(pool):
    calls = lambda **options: Scorer(pool, **options).scores(spec("many"), [""] * 5, TEXTS, 0)
    assert calls() == [3.0, 3.0, 3.0, 2.0, 2.0]
    assert calls(size=1) == [1.0] * 5 and calls(whole_batch=True) == [5.0] * 5
    assert Scorer(pool).scores(spec("many"), [], [], 0) == []
    pids = {x for answer in pool.run([Call(spec("where"), [""], ["x"])] * 2) for x in answer}
    assert pids <= {float(w.process.pid) for w in pool._workers} and float(os.getpid()) not in pids


def test_draws_follow_from_the_texts(pool):
    first = [one(pool, "draws", ["x", "y"]) for _ in range(4)]
    assert first == [first[0]] * 4 and first[0][0] != first[0][1]
    assert one(pool, "draws", ["x", "z"]) != first[0]


def test_any_text_goes_through_as_it_is(pool):
    texts = ["\ud800", "\x00\n\r", "\N{GRINNING FACE}" * 100_000, "\u2028"]
    assert one(pool, "on_cue", texts) == [float(len(t)) for t in texts]
    assert one(pool, "draws", ["x"] * 50_000)[:2] == one(pool, "draws", ["x"] * 50_000)[:2]  # a megabyte of scores


def test_a_function_that_cannot_be_had_is_an_error_at_the_start(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import no_such_module\n")
    (tmp_path / "dies.py").write_text("import os\nprint('why')\nos._exit(4)\n")
    for source, message in [
        (f"{bad}:f", "No module named 'no_such_module'"),
        (f"{tmp_path}/missing.py:f", "No such file"),
        (spec("no_such_function"), "no_such_function"),
        (spec("RESULTS"), "got dict, expected a function"),
        (f"{tmp_path}/dies.py:f", "status 4 while loading: why"),
    ]:
        for workers in (0, 1) if "dies" not in source else (1,):
            with pytest.raises(ValueError, match="reward function") as caught:
                Rewards(RewardSource(source, workers=workers))
            assert message in str(caught.value)
    with pytest.raises(ValueError, match="'workers', 'timeout' got 0 and 1"):
        Pool([spec("many")], 0, timeout=1.0)


def test_case_43_nothing_is_left_when_the_pool_goes():
    gc.collect()  # of earlier tests, whose descriptors are none of this one
    pool = Pool([spec("many")], 2, timeout=5.0)
    pids = [w.process.pid for w in pool._workers]
    descriptors = len(os.listdir("/proc/self/fd"))
    del pool
    gc.collect()
    assert all(gone(pid) for pid in pids)
    closed = Pool([spec("many")], 1, timeout=5.0)
    closed.close()
    closed.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        closed.run([Call(spec("many"), [""], ["x"])])
    assert len(os.listdir("/proc/self/fd")) == descriptors - 6  # three pipes of each worker


HOLDER = """
import signal, sys
from rlhf_fast.rewards import Call, Pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in what a shell has put into the background
pool = Pool([sys.argv[1]], 2, timeout=100.0 if sys.argv[2] != "hang in C" else 3.0)
print(*(w.process.pid for w in pool._workers), flush=True)
if sys.argv[2].startswith("hang"):
    pool.run([Call(sys.argv[1], [""], [text]) for text in (sys.argv[2], "x")])
sys.stdin.readline()
sys.exit(7)
"""


def hold(state: str, folder: Path, cores: set[int] | None = None) -> tuple[subprocess.Popen, list[int]]:
    """A process with a pool of two, and its workers. Where one of them hangs, it does so now."""
    command = [sys.executable, "-c", HOLDER, spec("on_cue"), state]
    pin = None if cores is None else lambda: os.sched_setaffinity(0, cores)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "SCORERS_PID_FILE": str(folder / "pid")}
    holder = subprocess.Popen(command, **pipes, text=True, preexec_fn=pin, env=environment)
    pids = [int(x) for x in holder.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    if state.startswith("hang"):
        until((folder / "pid").exists)
    return holder, pids


@pytest.mark.parametrize(("state", "number"), [("leave", None), ("hang", signal.SIGINT), ("hang", signal.SIGKILL)])
def test_case_43_the_trainer_ends_at_once_and_takes_its_workers_along(tmp_path, state, number):
    holder, pids = hold(state, tmp_path)
    if number is None:
        holder.stdin.write("\n")
        holder.stdin.flush()
    else:
        holder.send_signal(number)
    assert holder.wait(90.0) == (7 if number is None else -number)
    assert all(gone(pid) for pid in pids)
    holder.communicate()


def test_case_43_a_worker_that_nothing_can_interrupt_does_not_outlive_a_killed_trainer_for_long(tmp_path):
    holder, pids = hold("hang in C", tmp_path, cores={min(os.sched_getaffinity(0))})
    hanging = int((tmp_path / "pid").read_text())
    assert hanging in pids
    began = used = cpu_seconds(hanging)
    holder.kill()
    holder.communicate()
    end = time.monotonic() + 120
    while (now := cpu_seconds(hanging)) is not None and time.monotonic() < end:
        used = now
        time.sleep(0.01)
    # 3 s of its time and 2 more, on one core. The thread that watches the trainer would have ended it after one, if the call let it run.
    assert 2 < used - began < 6
    assert all(gone(pid) for pid in pids)


def test_a_forked_child_does_not_end_the_workers_of_its_parent(pool):
    if (pid := os.fork()) == 0:
        pool.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert one(pool, "on_cue", ["abc"]) == [3.0]


def test_case_47_scores_beyond_fp32_are_unscorable_and_a_mix_needs_all_its_parts():
    mix = {spec("count_e"): 1.0, spec("skip_first"): -0.5}
    with Rewards(RewardSource(mix=mix, max_unscorable=0.5)) as rewards:
        raw = rewards(["", ""], ["ee", "eee"], None)[1]
    assert raw[0].isnan() and float(raw[1]) == 1.5
    with Rewards(RewardSource(mix={spec("count_e"): 3e38}, workers=0, max_unscorable=0.5)) as rewards:
        raw = rewards(["", ""], ["ee", ""], None)[1]
    assert torch.equal(raw.isnan(), torch.tensor([True, False]))
