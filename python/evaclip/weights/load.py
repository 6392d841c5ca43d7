"""Reading weights into a model: all of them, or none and a list of what does not fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from evaclip.models.clip import CLIP
from evaclip.models.parts import part_of
from evaclip.weights import dialects
from evaclip.weights.dialects import Pieces
from evaclip.weights.files import locate, open_weights, some
from evaclip.weights.lazy import Lazy, full
from evaclip.weights.resize import Resize, resized_to

Part = Literal["visual", "text"]
HEAD = ("visual.head",)


@dataclass(frozen=True)
class LoadReport:
    """What was read. Keys are native ones, but those of `ignored` and `unused` that only the file knows."""

    path: Path
    dialect: str  # one of `evaclip.weights.dialects.NAMES`
    tensors: int  # of the model, read
    parameters: int  # the elements of these
    dtypes: tuple[str, ...]  # of the tensors in the file; the model keeps its own
    ignored: tuple[str, ...] = ()  # keys of rotary tables, which the model computes
    unused: tuple[str, ...] = ()  # what the file holds and the model, or the part asked for, does not
    kept: tuple[str, ...] = ()  # what the model kept as it was
    initialised: tuple[str, ...] = ()  # what the file lacks, set to what its dialect implies
    resized: tuple[str, ...] = ()  # "key (shape) to (shape)", interpolated

    def __str__(self) -> str:
        ignored = f"; {len(self.ignored)} rotary tables ignored" if self.ignored else ""
        lists = {
            "not used": self.unused,
            "kept as it was": self.kept,
            "initialised": self.initialised,
            "interpolated": self.resized,
        }
        words = "".join(f"; {what}: {some(names)}" for what, names in lists.items() if names)
        return (
            f"{self.path}: {self.dialect}, {self.tensors} tensors of {', '.join(self.dtypes)}, {self.parameters:,}"
            f" parameters{ignored}{words}"
        )


def load_checkpoint(
    model: CLIP,
    path: str | Path,
    *,
    part: Part | None = None,
    resize: Resize | None = None,
    skip: Sequence[str] = (),
) -> LoadReport:
    """Read weights of any dialect into a model; strict, and nothing is changed unless everything fits.

    Args:
        model: from `create_model`, on a real device. Tensors are converted to the dtype of its parameters, which may be
            sharded over processes by `fully_shard`: then all must call.
        path: a file or folder as of docs/weights.md, or a name of the Hugging Face hub (`owner/name`,
            `hf-hub:owner/name/file`). The dialect is found out from the keys; rotary tables are ignored, since the
            model computes them.
        part: "visual" or "text" reads that tower alone, out of a whole model's file or one of its own; the rest of the
            model is unchanged.
        resize: "eva" or "timm" interpolates positions of another grid and patch kernels of another size, as EVA's code
            does (bicubic) or as timm's (with antialiasing); None refuses them.
        skip: native keys, or the modules they begin with, that keep their values: ("visual.head",).

    Returns:
        what was read, and what was not.

    Raises:
        FileNotFoundError: there is nothing at that path, nor on the hub.
        ValueError: the file cannot be read, is of no known dialect, or a key is missing, unexpected or of another
            shape: all of them are listed.
    """
    target = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError(f"a model on the meta device cannot hold {path}; call model.to_empty(device=...) first")
    fit = fitted(path, model, part=part, resize=resize, skip=skip)
    with torch.no_grad():
        for key, tensor in fit.tensors.items():
            target[key].copy_(part_of(tensor.read(), target[key]))
    return fit.report


@dataclass(frozen=True)
class Fit:
    """Weights that fit a model: native keys with tensors of the model's shapes, not read yet."""

    tensors: dict[str, Lazy]
    report: LoadReport


