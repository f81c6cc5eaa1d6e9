"""Images from a bundle: the same as diffusers' own, in stages that stop when asked, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fluxkiln.errors import CompileError, ShapeError, UsageError
from fluxkiln.generate.painter import Painter, Request, check_request, default_steps, paint
from fluxkiln.types import Shapes
from tests.eager import SHAPES, make_bundle, open_eager


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    return {
        "dev": make_bundle(tiny_checkpoint("tiny-dev"), tmp_path_factory.mktemp("dev")),
        "schnell": make_bundle(tiny_checkpoint("tiny-schnell"), tmp_path_factory.mktemp("schnell"), "inline"),
    }


@pytest.fixture
def painter(tiny_checkpoint, folders):
    opened = []

    def make(variant="dev"):
        painter = Painter(*open_eager(tiny_checkpoint(f"tiny-{variant}"), folders[variant]))
        opened.append(painter)
        return painter

    yield make
    for one in opened:
        one.close()


def test_the_image_is_the_reference(painter, tiny_recording):
    reference = tiny_recording("tiny-dev", "kl", SHAPES)
    made = painter()
    wanted = Request(reference.prompt, reference.seed, steps=reference.steps, guidance=reference.guidance_scale)
    (picture,) = paint(made, [wanted])
    np.testing.assert_allclose(picture.latents, reference.latents, rtol=0, atol=2e-5)
    assert picture.image.dtype == np.uint8
    assert picture.image.shape == (SHAPES.height, SHAPES.width, 3)
    assert np.abs(picture.image.astype(int) - (reference.image * 255).round()).max() <= 1
    # and the comparison can fail
    (other,) = paint(made, [Request(reference.prompt, reference.seed + 1, steps=reference.steps)])
    assert np.abs(other.latents - reference.latents).max() > 0.1


def test_stages_alone(painter):
    made = painter()
    encoded = made.encode("a kiln")
    assert encoded.embeds["prompt_embeds"].shape[:2] == (1, SHAPES.tokens)
    assert encoded.notes == ()
    steps = list(made.denoise(encoded, steps=3, seed=5))
    assert [(step.index, step.steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(np.abs(a.latents - b.latents).max() > 0 for a, b in pairwise(steps))
    assert made.decode(steps[-1].latents).std() > 0
    # from given noise: what the seed gives is not used
    noise = np.random.default_rng(0).standard_normal(steps[0].latents.shape).astype(np.float32)
    first, second = (list(made.denoise(encoded, steps=1, seed=seed, latents=noise)) for seed in (1, 2))
    np.testing.assert_array_equal(first[0].latents, second[0].latents)


def test_a_second_prompt_is_t5s(painter):
    made = painter()
    both, own = made.encode("a kiln"), made.encode("a kiln", "a river")
    np.testing.assert_array_equal(both.embeds["pooled_prompt_embeds"], own.embeds["pooled_prompt_embeds"])
    assert np.abs(both.embeds["prompt_embeds"] - own.embeds["prompt_embeds"]).max() > 1e-3


def test_steps_run_when_asked_for_and_stop(painter):
    made = painter()
    steps = made.denoise(made.encode("x"), steps=4)
    made.executor.order.clear()
    assert made.executor.order == []
    next(steps)
    assert made.executor.order.count("tail") == 1
    steps.close()
    assert made.executor.order.count("tail") == 1


def test_a_callback_may_change_the_latents(painter):
    made = painter()
    encoded = made.encode("x")
    plain = list(made.denoise(encoded, steps=2))
    zeroed = list(
        made.denoise(encoded, steps=2, on_step=lambda step: np.zeros_like(step.latents) if step.index == 1 else None)
    )
    np.testing.assert_array_equal(plain[0].latents, zeroed[0].latents)
    assert np.abs(plain[1].latents - zeroed[1].latents).max() > 0.1


def test_images_of_the_same_settings_share_their_modulation(painter):
    made = painter()
    encoded, other = made.encode("a kiln"), made.encode("a river")
    hoisted = [part.name for part in made.bundle.parts if "modulation" in part.name or part.name == "time_embed"]
    assert len(hoisted) > 2

    def paint_one(encoded, **settings):
        """Final latents, and what of the modulation was run for them."""
        made.executor.order.clear()
        *_, last = made.denoise(encoded, steps=2, **settings)
        assert [f"drop {part}" in made.executor.order for part in hoisted] == [True] * len(hoisted)
        return last.latents, [part for part in made.executor.order if part in hoisted]

    first, ran = paint_one(encoded, seed=1)
    assert sorted(ran) == sorted(hoisted)
    again, ran = paint_one(encoded, seed=1)
    assert ran == []
    np.testing.assert_array_equal(first, again)
    assert paint_one(encoded, seed=2)[1] == []
    # what it is made from: guidance, prompt
    assert sorted(paint_one(encoded, seed=1, guidance=7.0)[1]) == sorted(hoisted)
    assert sorted(paint_one(other, seed=1)[1]) == sorted(hoisted)
    back, _ = paint_one(encoded, seed=1)
    np.testing.assert_array_equal(first, back)


def test_errors_of_a_part_come_out_of_the_loop(painter, monkeypatch):
    made = painter()
    encoded = made.encode("x")
    runner = made.executor.runner

    def fail(part, inputs):
        if part == "single.01":
            raise CompileError("the device is gone")
        return runner(part, inputs)

    monkeypatch.setattr(made.executor, "runner", fail)
    with pytest.raises(CompileError, match="the device is gone"):
        list(made.denoise(encoded, steps=2))


def test_text_encoders_are_released_before_the_transformer_is_loaded(painter):
    made = painter()
    pictures = list(paint(made, [Request("one", steps=1), Request("one", 1, steps=1), Request("two", steps=1)]))
    assert len(pictures) == 3
    order = made.executor.order
    assert order.count("clip") == 2  # a prompt is encoded once, whatever its seeds
    loaded = order.index("load transformer")
    assert {"release text_encoder", "release text_encoder_2"} <= set(order[:loaded])
    assert "clip" not in order[loaded:]
    assert order.index("release transformer") < order.index("vae_decoder")


def test_modulation_is_dropped_once_it_has_run(painter):
    made = painter()
    steps = made.denoise(made.encode("x"), steps=2)
    next(steps)
    order = made.executor.order
    dropped = [entry.removeprefix("drop ") for entry in order if entry.startswith("drop ")]
    once = [part.name for part in made.bundle.parts if "modulation" in part.name or part.name == "time_embed"]
    assert sorted(dropped) == sorted(once)
    assert order.index("drop double_modulation.00") == order.index("double_modulation.00") + 1
    assert len(list(steps)) == 1


def test_a_long_prompt_is_cut_and_said_so(painter):
    from transformers import T5TokenizerFast

    made = painter()
    encoded = made.encode("kiln", "river " * 60)
    (note,) = encoded.notes
    ids = T5TokenizerFast.from_pretrained(made.bundle.folder / "tokenizer_2")("river " * 60).input_ids
    assert f"T5 takes {SHAPES.tokens} tokens and the prompt has {len(ids)}" in note
    assert f"the last {len(ids) - SHAPES.tokens} were cut" in note
    assert len(made.encode("kiln " * 90).notes) == 2
    # what is cut has no say
    np.testing.assert_array_equal(
        made.encode("kiln", "river " * 60 + "stone").embeds["prompt_embeds"], encoded.embeds["prompt_embeds"]
    )


@pytest.mark.parametrize(
    ("variant", "request_", "error", "words"),
    [
        ("dev", Request("x", size=(128, 64)), ShapeError, ("size 128x64", "compiled for 64x64", "--size 128x64")),
        ("dev", Request("x", size=(100, 64)), ShapeError, ("100", "multiple of 16")),
        ("dev", Request("x", tokens=512), ShapeError, ("512 text tokens", "32 text tokens", "--tokens 512")),
        ("dev", Request("x", steps=65), UsageError, ("65 steps", "64")),
        ("dev", Request("x", steps=0), UsageError, ("0 steps", "at least 1", "28")),
        ("dev", Request("x", guidance=-1.0), UsageError, ("guidance -1", "0 to 100")),
        ("dev", Request("x", seed=-1), UsageError, ("seed -1",)),
        ("schnell", Request("x", guidance=3.5), UsageError, ("guidance 3.5", "schnell", "leave it out")),
    ],
)
def test_what_is_refused(painter, variant, request_, error, words):
    made = painter(variant)
    with pytest.raises(error) as caught:
        check_request(made.bundle, request_)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(error):
        list(paint(made, [Request("y", steps=1), request_]))
    assert made.executor.order == []  # nothing ran first


def test_defaults_of_the_models(painter):
    assert default_steps(painter("dev").bundle) == 28
    made = painter("schnell")
    assert default_steps(made.bundle) == 4
    assert len(list(made.denoise(made.encode("x")))) == 4


def test_constants_of_another_size_are_refused(painter):
    from dataclasses import replace

    bundle = painter().bundle
    other = replace(bundle, manifest=replace(bundle.manifest, shapes=Shapes(128, 64, 32)))
    with pytest.raises(ShapeError, match="rotary_cos"):
        Painter(other, painter().executor)


def test_schnell_is_the_reference(painter, tiny_recording):
    reference = tiny_recording("tiny-schnell", "kl", SHAPES)
    (picture,) = paint(painter("schnell"), [Request(reference.prompt, reference.seed, steps=reference.steps)])
    np.testing.assert_allclose(picture.latents, reference.latents, rtol=0, atol=2e-5)
