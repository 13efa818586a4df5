"""Every key of a state dict is used, left out for a stated reason, or an error that names it."""

import pathlib

import jax
import numpy as np
import pytest

from stretchysnake_jax import torch_file
from stretchysnake_jax.config import ModelConfig
from stretchysnake_jax.convert import CheckpointError, from_state_dict, load_videomamba

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SIZE = (32, 48)  # of the golden: a grid of 2 x 3 patches
MICRO = ModelConfig(dim=48, depth=2, frames=3, size=SIZE, num_classes=7)


def micro_state() -> dict:
    """The flat state dict of the goldens."""
    return dict(torch_file.read(GOLDENS / "ckpt_layout_flat.pth"))


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def micro_params():
    return from_state_dict(micro_state(), size=SIZE)[1]


@pytest.mark.parametrize(
    "prefix", ["module.", "backbone.", "encoder.", "model.", "module.backbone.", "_orig_mod."]
)
def test_prefixes_are_stripped(prefix, micro_params):
    state = {prefix + key: array for key, array in micro_state().items()}
    config, params, report = from_state_dict(state, size=SIZE)
    assert config == MICRO and report.prefix == prefix
    assert_equal(params, micro_params)


def test_keys_without_the_prefix_count_too(micro_params):
    state = {
        key if key.startswith("head.") else "backbone." + key: array
        for key, array in micro_state().items()
    }
    assert_equal(from_state_dict(state, size=SIZE)[1], micro_params)
    with pytest.raises(CheckpointError, match=r"both norm_f\.weight and backbone\.norm_f"):
        from_state_dict({**state, "norm_f.weight": np.ones(48)}, size=SIZE)


def test_two_encoders_are_refused():
    state = micro_state()
    both = {f"{who}.{key}": array for who in ("student", "teacher") for key, array in state.items()}
    with pytest.raises(CheckpointError, match=r"several.*student\.cls_token.*teacher\.cls_token"):
        from_state_dict(both, size=SIZE)


def pretrained_state() -> dict:
    """A masked-pretraining student: no head, another name of the last norm, a decoder."""
    state = micro_state()
    del state["head.weight"], state["head.bias"]
    state["norm.weight"] = state.pop("norm_f.weight")
    state["clip_decoder.0.head.weight"] = np.ones((512, 48), np.float32)
    state["clip_decoder.0.norm.bias"] = np.ones(512, np.float32)
    return state


def test_masked_pretraining(micro_params):
    with pytest.raises(CheckpointError, match=r"head\.weight.*--num-classes"):
        from_state_dict(pretrained_state(), size=SIZE)
    config, params, report = from_state_dict(pretrained_state(), size=SIZE, num_classes=5)
    assert config.num_classes == 5
    np.testing.assert_array_equal(params["norm"]["scale"], micro_params["norm"]["scale"])
    assert params["head"]["kernel"].shape == (48, 5) and not params["head"]["kernel"].any()
    assert set(report.ignored) == {"clip_decoder.0.head.weight", "clip_decoder.0.norm.bias"}
    text = "\n".join(report.lines())
    assert "clip_decoder.0.norm.bias" in text and "norm.weight" in text and "zeros" in text


def test_multi_modal_file(micro_params):
    state = {f"vision_encoder.{key}": array for key, array in pretrained_state().items()}
    state["vision_encoder.pool_norm.weight"] = np.ones(48, np.float32)
    state["text_encoder.embeddings.weight"] = np.ones((9, 4), np.float32)
    _, params, report = from_state_dict(state, size=SIZE, num_classes=7)
    np.testing.assert_array_equal(params["cls_token"], micro_params["cls_token"])
    assert len(report.ignored) == 4 and "text_encoder.embeddings.weight" in report.ignored


def test_distillation_head_is_left_out_and_said(micro_params):
    state = {**micro_state(), "distill_head.0.weight": np.ones(48, np.float32)}
    _, params, report = from_state_dict(state, size=SIZE)
    assert "self-distillation" in report.ignored["distill_head.0.weight"]
    assert_equal(params, micro_params)


def test_another_number_of_classes_makes_a_new_head():
    config, params, report = from_state_dict(micro_state(), size=SIZE, num_classes=11)
    assert config.num_classes == 11 and not params["head"]["kernel"].any()
    assert set(report.ignored) == {"head.weight", "head.bias"}
    assert from_state_dict(micro_state(), size=SIZE, num_classes=7)[1]["head"]["kernel"].any()


@pytest.mark.parametrize("key", micro_state())
def test_a_missing_key_is_named(key):
    state = micro_state()
    del state[key]
    with pytest.raises(CheckpointError) as error:
        from_state_dict(state, size=SIZE)
    assert f"{key} is missing" in str(error.value) or f"{key} are missing" in str(error.value)


# A table of another length is a model of another size.
@pytest.mark.parametrize(
    "key", sorted(micro_state().keys() - {"pos_embed", "temporal_pos_embedding"})
)
def test_a_mis_shaped_key_is_named_alone(key):
    state = micro_state()
    state[key] = np.concatenate([state[key]] * 3)
    with pytest.raises(CheckpointError) as error:
        from_state_dict(state, size=SIZE)
    assert str(error.value).count(" is (") == 1
    assert f"{key} is {state[key].shape}, not" in str(error.value) or key.startswith("head.")


def test_all_problems_come_at_once():
    state = micro_state()
    del state["layers.0.mixer.D"], state["layers.1.norm.weight"]
    state["layers.1.mixer.D_b"] = np.ones(5, np.float32)
    state["head.bias"] = np.array(["a"] * 7)
    state["attention.weight"] = state["layers.7000000000.norm.weight"] = np.ones(3, np.float32)
    with pytest.raises(CheckpointError) as error:
        from_state_dict(state, size=SIZE)
    for text in (
        "layers.0.mixer.D is missing",
        "layers.1.norm.weight is missing",
        "layers.1.mixer.D_b is (5,), not (96,)",
        "head.bias is no tensor of real numbers",
        "attention.weight is unused",
        "layers.7000000000.norm.weight is unused",
    ):
        assert text in str(error.value)


def test_unknown_keys_can_be_allowed_and_are_listed():
    state = {**micro_state(), "attention.weight": np.ones(3, np.float32)}
    report = from_state_dict(state, size=SIZE, allow_unused=True)[2]
    assert report.ignored == {"attention.weight": "unknown"}


def test_a_table_that_is_not_square_is_guessed_aloud_or_given(caplog):
    path = GOLDENS / "video_micro_nonsquare_grads.pth"
    assert load_videomamba(path)[0].grid == (2, 3)
    assert "taken as a grid of 2x3" in caplog.text and "--size H,W" in caplog.text
    with pytest.raises(CheckpointError, match="--size 48,48 doesn't fit"):
        load_videomamba(path, size=(48, 48))
    assert load_videomamba(path, size=(48, 32))[0].grid == (3, 2)


@pytest.mark.parametrize("tree", [[1], {}, {"epoch": 3}, {"model": {"a.weight": np.ones(2)}}])
def test_what_is_no_videomamba_is_said(tree, monkeypatch):
    monkeypatch.setattr(torch_file, "read", lambda path: tree)
    with pytest.raises(CheckpointError, match=r"x\.pth can't be converted: it holds"):
        load_videomamba("x.pth")