def fitted(
    path: str | Path,
    model: CLIP,
    *,
    part: Part | None = None,
    resize: Resize | None = None,
    skip: Sequence[str] = (),
) -> Fit:
    """The weights at a path for a model, which may be on the meta device; arguments and errors as `load_checkpoint`."""
    check_option("part", part, *get_args(Part), None)
    check_option("resize", resize, *get_args(Resize), None)
    strangers = [name for name in skip if not any(_begins(key, (name,)) for key in model.state_dict())]
    if strangers:
        raise ValueError(f"skip names {some(strangers)}, which the model does not have; give a sequence of its keys")
    path = locate(path)
    pieces = read_pieces(path, part)
    _check_towers(path, pieces, part)
    pieces = dialects.of_part(pieces, part)
    wanted = {k: tuple(x.shape) for k, x in model.state_dict().items() if part is None or k.startswith(part + ".")}
    if pieces.dialect == "mim" and not any(_begins(piece, HEAD) for piece in pieces.tensors):
        skip = (*skip, *HEAD)
    kept = [key for key in wanted if _begins(key, skip)]
    aside = [piece for piece in pieces.tensors if _begins(piece, skip)]
    initialised = {key: x for key, x in _defaults(pieces, wanted).items() if key not in kept}
    tensors, used, resized, misfits = dict(initialised), set(aside), [], []
    for key, shape in wanted.items():
        if key in kept or key in initialised:
            continue
        rule = dialects.native_rule(key)
        used |= set(rule.pieces)
        if not all(piece in pieces.tensors for piece in rule.pieces):
            misfits.append(f"missing: {key} {shape}")
            continue
        tensor = was = dialects.assemble(rule, pieces.tensors)
        if was.shape != shape:
            other = resized_to(shape, key, was, model.visual.grid, resize or "eva")
            if other is None or resize is None:
                hint = "" if other is None else "; resize='eva' or 'timm' interpolates it"
                misfits.append(f"reshaped: {key} is {was.shape}, the model's {shape}{hint}")
                continue
            tensor = other
            resized.append(f"{key} {was.shape} to {shape}")
        tensors[key] = tensor
    unexpected = {piece: x for piece, x in pieces.tensors.items() if piece not in used} | pieces.unknown
    misfits += [f"unexpected: {key} {x.shape}" for key, x in unexpected.items()]
    if misfits:
        raise ValueError(
            f"{path} ({pieces.dialect}) does not fit the model, which is unchanged:\n  " + "\n  ".join(misfits)
        )
    report = LoadReport(
        path,
        pieces.dialect,
        tensors=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in pieces.tensors.values()})),
        ignored=pieces.rotary,
        unused=(*pieces.unused, *aside),
        kept=tuple(kept),
        initialised=(*initialised, *pieces.computed),
        resized=tuple(resized),
    )
    return Fit({key: tensors[key] for key in wanted if key in tensors}, report)


def read_pieces(path: Path, part: Part | None = None) -> Pieces:
    """What lies at a local path, by piece, as of `dialects.read`.

    Raises:
        ValueError: the file cannot be read, or is of no known dialect.
    """
    tensors = open_weights(path)
    try:
        return dialects.read(tensors, part)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_option(name: str, value: str | None, *allowed: str | None) -> None:
    """Refuse a value that is none of those allowed."""
    if value not in allowed:
        *most, last = map(repr, allowed)
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(most)} or {last}")


def _check_towers(path: Path, pieces: Pieces, part: Part | None) -> None:
    held = {piece.partition(".")[0] for piece in pieces.tensors}
    for tower, kind in (("visual", "image tower"), ("text", "text tower")):
        if part in (None, tower) and tower not in held:
            other = "text" if tower == "visual" else "visual"
            hint = f"; part={other!r} reads the other one alone" if part is None and other in held else ""
            raise ValueError(f"{path} ({pieces.dialect}) holds no {kind} of EVA-CLIP's kind{hint}")


def _begins(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _defaults(pieces: Pieces, wanted: dict[str, tuple[int, ...]]) -> dict[str, Lazy]:
    """What a tower starts with that its source does not have."""
    # EVA-02's masked image models have no inner norm; CLIP training adds it, and starts it at the identity.
    if pieces.dialect not in ("mim", "timm") or any(".inner_attn_ln." in piece for piece in pieces.tensors):
        return {}
    return {k: full(s, float(k.endswith(".weight"))) for k, s in wanted.items() if ".inner_attn_ln." in k}
