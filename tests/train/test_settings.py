"""Settings that cannot be are refused with a sentence, and so is a run that would go on with others."""

import pytest

from fluxkiln.errors import UsageError
from fluxkiln.train.settings import LoraSettings, check_same


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lora_rank": 0}, "--lora-rank 0: it must be at least 1"),
        ({"iterations": 0}, "--iterations 0: it must be at least 1"),
        ({"iterations": 10}, "--iterations 10 is no multiple of --grad-accumulate 4.* give 8 or 12"),
        ({"iterations": 2}, "give 4 or 4"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: it must be a number above 0"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
        ({"lora_blocks": 0}, "--lora-blocks 0: give how many of the last blocks, or -1"),
        ({"weighting_scheme": "best"}, "'best' is not known; there are none, logit_normal"),
        ({"guidance": float("inf")}, "--guidance inf"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        LoraSettings(**wrong)


def test_processes_and_accumulation_count_together():
    one = LoraSettings(iterations=16, grad_accumulate=4)
    two = LoraSettings(iterations=8, grad_accumulate=2, checkpoint_every=1)
    assert one.fixed(1) == two.fixed(2) != two.fixed(1)


def test_a_run_that_differs_is_refused():
    before = LoraSettings().fixed(1) | {"resolution": [512, 512]}
    check_same(before, dict(before), "lora")
    with pytest.raises(UsageError, match=r"lora was begun with lora rank 8, now it is 4; .*another --output-dir"):
        check_same(before, {**before, "lora_rank": 4}, "lora")
    with pytest.raises(UsageError, match="resolution 512x512, now it is 64x64"):
        check_same(before, {**before, "resolution": [64, 64]}, "lora")
