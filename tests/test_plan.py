"""The plan of a run's memory: its passes on shapes are those on data, its arithmetic is that of the trainers, and a budget is kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import subprocess
import sys

import pytest
import torch
from models import save_tiny, tiny_llama

from rlhf_fast import _buffers
from rlhf_fast._allocator import resident_bytes
from rlhf_fast.cli import main as cli
from rlhf_fast.config import ConfigError, DataConfig, ModelConfig, PlanConfig, RunConfig, SFTConfig, load_config
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.model.offload import Copies
from rlhf_fast.model.packing import Packing
from rlhf_fast.ops._lm_head import Inputs, whole_rows
from rlhf_fast.plan import GPUS, ROLES, DoesNotFit, Plan, Planner, checked, largest, plan
from rlhf_fast.plan_passes import LiveBytes, head_bytes
from rlhf_fast.train import micro_batches
from rlhf_fast.train.micro_batches import fitting
from rlhf_fast.train.optimizer import HostAdamW
from rlhf_fast.train.scoring import head_logprobs
from rlhf_fast.train.sft import train_sft

PROCESS = "process before the model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("plan")))


def settings(folder: str, **changes) -> PlanConfig:
    base = PlanConfig(
        folder,
        dtype="float32",
        lora=LoraConfig(r=4),
        batch_size=16,
        micro_batch_size=3,
        prompt_tokens=9,
        response_tokens=8,
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("shared_layers", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_on_shapes_allocates_what_the_pass_on_data_does(folder, checkpointing, shared_layers):
    found = plan(settings(folder, trainer="sft", gradient_checkpointing=checkpointing, shared_layers=shared_layers))
    model = SharedModel(tiny_llama(), ("policy",), LoraConfig(r=4), shared_layers, gradient_checkpointing=checkpointing)
    model.train()
    for p in model.parameters_of("policy").values():
        p.grad = torch.zeros_like(p)
    ids = torch.zeros(1, 51, dtype=torch.int64)
    packing = Packing(torch.tensor([0, 17, 34, 51]), torch.arange(17).repeat(3)[None], 17)
    flat, mask = ids.flatten(), torch.ones(51, dtype=torch.bool)
    with model.backbone.packed(), LiveBytes() as live:
        hidden = model._outputs(ids, packing, ("policy",), None)["policy"].hidden
        head_logprobs(model, hidden, flat, mask).logprobs.sum().backward()
    assert found.phases["update of policy"] == pytest.approx(live.peak, rel=0.03)


def test_a_cpu_packs_and_a_gpu_without_flash_attention_does_not(folder):
    here, there = Planner(settings(folder)), Planner(settings(folder, gpu="h100"))
    assert here.passes.packed and not there.passes.packed
    assert here.passes.scores(("policy",), 4, 9) == pytest.approx(there.passes.scores(("policy",), 4, 9), rel=0.1)


def test_weights_adapters_and_optimizer_are_counted_to_the_byte(folder):
    found = plan(settings(folder, shared_layers=1))
    base = tiny_llama()
    model = SharedModel(base, lora=LoraConfig(r=4), shared_layers=1)
    sizes = {role: sum(p.nbytes for p in model.parameters_of(role).values()) for role in model.roles}
    weights = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in (*base.parameters(), *base.buffers())
    }
    assert found.always["base weights"] == sum(weights.values())
    assert found.always["adapters and heads"] == sum(sizes.values())
    assert found.always["gradients"] == sizes["policy"] + sizes["value"]
    assert found.always["Adam's moments"] == 2 * found.always["gradients"]
    assert found.always["outputs of the shared layers"] == 16 * 17 * 32 * 4
    assert found.phases["checkpoint"] == 6 * found.always["gradients"]
    assert found.always[PROCESS] > 2**26, "Python and torch alone are larger"


def test_ranks_share_the_layers_and_the_batch(folder):
    one, four = (plan(settings(folder, ranks=n, shard=n > 1, shared_layers=0)) for n in (1, 4))
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in tiny_llama().model.layers]
    spread = sum(size - -(-size // 4) for size in layers)
    assert one.always["base weights"] - four.always["base weights"] == spread
    assert four.always["layers gathered at once"] == sum(layers[:2]) and "layers gathered at once" not in one.always
    assert four.phases["update of policy"] == one.phases["update of policy"], "of a micro-batch on one rank"
    assert four.phases["rollout"] < one.phases["rollout"] + sum(layers)
    assert "rollout" not in plan(settings(folder, ranks=4, shard=True, engine="process")).phases


def test_each_trainer_is_planned_by_its_own_passes(folder):
    of = lambda trainer, rows, **k: Planner(settings(folder, trainer=trainer, group_size=4, **k)).at(rows)
    update = "update of policy"
    pairs, alone = of("online-dpo", 3), of("grpo", 6)
    assert pairs.phases[update] == alone.phases[update], "a pair is two completions, whose reference is known"
    assert pairs.phases["scoring"] < alone.phases["scoring"], "of as many completions as a pass has pairs"
    assert of("kto", 6).phases[update] == of("dpo", 3).phases[update]
    reads = Planner(settings(folder, trainer="kto"))
    strange = reads.passes.scores(("policy", "reference"), 6, 17)
    assert reads.at(6).phases["answers to other prompts"] == strange
    learned = of("raft", 6)
    assert learned.phases[update] == alone.phases[update]
    assert "scoring" not in learned.phases
    assert of("raft", 6, roles=("policy", "reward")).phases["scoring"] > 0
    known = of("ppo", 6, old_logprobs="sampled")
    assert known.phases["scoring"] < of("ppo", 6).phases["scoring"]


def test_a_greedy_completion_of_each_prompt_is_a_rollout_of_its_own(folder):
    of = lambda **k: Planner(settings(folder, trainer="grpo", greedy=True, **k))
    both = of(group_size=4).at(2)
    alone = Planner(settings(folder, trainer="grpo", group_size=1, batch_size=4)).at(2)
    assert both.phases["greedy rollout"] == alone.phases["rollout"] < both.phases["rollout"]
    beside = of(group_size=4, engine="process").at(2)
    assert beside.phases["greedy rollout"] == both.phases["greedy rollout"], "the trainer decodes it"
    assert "rollout" not in beside.phases


def test_a_process_that_samples_has_a_plan_of_its_own(folder):
    here, beside = (plan(settings(folder, engine=engine, dtype="bfloat16")) for engine in ("local", "process"))
    sampler = beside.sampler
    assert here.sampler is None and here.total == here.peak and sampler is not None
    assert sampler.always["base weights"] == here.always["base weights"]
    policy = SharedModel(tiny_llama(), ("policy",), LoraConfig(r=4)).parameters_of("policy").values()
    assert sampler.always["adapter"] == sum(p.nbytes for p in policy)
    assert sampler.always["packed weights"] + sampler.phases["rollout"] == here.phases["rollout"]
    assert sampler.phases["reading the weights"] == here.phases["reading the weights"]
    assert beside.total == beside.peak + sampler.peak
    assert beside.lines()[-1].split()[:2] == ["both", f"{beside.total / 2**20:,.1f}"]
    for elsewhere in ({"engine": "vllm"}, {"engine": "process", "gpu": "h100"}):
        assert plan(settings(folder, **elsewhere)).sampler is None
    with pytest.raises(DoesNotFit):
        checked(beside, beside.total - 1)
    planner = Planner(settings(folder, engine="process"))
    tight = planner.at(6).total - 1
    found = largest(planner, tight, 6)
    assert found.micro_batch_size == 5 and found.total <= tight < planner.at(6).total


def test_what_moves_to_the_host_is_stated_part_by_part(folder):
    there = settings(folder, gpu="h100")
    plain, layers = plan(there), plan(dataclasses.replace(there, offload=True))
    moments = plan(dataclasses.replace(there, optim_offload=True))
    copies = Copies(torch.device("cpu"))
    model = SharedModel(tiny_llama(), lora=LoraConfig(r=4))
    model.backbone.offload(copies)
    hosts = [host.nbytes for host in model.backbone.stream.hosts]
    moved = sum(p.nbytes for p in model.backbone.layers.parameters())
    assert layers.host == {"decoder layers": sum(hosts)}
    assert plain.always["base weights"] - layers.always["base weights"] == moved
    assert layers.always["layers on the GPU at once"] == sum(hosts[:2])
    assert layers.peak == plain.peak - moved + sum(hosts[:2])
    trained = [p for role in ROLES["ppo"][1] for p in model.parameters_of(role).values()]
    groups = [{"params": trained, "lr": 1.0}]
    optimizer = HostAdamW(groups, copies)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = sum(x.nbytes for s in optimizer.state.values() for key, x in s.items() if key != "step")
    step = optimizer.here[0].untyped_storage().nbytes() + optimizer._gradients[0].untyped_storage().nbytes()
    assert moments.host == {"Adam's moments": state, "parameters and gradients of a step": step}
    assert plain.always["Adam's moments"] == state and "Adam's moments" not in moments.always
    assert "optimizer step" in plain.phases and "optimizer step" not in moments.phases
    both = plan(dataclasses.replace(there, offload=True, optim_offload=True))
    assert both.host == layers.host | moments.host
    assert any(line.startswith("decoder layers") and line.endswith("MiB  on the host") for line in both.lines("h100"))


def test_a_cpu_has_nothing_to_move(folder):
    plain, offloaded = (plan(settings(folder, offload=x, optim_offload=x)) for x in (False, True))
    without = lambda p: {name: size for name, size in p.always.items() if name != PROCESS}
    assert without(plain) == without(offloaded) and plain.phases == offloaded.phases and not offloaded.host


def test_offload_is_refused_where_a_run_refuses_it(folder):
    for other in ({"quantize": "nf4"}, {"shard": True, "ranks": 2}):
        with pytest.raises(ValueError, match="PlanConfig: argument 'offload' got True, expected False beside"):
            settings(folder, gpu="h100", offload=True, **other)


def test_a_base_of_another_dtype_is_read_beside_its_file(folder):
    found = plan(settings(folder, trainer="sft", dtype="bfloat16"))
    numbers = sum(p.numel() for p in tiny_llama().parameters())
    assert found.phases["reading the weights"] == 4 * numbers
    assert "reading the weights" not in plan(settings(folder, trainer="sft")).phases


@pytest.mark.parametrize("gpu", [None, "h100"])
def test_a_rollout_holds_every_key_once_and_on_a_cpu_the_packed_weights(folder, gpu):
    base = tiny_llama()
    config = base.config
    width = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    layers = [m.weight for m in base.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    packed = sum(w.nbytes for w in (*layers, base.lm_head.weight)) if gpu is None else 0

    def rest(prompts: int, changes: dict) -> int:
        planner = Planner(settings(folder, gpu=gpu, **changes))
        return planner.at(1).phases["rollout"] - planner.passes.reads("policy", prompts, 9)

    assert rest(16, {}) == per_token * 16 * 17 + packed
    grouped = rest(2, {"trainer": "grpo", "group_size": 8})
    reads = Planner(settings(folder, trainer="grpo", group_size=8)).passes.reads("policy", 2, 9)
    logits = 2 * 16 * config.vocab_size * 4
    assert grouped == per_token * (2 * 9 + 16 * 8) + packed + max(logits - reads, 0), (
        "a prompt's keys serve its samples"
    )
    assert "rollout" not in plan(settings(folder, gpu=gpu, engine="process")).phases


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 40), (torch.float32, 3000), (torch.bfloat16, 3000)])
def test_the_chunks_of_the_head_are_those_of_its_op(dtype, rows):
    weight = torch.zeros(9000, 16, dtype=dtype)
    hidden = torch.zeros(rows, 16, dtype=dtype)
    ids = torch.zeros(rows, dtype=torch.int64)
    inputs = Inputs(hidden, weight, None, ids, None, None, None, None, None, 1.0, 0.0, 64 << 20)
    if any(inputs.converts(x) for x in (hidden, weight)):
        pytest.skip("this CPU widens bfloat16 first")
    chunk = next(iter(whole_rows(inputs, None, narrow=dtype is torch.bfloat16)))
    own = chunk.logits.untyped_storage().nbytes() if rows == 40 else len(chunk.logits) * chunk.logits.stride(0) * 4
    narrow = 0 if chunk.narrow is None else len(chunk.narrow) * chunk.narrow.stride(0) * 2
    assert head_bytes(rows, weight, gpu=False) == own + narrow
    del chunk
    _buffers.release()


def test_what_a_setting_saves(folder):
    plain = plan(settings(folder))
    assert {"rollout", "scoring", "update of policy", "update of value"} < set(plain.phases)
    shared = plan(settings(folder, shared_layers=2))
    assert shared.phases["update of policy"] < plain.phases["update of policy"]
    assert shared.always["adapters and heads"] < plain.always["adapters and heads"]
    leaner = plan(settings(folder, gradient_checkpointing=True))
    assert leaner.phases["update of policy"] < plain.phases["update of policy"]
    narrow = plan(settings(folder, dtype="bfloat16"))
    assert narrow.always["base weights"] < 0.6 * plain.always["base weights"]
    pairs, texts = (plan(settings(folder, trainer=t)).phases["update of policy"] for t in ("dpo", "sft"))
    assert pairs > 2 * texts, "two answers, and the reference's states of both"


def test_the_largest_micro_batch_that_fits_is_found(folder):
    planner = Planner(settings(folder, trainer="sft"))
    peaks = {n: planner.at(n).peak for n in (1, 5, 6)}
    assert peaks[1] < peaks[5] < peaks[6]
    one, two, many = (planner.at(n).phases["update of policy"] for n in (1, 2, 16))
    assert many - one == pytest.approx(15 * (two - one), rel=0.02), "what `largest` relies on"
    for room, size in ((peaks[1], 1), (peaks[6] - 1, 5), (peaks[6], 6)):
        found = largest(planner, room, 7)
        assert found.micro_batch_size == size and found.peak <= room
    with pytest.raises(DoesNotFit, match=r"GiB with a micro-batch of 1, expected at most[\s\S]*update of policy"):
        largest(planner, peaks[1] - 1, 7)


def test_checked_keeps_to_the_budget():
    found = Plan({"base weights": 10}, {"scoring": 5, "update of policy": 7}, micro_batch_size=4)
    assert found.peak == 17 and checked(found, 17) is found
    with pytest.raises(DoesNotFit, match="micro-batch of 4"):
        checked(found, 16.9)


def run_of(folder: str, gib: float | None):
    """What `fitting` reads of the settings of a run."""
    lora = LoraConfig(r=4)
    run = RunConfig("unused", memory_gib=gib)
    return dataclasses.make_dataclass("Settings", ["model", "run"])(ModelConfig(folder, "float32", lora=lora), run)


def test_a_budget_is_of_the_memory_of_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"'run.memory_gib' got 8.0, expected None for a run on a GPU"):
        fitting(run_of(folder, 8.0), "ppo", 12, [(9, 3)])


def test_a_run_takes_what_its_budget_has_room_for(folder, caplog, monkeypatch):
    called: list[bool] = []
    monkeypatch.setattr(micro_batches, "return_large_blocks", lambda: called.append(True))
    lengths = [(9, 3), (4, 8), (9, 8)]
    rollouts = {"batch_size": 16, "roles": ("policy", "reference", "value")}
    assert fitting(run_of(folder, None), "ppo", 12, [], **rollouts) == 12, "no budget: nothing is asked"
    assert not called
    with caplog.at_level(logging.INFO, "rlhf_fast"):
        assert fitting(run_of(folder, 1024.0), "ppo", 12, lengths, **rollouts) == 12
    assert "micro-batches of 12" in caplog.text and called
    with pytest.raises(DoesNotFit, match=r"expected at most 0\.01"):
        fitting(run_of(folder, 0.01), "ppo", 12, lengths, **rollouts)
    with pytest.raises(DoesNotFit, match="with a micro-batch of 12"):
        fitting(run_of(folder, 0.01), "dpo", 12, lengths, whole=True)


def test_a_budget_changes_no_number_and_refuses_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batches, "return_large_blocks", lambda: True)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": "a word or two."}) + "\n" for _ in range(8)))
    model, data = ModelConfig(folder, "float32", lora=LoraConfig(r=4)), DataConfig(str(tmp_path / "data.jsonl"))

    def train(name: str, gib: float | None) -> bytes:
        run = RunConfig(str(tmp_path / name), memory_gib=gib, sample_every=0)
        adapter = train_sft(SFTConfig(model, data, run, batch_size=4, micro_batch_size=4, max_steps=2))
        return (adapter / "adapter_model.safetensors").read_bytes()

    assert train("roomy", 1024.0) == train("free", None)
    with pytest.raises(DoesNotFit):
        train("narrow", 0.01)
    assert not (tmp_path / "narrow").exists()


def test_large_blocks_go_back_to_the_system():
    code = """
