"""A bundle as its user has it: manifest, configs, constants; and whether its parts are the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.manifest import MANIFEST_FILE, Manifest, resolve_inside
from fluxkiln.compile.executor import Net
from fluxkiln.compile.targets import Target
from fluxkiln.errors import CheckpointError, FluxkilnError, IntegrityError, ShapeError, UsageError
from fluxkiln.patches.model import Model
from fluxkiln.patches.sizes import as_alone, parts_at_sizes, parts_of_size
from fluxkiln.types import SIZE_MARK, Configs, Part, Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIGS = "configs.json"
HOST_CONSTANTS = "host/constants.safetensors"
# T5's position bias alone has 67 MB at 512 tokens
MOST_CONSTANTS = 256 << 20
_CONSTANT_DTYPES = ("F32", "I32")
# of any list of blocks, and far above what models have
MOST_BLOCKS = 10_000
# of the manifest's settings: the sizes besides its `shapes`
FURTHER_SIZES = "further_sizes"
MOST_SIZES = 64
# of the manifest's settings: see `Bundle.encoders`
ENCODERS = "encoders"
_AGAIN = "build or fetch the bundle again"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that can be run without its checkpoint.

    Attributes:
        digest: `sha256:<hex>` of its manifest, which covers all files.
        parts: the model's own, in the order they run; the manifest has an entry of each. Behind those of its first size
            stand those that others take besides.
        configs: each component's `config.json`, keyed by its folder name.
    """

    folder: Path
    manifest: Manifest
    digest: str
    target: Target
    model: Model
    parts: tuple[Part, ...]
    configs: Mapping[str, Mapping[str, Any]]

    @property
    def constants(self) -> dict[str, NDArray[Any]]:
        """What the host hands to the parts of its (first) size, by name; read each time that it is asked for.

        Raises: IntegrityError: what is no safetensors file of such numbers, or larger than any host's constants.
        """
        from fluxkiln.export.checkpoint import read_tensor
        from fluxkiln.export.safetensors_header import read_header

        where = self.folder / HOST_CONSTANTS
        try:
            refs = read_header(where)
            if (nbytes := sum(ref.nbytes for ref in refs.values())) > MOST_CONSTANTS:
                raise IntegrityError(f"{where} has {nbytes} bytes of numbers, {MOST_CONSTANTS} are the most; {_AGAIN}")
            if odd := [f"{name} is {ref.dtype}" for name, ref in refs.items() if ref.dtype not in _CONSTANT_DTYPES]:
                raise IntegrityError(f"{where}: {odd[0]}, constants are {', '.join(_CONSTANT_DTYPES)}; {_AGAIN}")
            own = {name: refs.get(f"{name}{SIZE_MARK}{self.shapes.label}", ref) for name, ref in refs.items()}
            return {name: read_tensor(ref) for name, ref in own.items() if SIZE_MARK not in name}
        except CheckpointError as error:
            raise IntegrityError(f"{where} is damaged ({error}); {_AGAIN}") from error

    @property
    def shapes(self) -> Shapes:
        """Its size; of several the first."""
        return self.manifest.shapes

    @property
    def sizes(self) -> tuple[Shapes, ...]:
        return (self.shapes, *further_sizes(self.manifest))

    def at(self, shapes: Shapes) -> Bundle:
        """The bundle as it would be for one of its sizes alone; whoever runs it needs to know of no others."""
        entries = {entry.name: entry for entry in self.manifest.parts}
        own = parts_of_size(self.parts, shapes)
        settings = {name: value for name, value in self.manifest.settings.items() if name != FURTHER_SIZES}
        parts = tuple(replace(entries[part.name], name=part.base) for part in own)
        manifest = replace(self.manifest, shapes=shapes, settings=settings, parts=parts)
        return replace(self, manifest=manifest, parts=tuple(map(as_alone, own)))

    @property
    def nets(self) -> dict[str, Net]:
        """Part -> its net."""
        return {
            entry.name: Net(
                entry.name, self.model.kinds[entry.kind], resolve_inside(self.folder, entry.file), entry.net,
                entry.inputs, entry.outputs, entry.size,
            )
            for entry in self.manifest.parts
        }  # fmt: skip

    @property
    def encoders(self) -> str:
        """A digest of the tensors that encode its prompts, whatever the target; empty where not all text encoders were
        built."""
        return str(self.manifest.settings.get(ENCODERS, ""))

    @property
    def takes_guidance(self) -> bool:
        return bool(self.configs["transformer"].get("guidance_embeds", False))


def further_facts(further: Sequence[Shapes]) -> dict[str, Any]:
    """What keys and the manifest's settings say of sizes besides the first, if there are any."""
    return {FURTHER_SIZES: [asdict(shapes) for shapes in further]} if further else {}


