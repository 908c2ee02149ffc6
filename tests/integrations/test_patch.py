from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from integrations import fakes
from torch.utils.flop_counter import FlopCounterMode

import rlhf_fast
from rlhf_fast import integrations
from rlhf_fast.integrations import FRAMEWORKS, _patch, sockets, status
from rlhf_fast.integrations._compare import Unsupported
from rlhf_fast.integrations._patch import Framework, Socket, install

ENTROPY = "verl.utils.torch_functional.entropy_from_logits"


def row(table, symbol):
    return next(r for r in table if r.symbol == symbol)


def patched(ours, theirs, **socket):
    """A framework of one function, patched with `ours`: (what the framework now calls, its row)."""
    if hasattr(theirs, "__code__"):
        theirs.__module__ = "verl"
    fakes.module("verl", __version__="1.0", f=theirs)
    install(Framework("verl", ("1", "2"), (Socket("verl", "f", ours, **socket),)))
    return (lambda *args, **kwargs: sys.modules["verl"].f(*args, **kwargs)), (lambda: row(status("verl"), "verl.f"))


def test_importing_the_package_imports_no_framework():
    names = (*FRAMEWORKS, "transformers", "triton")
    code = f"import rlhf_fast, sys; print([n for n in {names} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_patch_prints_every_socket_and_unpatch_restores_the_same_objects(name, framework, capsys):
    get = framework(name)
    paths = [f"{home}.{member}" for home, members in sockets(name).items() for member in members]
    present = {}
    for path in paths:
        with contextlib.suppress(AttributeError):
            present[path] = get(path)
    table = rlhf_fast.patch(name)
    printed = capsys.readouterr().out
    for path in paths:
        assert path in printed
        if path in present and not row(table, path).state.startswith("absent"):
            assert get(path) is not present[path] and get(path).__wrapped__ is not None
            assert row(table, path).state == "waiting" and row(table, path).places >= 1
    assert sum(not r.state.startswith("absent") for r in table) >= 4
    rlhf_fast.unpatch(name)
    for path, original in present.items():
        assert get(path) == original
        owner, member = path.rsplit(".", 1)
        if member == "apply":
            assert "apply" not in vars(get(owner))  # inherited before, inherited again
        else:
            assert get(path) is original
    assert not status(name)


def test_names_that_were_imported_and_registries_follow_both_ways(framework):
    get = framework("verl")
    algos, losses = sys.modules["verl.trainer.ppo.core_algos"], sys.modules["verl.workers.utils.losses"]
    agg_loss, vanilla, gae = algos.agg_loss, algos.compute_policy_loss_vanilla, algos.compute_gae_advantage_return
    table = rlhf_fast.patch("verl", quiet=True)
    assert losses.agg_loss is algos.agg_loss is not agg_loss
    assert algos.POLICY_LOSS_REGISTRY["vanilla"] is algos.compute_policy_loss_vanilla is not vanilla
    assert algos.ADV_ESTIMATOR_REGISTRY["gae"] is algos.compute_gae_advantage_return is not gae
    assert row(table, "verl.trainer.ppo.core_algos.agg_loss").places == 2
    late = fakes.module("verl.late")  # imported after the patch: from core_algos import agg_loss
    late.agg_loss = kept = get("verl.trainer.ppo.core_algos.agg_loss")
    rlhf_fast.unpatch("verl")
    assert late.agg_loss is losses.agg_loss is algos.agg_loss is agg_loss
    assert algos.POLICY_LOSS_REGISTRY["vanilla"] is vanilla and algos.ADV_ESTIMATOR_REGISTRY["gae"] is gae
    x, mask = torch.rand(2, 3), torch.ones(2, 3)
    assert kept(x, mask, "token-sum") == agg_loss(x, mask, "token-sum")  # a kept reference still works


def test_patching_again_changes_nothing_and_sees_new_modules(framework):
    get = framework("verl")
    original = get(ENTROPY)
    rlhf_fast.patch("verl", quiet=True)
    first = get(ENTROPY)
    first(torch.randn(2, 5))
    fakes.module("verl.engine").entropy_from_logits = original  # held the original all along, imported late
    table = rlhf_fast.patch("verl", quiet=True)
    assert get(ENTROPY) is first is get("verl.engine.entropy_from_logits")
    assert (row(table, ENTROPY).reached, row(table, ENTROPY).places) == (1, 2)
    rlhf_fast.unpatch("verl")
    assert get(ENTROPY) is original is get("verl.engine.entropy_from_logits")
    assert rlhf_fast.unpatch("verl") == []