import sys, torch
from rlhf_fast._allocator import LARGE, resident_bytes, return_large_blocks
assert return_large_blocks() == sys.argv[1].startswith("glibc")
pinned, before = [], resident_bytes()
for _ in range(512):
    block = torch.ones(2 * LARGE // 4)
    pinned.append(torch.ones(LARGE // 32))  # what would keep the top of the heap in its place
    del block
print(resident_bytes() - before)
"""
    libc = platform.libc_ver()[0]
    done = subprocess.run([sys.executable, "-c", code, libc], capture_output=True, text=True, check=True)
    assert resident_bytes() > 2**26
    if libc == "glibc":
        assert int(done.stdout) < 2**24, "512 blocks of 256 KiB came and went"


def test_what_dead_tensors_left_in_the_heap_goes_back_when_asked():
    code = """
import torch
from rlhf_fast._allocator import resident_bytes, trim
block = torch.ones(2**22)
del block  # 16 MiB: glibc takes smaller ones from the heap from here on
pairs = [(torch.ones(2**18), torch.ones(4096)) for _ in range(100)]
pins = [pin for _, pin in pairs]  # what keeps the top of the heap in its place
del pairs
before = resident_bytes()
print(trim(), before - resident_bytes(), float(torch.cat(pins).sum()), float(torch.ones(2**18).sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given, size, *sums = done.stdout.split()
    assert sums == [str(4096.0 * 100), str(float(2**18))]
    if platform.libc_ver()[0] == "glibc":
        assert given == "True" and int(size) > 2**26, "most of 100 MiB"
    else:
        assert given == "False"


def test_the_command_prints_every_part_and_whether_it_fits(folder, capsys):
    assert cli(["plan", "--model", folder, "--gpu", "rtx4090", "--trainer", "grpo"]) == 0
    text = capsys.readouterr().out
    for part in (
        "base weights",
        "adapters and heads",
        "Adam's moments",
        "rollout",
        "scoring",
        "update of policy",
        "peak",
    ):
        assert part in text
    assert f"rtx4090: {GPUS['rtx4090']} GiB" in text and "fits" in text and PROCESS not in text
    sizes = ["--micro-batch-size", "none", "--batch-size", "32", "--memory-gib", "100"]
    assert cli(["plan", "--model", folder, *sizes]) == 0
    text = capsys.readouterr().out
    assert "32 sequences" in text and PROCESS in text


def test_what_cannot_be_planned_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="'model' got"):
        plan(settings(str(tmp_path)))
    folder = str(save_tiny(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"'shared_layers' got 3, expected 0 to 2 for a model of 3 layers"):
        plan(settings(folder, shared_layers=3))
    with pytest.raises(ValueError, match=r"'roles' got \['value'\], expected one of policy among them for sft"):
        plan(settings(folder, trainer="sft", roles=("value",)))
    with pytest.raises(ConfigError, match="gpu"):
        load_config(PlanConfig, None, ["--model", "x", "--gpu", "h1000"])
    assert cli(["plan", "--model", folder, "--memory-gib", "0.01"]) != 0
    assert "expected at most 0.01" in capsys.readouterr().err