def further_sizes(manifest: Manifest) -> tuple[Shapes, ...]:
    """The sizes of a bundle besides its first; IntegrityError where its settings name none such."""
    listed: Any = manifest.settings.get(FURTHER_SIZES, [])
    try:
        if any(type(side) is not int for one in listed for side in one.values()):
            raise TypeError("a number that is not whole")
        found = tuple(Shapes(**one) for one in listed)
        if len({manifest.shapes, *found}) <= len(found) or len(found) > MOST_SIZES:
            raise ValueError(f"one of them twice, or more than {MOST_SIZES}")
    except (AttributeError, TypeError, ValueError, ShapeError) as error:
        raise IntegrityError(f"{manifest.name}: its {FURTHER_SIZES} are no sizes ({error}); {_AGAIN}") from error
    return found


def own_parts(manifest: Manifest, model: Model, configs: Configs) -> tuple[Part, ...]:
    """The parts that a model with these configs has in the form and at the sizes that a bundle says it is in.

    Raises: KeyError, TypeError, ValueError, UsageError, IntegrityError: configs or settings that are not the model's.
    """
    form = manifest.settings
    components, vae, granularity = form["components"], form["vae"], form.get("granularity")
    every = (
        model.list_split_parts(configs, str(granularity), vae)
        if granularity
        else model.list_parts(configs, vae, form["modulation"])
    )
    if not isinstance(components, list | tuple):
        raise TypeError("components that are no list")
    own = tuple(part for part in every if part.component in components)
    return parts_at_sizes(model, configs, own, (manifest.shapes, *further_sizes(manifest)))


def check_own_parts(manifest: Manifest, model: Model, configs: Configs, folder: Path) -> tuple[Part, ...]:
    """The model's own parts; IntegrityError unless a bundle's are these: all of them, in the order they run, each of
    its kind, with inputs of the shapes that follow from configs and sizes."""
    where = folder / MANIFEST_FILE
    try:
        for component, keys in model.whole_numbers.items():
            for key in keys if component in configs else ():
                if not 0 < int(configs[component][key]) <= MOST_BLOCKS:
                    raise ValueError(f"{key} {configs[component][key]} in its {component}")
        own = own_parts(manifest, model, configs)
        variant = model.variant(configs)
        shapes = {part.name: model.part_inputs(part.kind, configs, (*part.sizes, manifest.shapes)[0]) for part in own}
    except (FluxkilnError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"{where}: what it says does not go with {CONFIGS} ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    if manifest.variant != variant:
        raise IntegrityError(f"{where}: its variant is {manifest.variant!r}, by {CONFIGS} it is {variant!r}; {_AGAIN}")
    found = [f"{entry.name} ({entry.kind})" for entry in manifest.parts]
    wanted = [f"{part.name} ({part.kind})" for part in own]
    if found != wanted:
        places = range(max(len(found), len(wanted)))
        place = next(i for i in places if found[i : i + 1] != wanted[i : i + 1])
        here, there = (names[place] if place < len(names) else "nothing" for names in (found, wanted))
        raise IntegrityError(
            f"{where}: part {place + 1} is {here}, {model.title} with these configs has {there} there, of "
            f"{len(wanted)} in all; {_AGAIN}"
        )
    for part, entry in zip(own, manifest.parts, strict=True):
        specs = {spec.name: spec.shape for spec in shapes[part.name]}
        # what the host gives may be named beside them
        given = {s.name: s.shape for s in entry.inputs if s.name in specs or s.name not in model.constant_inputs}
        # a part of several blocks takes something of each of them along one axis
        fits = [_is_shape(shape, specs.get(name), len(part.members)) for name, shape in given.items()]
        if list(given) != list(specs) or not all(fits):
            raise IntegrityError(
                f"{where}: part {entry.name} takes {_shown(given)}, at this size it must be {_shown(specs)}; {_AGAIN}"
            )
    return own


def refuse_part(bundle: Bundle, part: str, fault: str) -> IntegrityError:
    """That what the manifest says of a part is not true of its file."""
    return IntegrityError(f"{bundle.folder}: part {part} {fault}; {_AGAIN}")


def require_pipeline(bundle: Bundle, encoded: bool = False) -> None:
    """Raise UsageError unless a bundle has all components of a pipeline; `encoded`: of one that is given embeddings."""
    built = {part.component for part in bundle.parts}
    needed = [name for name in bundle.model.components if not (encoded and name in bundle.model.tokenizers)]
    if missing := [component for component in needed if component not in built]:
        raise UsageError(
            f"{bundle.folder} has no {', '.join(missing)}: it was built with --components, and an image needs all of "
            f"{', '.join(needed)}; build the whole model"
        )


def _is_shape(found: tuple[int, ...], wanted: tuple[int, ...] | None, blocks: int) -> bool:
    if wanted is None or len(found) != len(wanted):
        return False
    differing = [here / there for here, there in zip(found, wanted, strict=True) if here != there]
    return not differing or (differing == [blocks] and blocks > 1)


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