def test_a_method_is_replaced_for_instances_that_exist(framework):
    get = framework("openrlhf")
    loss = get("openrlhf.models.loss.ValueLoss")(0.2)
    values, mask = torch.randn(2, 4), torch.ones(2, 4)
    expected = loss(values, values + 0.1, values + 1, mask)
    rlhf_fast.patch("openrlhf", quiet=True)
    torch.testing.assert_close(loss(values, values + 0.1, values + 1, mask), expected)
    assert row(status("openrlhf"), "openrlhf.models.loss.ValueLoss.forward").reached == 1


def test_a_copy_under_another_name_is_patched_when_it_is_named(framework):
    framework("openrlhf", broken=("openrlhf.models.loss", "openrlhf.models.utils"))
    copy = types.ModuleType("_copy.loss")
    fakes.openrlhf()
    for name in ("PolicyLoss", "ValueLoss"):
        found = getattr(sys.modules["openrlhf.models.loss"], name)
        found.__module__ = "_copy.loss"
        setattr(copy, name, found)
    del sys.modules["openrlhf.models.loss"]
    table = rlhf_fast.patch("openrlhf", modules={"openrlhf.models.loss": copy}, quiet=True)
    assert row(table, "openrlhf.models.loss.PolicyLoss.forward").state == "waiting"
    assert row(table, "openrlhf.models.loss.DPOLoss.forward").state.startswith("absent")
    copy.ValueLoss(None)(torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3), torch.ones(2, 3))
    assert row(status("openrlhf"), "openrlhf.models.loss.ValueLoss.forward").reached == 1


def test_only_what_can_be_imported_is_patched(framework):
    framework("openrlhf", broken=("openrlhf.models.loss",))
    table = rlhf_fast.patch("openrlhf", quiet=True)
    assert row(table, "openrlhf.models.loss.DPOLoss.forward").state == (
        "absent: No module named 'openrlhf.models.loss'; 'openrlhf.models' is not a package"
    )
    assert row(table, "openrlhf.models.utils.compute_reward").state == "waiting"


def test_nothing_to_import_and_unknown_names_raise(monkeypatch):
    fakes.module("slime")
    with pytest.raises(ImportError, match=r"nothing of slime could be imported(.|\n)*ppo_utils\.vanilla_gae .* absent"):
        rlhf_fast.patch("slime", quiet=True)
    for call in (rlhf_fast.patch, rlhf_fast.unpatch, sockets):
        with pytest.raises(ValueError, match="argument 'framework' got 'deepspeed', expected one of 'trl', 'verl'"):
            call("deepspeed")


@pytest.mark.parametrize(
    ("version", "warns"), [("0.8.9", True), ("0.9", False), ("0.10.0.dev", False), ("0.11.0", True)]
)
def test_versions_outside_of_the_range_are_named(version, warns, framework):
    framework("verl", version)
    if warns:
        with pytest.warns(RuntimeWarning, match=rf"found verl {version}, expected >=0.9,<0.11") as caught:
            rlhf_fast.patch("verl", quiet=True)
        assert caught[0].filename == __file__
    else:
        rlhf_fast.patch("verl", quiet=True)


def softplus(x, mask=None):
    found = torch.nn.functional.softplus(x)
    return found if mask is None else found * mask


