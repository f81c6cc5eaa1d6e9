"""Parts of several sizes: one for all sizes at which it takes the same inputs."""

from __future__ import annotations

from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.sizes import as_alone, parts_at_sizes, parts_of_size
from fluxkiln.types import Shapes

WIDE, HIGH = Shapes(height=32, width=64, tokens=16), Shapes(height=64, width=32, tokens=16)
# as many joint tokens as the others: a single block takes no more and no less
TRADED = Shapes(height=32, width=32, tokens=20)


def parts_of(checkpoint, *sizes):
    alone = list_parts(checkpoint.configs, "kl", "hoisted")
    return alone, parts_at_sizes(MODEL, checkpoint.configs, alone, sizes)


def test_one_size_is_as_it_was(tiny_checkpoint):
    alone, parts = parts_of(tiny_checkpoint(), WIDE)
    assert parts == alone
    assert parts_of_size(parts, WIDE) == alone


def test_a_turned_picture_has_a_decoder_of_its_own_and_nothing_else(tiny_checkpoint):
    alone, parts = parts_of(tiny_checkpoint(), WIDE, HIGH)
    assert [part.name for part in parts] == [*(part.name for part in alone), "vae_decoder@32x64-16"]
    assert parts[-1].sizes == (HIGH,)
    assert {part.sizes for part in parts[:-2]} == {(WIDE, HIGH)}


def test_every_size_has_all_parts_in_the_order_they_run(tiny_checkpoint):
    sizes = (WIDE, Shapes(height=48, width=48, tokens=24), TRADED, HIGH)
    alone, parts = parts_of(tiny_checkpoint(), *sizes)
    assert len({part.name for part in parts}) == len(parts)
    for shapes in sizes:
        own = parts_of_size(parts, shapes)
        assert tuple(map(as_alone, own)) == alone, shapes
        for part in own:
            wanted = MODEL.part_inputs(part.kind, tiny_checkpoint().configs, shapes)
            assert MODEL.part_inputs(part.kind, tiny_checkpoint().configs, part.sizes[0]) == wanted, part.name
    names = [part.name for part in parts_of_size(parts, TRADED)]
    assert "double.00@32x32-20" in names, names
    assert "single.00" in names, "it has as many joint tokens as at the first size"
    assert "time_embed" in names, "it takes no picture"
