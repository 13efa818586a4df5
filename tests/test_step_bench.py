"""The benchmark of the training step: PyTorch computes the same, what is said and written."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stretchysnake_jax import cli, models, step_bench, step_contenders, step_scaling, torch_layout
from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import Config, ConfigError, OptimConfig, preset, resolve
from stretchysnake_jax.step import TrainStep, fit, init_state, make_targets
from stretchysnake_jax.step_contenders import OURS, TORCH, Case, Contender, Failed

TINY = {"dim": 16, "depth": 1, "state": 4, "patch": (4, 4), "frames": 2, "num_classes": 6}


def make_case(model: dict | None = None, optim: OptimConfig | None = None, **bucket):
    model = preset("tiny", **{**TINY, "size": (8, 12), **(model or {})})
    config = Config(model=model, optim=optim or OptimConfig())
    bucket = Bucket(**{"frames": 2, "height": 8, "width": 12, "patch": (4, 4), **bucket})
    return Case(config, bucket, batch=3)


def load_torch(case, params):
    from stretchysnake_bench import torch_model

    fitted = step_contenders.fitted_model(case.config.model, case.bucket)
    state = torch_layout.to_state_dict(fitted, fit(params, case.bucket, case.config.stretch))
    return fitted, torch_model.load(fitted, state)


def batch_of_torch(case):
    import torch

    batch = case.draw()
    return torch.from_numpy(batch["video"]), torch.from_numpy(batch["label"]).long()


@pytest.mark.parametrize(
    "model",
    [{"depth": 2}, {"pooling": "mean", "normalise": "clip", "tubelet": 2, "dt_init": "mamba"}],
)
def test_pytorch_has_our_logits_and_gradients(model):
    pytest.importorskip("torch")
    from stretchysnake_bench import torch_model

    case = make_case(model)
    apply, params = models.init(case.config.model, jax.random.key(0))
    # Nothing at its initial value: zeros and ones would hide a parameter that isn't used.
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), jax.device_get(params)
    )
    batch = case.draw()
    video = models.normalise(jnp.asarray(batch["video"]), case.config.model.normalise)

    def loss(params):
        logits = apply(params, video)
        targets = make_targets(batch["label"], logits.shape[-1], 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    fitted, theirs = load_torch(case, params)
    pixels, labels = batch_of_torch(case)
    np.testing.assert_allclose(theirs(pixels).detach(), logits, rtol=1e-4, atol=1e-4)
    torch_model.loss_of(theirs, pixels, labels, 0.1).backward()
    wanted = torch_layout.to_state_dict(fitted, grads)
    found = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert set(found) == set(wanted)
    for name, grad in wanted.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-4 * abs(grad).max())


def test_pytorch_takes_the_same_steps_at_another_scale():
    pytest.importorskip("torch")
    from stretchysnake_bench import torch_model

    optim = OptimConfig(learning_rate=1e-2, warmup=0.0, weight_decay=0.3, clip_norm=0.5)
    # Patches of twice the size on the same grid: ours resizes the kernel in every step.
    case = make_case({"temporal_init_std": 0.02}, optim, height=16, width=24, patch=(8, 8))
    state = init_state(case.config, 10**6)
    _, theirs = load_torch(case, state["params"])
    their_step = torch_model.TrainStep(theirs, resolve(optim))
    pixels, labels = batch_of_torch(case)
    first = their_step(pixels, labels)
    state, metrics = TrainStep(case.config, 10**6)(state, case.draw(), case.bucket)
    assert first == pytest.approx(float(metrics["loss"]), rel=1e-5)

    # On the base scale the weights themselves are updated, so the second loss agrees, too.
    case = make_case(optim=optim)
    state, step = init_state(case.config, 10**6), TrainStep(case.config, 10**6)
    their_step = torch_model.TrainStep(load_torch(case, state["params"])[1], resolve(optim))
    pixels, labels = batch_of_torch(case)
    for _ in range(4):
        state, metrics = step(state, case.draw(), case.bucket)
        loss = their_step(pixels, labels)
        assert loss == pytest.approx(float(metrics["loss"]), rel=1e-3)
    assert loss < first  # it learns


def test_what_pytorch_keeps():
    torch = pytest.importorskip("torch")
    from stretchysnake_bench import torch_model

    def kept(depth):
        case, storages = make_case({"depth": depth, "dim": 64}), {}
        model = torch_model.VideoMamba(case.config.model)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = torch_model.loss_of(model, *batch_of_torch(case), 0.1)
        assert loss.requires_grad
        return sum(storage.nbytes() for key, storage in storages.items() if key not in own)

    case = make_case({"dim": 64})
    found = torch_model.kept_bytes(case.config.model, case.batch, case.tokens)
    assert found == pytest.approx(kept(2) - kept(1), rel=0.05)


def test_operations_of_a_step():
    case = make_case({"depth": 2})
    model, tokens = case.config.model, 1 + 2 * 2 * 3
    macs = (tokens - 1) * 3 * 16 * model.dim + model.dim * 6
    macs += 2 * tokens * 3 * model.dim * model.inner  # in_proj, out_proj of two blocks
    per_way = model.inner * (4 + model.rank + 2 * model.state + model.rank)
    macs += 2 * 2 * tokens * per_way
    scan = 2 * 2 * tokens * 9 * model.inner * model.state
    assert step_bench.step_flops(case) == pytest.approx(3 * 3 * (2 * macs + scan))


def test_peaks_of_devices():
    find = step_bench.find_peak
    h100 = {"platform": "gpu", "kind": "NVIDIA H100 PCIe"}
    assert find(h100, "bfloat16", [])[0] == 756e12
    assert find(h100 | {"kind": "NVIDIA H100 80GB HBM3"}, "float32", [])[0] == 494e12
    peak, why = find({"platform": "gpu", "kind": "NVIDIA L40S"}, "float32", [])
    assert peak is None and "no data sheet of 'NVIDIA L40S'" in why
    assert find({"platform": "cpu"}, "float32", [3.0, 5.0])[0] == 5.0
    assert find({"platform": "cpu"}, "bfloat16", [3.0])[0] is None


def test_buckets_of_words():
    model = preset("tiny")
    assert step_bench.parse_bucket("8x112", model) == Bucket(8, 112, 112, (16, 16))
    assert step_bench.parse_bucket("4x96x128/8", model) == Bucket(4, 96, 128, (8, 8))
    with pytest.raises(ConfigError, match="--buckets has '8': it takes FRAMESxSIZE"):
        step_bench.parse_bucket("8", model)


def test_scales_double_to_the_most():
    buckets = step_scaling.scaling_buckets(preset("tiny"))
    tokens = [bucket.tokens() for bucket in buckets]
    assert tokens == [1 + 196 * 2**k for k in range(9)] and tokens[-1] > 50_000
    assert [b.tokens() for b in step_scaling.scaling_buckets(preset("micro"), 400)] == [197, 393]


def test_exponents_and_picture(tmp_path):
    tokens = [200 * 2**k for k in range(9)]
    rows = [
        {
            "tokens": n,
            "min_ms": 5.0 + n**1.5,
            "cpu_ms": 2.0 * n,
            "peak": 10**9 + 3 * n,
            "temporaries": None,
        }
        for n in tokens
    ]
    fits = {(fit["of"], fit["from"]): fit for fit in step_scaling.exponents(rows)}
    assert set(fits) == {(of, n) for of in ("time", "CPU time", "peak memory") for n in (200, 1600)}
    assert fits["time", 1600]["exponent"] == pytest.approx(1.5, abs=1e-3)
    assert fits["peak memory", 200]["exponent"] < 0.01
    assert fits["time", 1600]["points"] == 6 and fits["time", 1600]["to"] == 51_200
    step_scaling.plot(tmp_path / "a.png", rows, list(fits.values()), "a")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def row(name, seconds, peak):
    found = {"name": name, "seconds": seconds, "cpu": seconds, "product": 1e9}
    return found | {"peak": peak, "peak_with_compiling": peak}


def test_ratios_are_the_less_flattering():
    case = make_case()
    rows = [row(OURS, [1.0, 1.0, 2.0], 10), row(TORCH, [3.0, 6.0, 7.0], 40)]
    step_bench.complete(rows, case, {"platform": "cpu"}, [1e9])
    assert rows[0]["speed_ratio"] == 3.0 and rows[0]["memory_ratio"] == 0.25
    assert rows[0]["clips_per_s"] == 3.0 and rows[0]["tokens_per_s"] == 3 * case.tokens
    assert rows[0]["mfu"] == pytest.approx(step_bench.step_flops(case) / 1e9)
    assert "speed_ratio" not in rows[1]
    text = step_bench.bars_text(rows[0])
    assert "3.00 times PyTorch's speed, the bar is 3.5: MISSED" in text
    assert "0.25 of its peak memory, the bar is 0.33: holds" in text


def test_what_is_left_out_and_why(monkeypatch):
    said = []
    find = step_bench.importlib.util.find_spec
    monkeypatch.setattr(step_bench.importlib.util, "find_spec", lambda name: None)
    assert step_bench.contenders_for(make_case(), said.append) == [OURS]
    assert said.pop() == "PyTorch is not installed: ours alone."
    monkeypatch.setattr(step_bench.importlib.util, "find_spec", lambda name: find("sys"))
    monkeypatch.setattr(step_bench, "available_memory", lambda: 1000)
    if find("torch"):
        assert step_bench.contenders_for(make_case(), said.append) == [OURS]
        assert "PyTorch: not measured at 2x8x12/4, it keeps" in said.pop()
        monkeypatch.setattr(step_bench, "available_memory", lambda: None)
        assert step_bench.contenders_for(make_case(), said.append) == [OURS, TORCH]
    case = make_case()
    case.config.train.dtype = "bfloat16"
    assert step_bench.contenders_for(case, said.append) == [OURS]
    assert "computes in float32" in said.pop()


def test_a_contender_that_fails_says_why():
    pytest.importorskip("torch")
    with Contender(TORCH, make_case()) as contender, pytest.raises(Failed, match="Error: "):
        contender.ask("load")  # there are no weights
    with Contender(TORCH, make_case()) as contender:
        contender._process.kill()
        with pytest.raises(Failed, match="its process ended .killed, memory may have run out"):
            contender.ask("load")


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(step_bench.PRESETS, "tiny", {**TINY, "size": (8, 8), "dt_rank": 1})


@pytest.mark.slow
def test_the_command(tiny_preset, tmp_path, capsys):
    path = tmp_path / "step.json"
    words = ["bench", "step", "--buckets", "2x8", "--batch", "2", "--rounds", "2"]
    assert cli.main([*words, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "NOT THE SAME MODEL" not in out and "MFU: of the fastest float32 matrix" in out
    result = json.loads(path.read_text())
    names = [OURS, TORCH] if "torch" in result["machine"]["versions"] else [OURS]
    assert [(r["bucket"], r["name"]) for r in result["rows"]] == [("2x8x8/4", n) for n in names]
    for found in result["rows"]:
        assert len(found["seconds"]) == 2 and found["flops_per_s"] > 0 and found["mfu"] > 0
        if found["name"] == OURS:
            assert found["temporaries"] > 0 and found["compile_seconds"] > 0
            assert ("speed_ratio" in found) == (TORCH in names)
        if sys.platform == "linux":
            assert 0 < found["peak"] <= found["peak_with_compiling"]


def test_the_command_fits_the_growth(tiny_preset, tmp_path, monkeypatch, capsys):
    def measure(case, names, rounds, progress, say):
        assert names == [OURS] and case.batch == 1
        rows = [row(OURS, [1e-3 * case.tokens] * rounds, 10**6 * case.tokens)]
        return [rows[0] | {"loss": 1.0, "temporaries": 10**5, "compile_seconds": 1.0}]

    monkeypatch.setattr(step_bench, "measure", measure)
    path, picture = tmp_path / "step.json", tmp_path / "step.png"
    words = ["bench", "step", "--scaling", "--most-tokens", "400", "--rounds", "1"]
    assert cli.main([*words, "--json", str(path), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "time ~ tokens^1.000 over 2 points from 197 to 393 tokens (bar 1.05: holds)" in out
    result = json.loads(path.read_text())
    assert [r["tokens"] for r in result["rows"]] == [197, 393]
    assert [round(fit["exponent"], 3) for fit in result["exponents"]] == [1, 1, 1, 0]
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    "words, message",
    [
        ("--model huge", "unknown model 'huge'"),
        ("--buckets 8x8", "size 8x8 holds no patch of 16x16 pixels"),
        ("--dtype int8", "train.dtype is 'int8'"),
        ("--depth 0", "--depth is 0, takes at least 1"),
        ("--plot a.png", "--plot goes with --scaling"),
        ("--scaling --plot no/such/a.png", "there is no folder no/such"),
    ],
)
def test_bad_words_are_refused_in_one_sentence(words, message, capsys):
    try:
        assert cli.main(["bench", "step", *words.split()]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert message in capsys.readouterr().err
