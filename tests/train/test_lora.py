"""A training: its files fit where they are for, it goes on exactly, and what cannot be is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fluxkiln.errors import ResourceError, ToolchainError, TrainingError, UsageError
from fluxkiln.export.lora_file import read_lora
from fluxkiln.progress import Silent
from fluxkiln.train.adapters import DIFFUSERS_FILE
from fluxkiln.train.state import STATE, TrainingState, keep_state, load_state, save_state


class StopsAt(Silent):
    """Ends a run in the middle, after so many steps of the optimizer."""

    def __init__(self, after):
        self.left = after

    def done(self, stage, what, how):
        if stage == "train":
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


def test_the_loss_is_finite_and_the_files_are_there(trained):
    assert len(trained.losses) == 2
    assert np.isfinite(trained.losses).all()
    assert {what: path.name for what, path in trained.files.items()} == {
        "adapters": "adapters.safetensors", "mlx": "mlx_adapters.safetensors", "page": "training.html",
    }  # fmt: skip
    page = trained.files["page"].read_text()
    assert page.count("data:image/png") == 2
    assert "4 of 4 iterations" in page
    assert "a photo of sks kiln" in page


def product(piece):
    return torch.from_numpy(piece.delta.rows(piece.rows))


def test_diffusers_loads_the_adapters(trained, tiny_checkpoint):
    """And adds to its weights what `--lora` here adds."""
    from diffusers import FluxPipeline

    checkpoint = tiny_checkpoint()
    pipe = FluxPipeline.from_pretrained(checkpoint.root)
    before = {name: one.detach().clone() for name, one in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(trained.files["adapters"]))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    pieces = read_lora(trained.files["adapters"], checkpoint).pieces
    assert {piece.tensor for piece in pieces} == {name for name in before if not torch.equal(before[name], after[name])}
    for piece in pieces:
        torch.testing.assert_close(
            after[piece.tensor] - before[piece.tensor], piece.scale * product(piece), rtol=1e-3, atol=1e-6
        )


def test_the_mlx_layout_adds_the_same(trained, tiny_checkpoint):
    ours = {one.tensor: one for one in read_lora(trained.files["adapters"], tiny_checkpoint()).pieces}
    theirs = load_file(trained.files["mlx"])
    made = {name[: -len(".lora_a")]: (theirs[name] @ theirs[name[:-1] + "b"]).T for name in theirs if name[-1] == "a"}
    joined = {
        "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.to_{one}" for one in "qkv"],
        "double_blocks.0.txt_mlp.layers.2": ["transformer_blocks.0.ff_context.net.2"],
        "single_blocks.2.linear1": [
            f"single_transformer_blocks.2.{one}" for one in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ],
    }
    assert len(made) == 2 * 10 + 3 * 3
    for name, layers in joined.items():
        expected = torch.cat([product(ours[f"{layer}.weight"]) for layer in layers])
        torch.testing.assert_close(made[name], expected)


def test_a_stopped_run_goes_on_exactly(trained, train, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, StopsAt(2))  # the first step is on disk, the second is not
    state = load_state(tmp_path)
    assert state is not None
    assert state.update == 1
    result = train(tmp_path)
    assert result.resumed == 1
    assert result.losses == trained.losses
    assert (tmp_path / DIFFUSERS_FILE).read_bytes() == trained.files["adapters"].read_bytes()
    with pytest.raises(UsageError, match="was begun with lora rank 2, now it is 4"):
        train(tmp_path, lora_rank=4)


def test_a_learning_rate_that_is_too_high_stops_and_keeps_the_last_good_state(train, tmp_path):
    """The state of iteration 2 is finite, but gives no loss: it is not good, and none was before it."""
    with pytest.raises(TrainingError, match=r"iteration 4: the loss is nan .* last good state was before the first"):
        train(tmp_path, learning_rate=1e30, iterations=8)
    assert load_state(tmp_path) is None
    assert not (tmp_path / DIFFUSERS_FILE).exists()


def test_of_two_states_the_good_one_is_kept(tmp_path):
    for update in (1, 2):
        save_state(tmp_path, TrainingState({}, update), {"a": torch.zeros(1)})
    keep_state(tmp_path, good=False)
    assert load_state(tmp_path) == TrainingState({}, 1)
    save_state(tmp_path, TrainingState({}, 2), {"a": torch.zeros(1)})
    keep_state(tmp_path, good=True)
    assert [path.name for path in (tmp_path / STATE).iterdir()] == ["0000002"]


def test_codes_train_as_well(train, tmp_path):
    result = train(tmp_path, base="W4BF16-g32", iterations=2, gradient_checkpointing=True)
    assert np.isfinite(result.losses).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": 10_000}, r"--lora-rank 10000 is above the width of .*, \d+; .*give 4 to 64"),
        ({"lora_blocks": 6}, "--lora-blocks 6: the transformer of tiny-dev has 5; -1 is all"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(train, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        train(tmp_path, **changes)


def test_one_training_writes_to_a_folder(train, tmp_path):
    from fluxkiln.files import build_lock

    with build_lock(tmp_path / ".lock", "another"), pytest.raises(ResourceError, match="is being built by"):
        train(tmp_path)


def test_without_peft_a_sentence_says_so(train, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match="needs peft, which is not installed: pip install 'fluxkiln"):
        train(tmp_path)