WRONG = {
    "value": lambda x, mask=None: softplus(x) * (1 + 1e-3),
    "gradient": lambda x, mask=None: softplus(x).detach() + 2 * (softplus(x) - softplus(x).detach()),
    "no gradient": lambda x, mask=None: softplus(x.detach()),
    "dtype": lambda x, mask=None: softplus(x).double(),
    "shape": lambda x, mask=None: softplus(x)[None],
    "structure": lambda x, mask=None: (softplus(x), None),
    "nan": lambda x, mask=None: softplus(x) * torch.nan,
    "error": lambda x, mask=None: torch.linalg.cholesky(-torch.eye(2)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_function_that_disagrees_is_put_back_with_one_warning(kind):
    original = lambda x, mask=None: softplus(x, mask)
    call, found = patched(WRONG[kind], original)
    x = torch.randn(4, 5, requires_grad=True)
    with pytest.warns(RuntimeWarning, match=r"verl\.f stays the original: ") as caught:
        y = call(x)
    assert len(caught) == 1 and torch.equal(y, softplus(x)) and y.requires_grad
    assert caught[0].filename == __file__
    assert sys.modules["verl"].f is original
    call(x)
    assert found().state.startswith("rejected: ") and (found().reached, found().places) == (0, 0)
    install(Framework("verl", ("1", "2"), (_patch._active["verl"][0].socket,)))
    assert sys.modules["verl"].f is original  # stays rejected


def test_agreement_is_checked_for_every_kind_of_call():
    def ours(x, mask=None):
        return softplus(x) if x.dtype is torch.float32 else softplus(x) * 1.01

    call, found = patched(ours, lambda x, mask=None: softplus(x, mask))
    call(torch.randn(3))
    call(torch.randn(3, requires_grad=True))
    assert (found().state, found().reached) == ("checked", 2)
    with pytest.warns(RuntimeWarning, match="stays the original"):
        call(torch.randn(3, dtype=torch.float64))
    assert found().reached == 2


def test_gradients_are_checked_at_the_first_call_that_has_them():
    ours = lambda x, mask=None: softplus(x).detach() + 2 * (softplus(x) - softplus(x).detach())
    call, found = patched(ours, lambda x, mask=None: softplus(x, mask))
    with torch.no_grad():
        call(torch.randn(3, requires_grad=True))
    assert found().reached == 1
    with pytest.warns(RuntimeWarning, match="has gradient 0 .* away"):
        call(torch.randn(3, requires_grad=True))


def test_masked_slots_are_not_compared_and_nan_of_the_original_proves_nothing():
    call, found = patched(
        lambda x, mask: softplus(x).where(mask != 0, 0.0), lambda x, mask: softplus(x) + mask - 1, counts="mask"
    )
    x, mask = torch.randn(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert call(x, mask)[0, 2] == 0 and found().reached == 1
    rlhf_fast.unpatch("verl")
    call, found = patched(
        lambda x, mask: softplus(x).where(mask != 0, 0.0).sum(), lambda x, mask: (softplus(x) * mask).sum()
    )
    assert call(
        x.where(mask != 0, torch.nan), mask
    ).isnan()  # the original's answer, until there is something to compare
    assert found().fell_through == {"not checked yet: the original gives NaN, ours does not": 1}
    call(x, mask)
    assert call(x.where(mask != 0, torch.nan), mask).isfinite() and found().reached == 2


def test_what_ours_does_not_take_goes_to_the_original_with_its_reason():
    def ours(x, power=1.0, mask=None):
        if power != 1.0:
            raise Unsupported(f"power {power}")
        return rlhf_fast.whiten(x) * 0 + softplus(x)

    def theirs(x, power=1.0, mask=None, extra=None):
        return softplus(torch.as_tensor(x)) ** power

    call, found = patched(ours, theirs)
    x = torch.randn(4)
    assert torch.equal(call(x, power=2.0), softplus(x) ** 2)
    assert torch.equal(call(x, extra=1), softplus(x))  # a keyword of a later version
    assert call([1.0, 2.0]).shape == (2,)  # our check raises TypeError
    call(x)
    reasons = found().fell_through
    assert (found().reached, reasons["power 2.0"], sum(reasons.values())) == (1, 1, 3)
    assert any("extra" in reason for reason in reasons) and any("whiten: argument 'x'" in reason for reason in reasons)
    assert "verl.f: 1 x original: power 2.0" in str(status())


def test_the_originals_errors_stay_its_own(framework):
    get = framework("verl")
    rlhf_fast.patch("verl", quiet=True)
    with pytest.raises(RuntimeError, match="out of bounds"):  # torch.gather, not our ValueError
        get("verl.utils.torch_functional.logprobs_from_logits")(torch.randn(2, 5), torch.tensor([1, 7]))
    with pytest.raises(ValueError, match=r"^\(global\) batch_num_tokens is required"):
        get("verl.trainer.ppo.core_algos.agg_loss")(torch.rand(2, 3), torch.ones(2, 3), "token-mean", dp_size=2)


def test_inputs_graph_and_random_numbers_are_left_alone():
    def theirs(x, mask=None):
        torch.rand(3)
        return x.mul_(1.0).sigmoid()

    call, _ = patched(lambda x, mask=None: torch.sigmoid(x + 0 * torch.rand(())), theirs)
    leaf = torch.randn(3, requires_grad=True)
    x, state = leaf * 2, torch.get_rng_state()
    version = x._version
    y = call(x)
    assert x._version == version and leaf.grad is None
    torch.set_rng_state(state)
    torch.rand(())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    call(leaf * 2)  # checked before: the numbers that ours draws and no more
    assert torch.equal(torch.get_rng_state(), after)
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * torch.sigmoid(2 * leaf.detach()) * (1 - torch.sigmoid(2 * leaf.detach())))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_of_a_checkpoint(reentrant, framework):
    get = framework("verl")
    x = torch.randn(3, 7, requires_grad=True)
    expected = torch.autograd.grad(get(ENTROPY)(x).sum(), x)[0]
    rlhf_fast.patch("verl", quiet=True)
    torch.utils.checkpoint.checkpoint(get(ENTROPY), x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    found = row(status(), ENTROPY)
    assert found.state == "checked" and found.reached >= 1  # the recomputation may stop inside of the second call


def test_inside_of_a_compiled_caller(framework):
    get = framework("verl")
    rlhf_fast.patch("verl", quiet=True)
    x = torch.randn(3, 7)
    torch.testing.assert_close(torch.compile(lambda x: get(ENTROPY)(x) + 1, backend="eager")(x), get(ENTROPY)(x) + 1)
    assert row(status(), ENTROPY).reached == 2


def test_tensors_of_other_kinds_go_to_the_original(framework):
    get = framework("verl")
    rlhf_fast.patch("verl", quiet=True)

    class Odd(torch.Tensor):
        pass

    get(ENTROPY)(torch.randn(2, 5).as_subclass(Odd))
    partitioned = torch.nn.Parameter(torch.randn(2, 5))
    partitioned.ds_id = 0
    get(ENTROPY)(partitioned)
    assert row(status(), ENTROPY).fell_through == {
        "an argument is a Odd": 1,
        "an argument is a parameter of DeepSpeed, which ZeRO-3 partitions before the backward": 1,
    }


def test_nothing_is_checked_where_every_op_is_watched():
    call, found = patched(lambda x, mask=None: softplus(x), lambda x, mask=None: softplus(x, mask))
    x = torch.randn(3)
    with FlopCounterMode(display=False):
        call(x)
    torch.testing.assert_close(torch.func.vmap(call)(x), softplus(x))
    assert (found().reached, sum(found().fell_through.values())) == (0, 2)
    call(x)
    with FlopCounterMode(display=False):
        call(x)
    torch.testing.assert_close(torch.func.vmap(call)(x), softplus(x))
    assert (found().reached, sum(found().fell_through.values())) == (2, 3)


def test_the_reasons_end():
    def ours(x):
        raise Unsupported(f"the number {float(x)}")

    call, found = patched(ours, torch.sin)
    for n in range(200):
        call(torch.tensor(float(n % 100)))
    reasons = found().fell_through
    assert len(reasons) == _patch.REASONS + 1 and sum(reasons.values()) == 200
    assert reasons["the number 0.0"] == 2 and reasons["other reasons"] == 2 * (100 - _patch.REASONS)


def test_a_check_of_logits_reads_some_rows_only(framework, monkeypatch):
    get = framework("trl")
    seen = []
    home = sys.modules["trl.trainer.utils"]
    original = home.selective_log_softmax
    monkeypatch.setattr(
        home, "selective_log_softmax", lambda logits, index: seen.append(logits.shape) or original(logits, index)
    )
    rlhf_fast.patch("trl", quiet=True)
    call = get("trl.trainer.utils.selective_log_softmax")
    assert call(torch.randn(3, 700, 4), torch.zeros(3, 700, dtype=torch.long)).shape == (3, 700)
    assert call(torch.randn(300, 4, 3), torch.zeros(300, 4, dtype=torch.long)).shape == (300, 4)
    rlhf_fast.unpatch("trl")
    monkeypatch.undo()
    assert seen == [(1, 512, 4)]


def test_the_original_of_a_check_is_not_made_of_ours(framework):
    get = framework("verl")
    rlhf_fast.patch("verl", quiet=True)
    get("verl.trainer.ppo.core_algos.kl_penalty")(torch.randn(3), torch.randn(3), "k3+")
    forward = row(status(), "verl.trainer.ppo.core_algos.kl_penalty_forward")
    assert (forward.state, forward.reached) == ("waiting", 0)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A framework on disk: openrlhf.models imports its utils by name."""
    root = tmp_path / "openrlhf"
    (root / "models").mkdir(parents=True)
    (root / "__init__.py").write_text('__version__ = "0.11.2"\n')
    (root / "models" / "__init__.py").write_text("from .utils import compute_approx_kl\n")
    (root / "models" / "utils.py").write_text(
        "def compute_approx_kl(log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', unbiased_gradient=False):\n"
        "    return (log_probs.float() - log_probs_base.float()).clamp(-10, 10)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    meta_path = list(sys.meta_path)
    yield "openrlhf.models.utils.compute_approx_kl"
    assert sys.meta_path == meta_path


def test_modules_are_patched_as_they_are_imported(package):
    from rlhf_fast.integrations import openrlhf

    openrlhf.setup_worker()
    openrlhf.setup_worker()
    assert not status("openrlhf") and "openrlhf" not in sys.modules
    import openrlhf.models  # type: ignore[no-redef]

    assert openrlhf.models.compute_approx_kl is openrlhf.models.utils.compute_approx_kl
    assert row(status("openrlhf"), package).state == "waiting"
    openrlhf.models.compute_approx_kl(torch.randn(3), torch.randn(3))
    assert row(status("openrlhf"), package).reached == 1
    utils = openrlhf.models.utils
    assert utils.__loader__ is utils.__spec__.loader and "_Loader" not in type(utils.__loader__).__name__
    rlhf_fast.unpatch("openrlhf")
    assert not hasattr(openrlhf.models.compute_approx_kl, "__wrapped__")


def test_unpatching_before_the_import_leaves_it_alone(package):
    integrations.patch_on_import("openrlhf")
    rlhf_fast.unpatch("openrlhf")
    import openrlhf.models

    assert not hasattr(openrlhf.models.compute_approx_kl, "__wrapped__")


def test_what_is_imported_already_is_patched_at_once(package):
    import openrlhf.models

    integrations.patch_on_import("openrlhf")
    assert openrlhf.models.compute_approx_kl is openrlhf.models.utils.compute_approx_kl
    assert hasattr(openrlhf.models.compute_approx_kl, "__wrapped__")
    rlhf_fast.unpatch("openrlhf")


SUITE = """
import importlib.util, torch
from openrlhf.models import compute_approx_kl

def load(name):
    spec = importlib.util.spec_from_file_location("_copy.utils", name)
    module = importlib.util.module_from_spec(spec)
    import sys
    sys.modules["_copy.utils"] = module
    spec.loader.exec_module(module)
    return module

copy = load(__file__.replace("test_suite.py", "openrlhf/models/utils.py"))
taken = copy.compute_approx_kl

def test_by_name():
    compute_approx_kl(torch.zeros(3), torch.zeros(3))

def test_of_a_copy():
    copy.compute_approx_kl(torch.zeros(3), torch.zeros(3))
    copy.compute_approx_kl(torch.zeros(3), torch.zeros(3), None, "k4")

def test_of_a_name_from_the_copy():
    taken(torch.zeros(3), torch.zeros(3))
"""


def test_the_plugin_of_pytest_patches_a_suite_and_prints_the_counters(package, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "rlhf_fast.integrations.pytest_plugin", "-p", "no:cacheprovider"]
    root = str(Path(rlhf_fast.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((root, str(tmp_path)))}
    run = lambda *options: subprocess.run(
        [*command, *options, "test_suite.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    found = run("--patch=openrlhf")
    assert found.returncode == 0 and "3 passed" in found.stdout, found.stdout
    lines = [line.split() for line in found.stdout.splitlines() if line.startswith(package + "  ")]
    assert [line[2:] for line in lines] == [["1", "0", "checked"], ["2", "1", "checked"]]
    assert "calls that reached" not in run().stdout
    assert "invalid choice" in run("--patch=deepspeed").stderr
