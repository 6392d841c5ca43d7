"""The names that EVA-CLIP's weights have in other codebases, as tables that are read in both directions.

Between the dialects stand *pieces*, the finest parts that any of them tells apart, named as native keys are: q, k and
v of each attention, w1 and w2 of SwiGLU. A rule says which key of a dialect holds which pieces.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from evaclip.weights.lazy import Lazy, full, join, split

NAMES = {
    "native": "EVA's own",
    "mim": "an image tower alone, as of masked image models",
    "timm": "timm's image tower alone",
    "open_clip": "open_clip's",
    "hf": "Hugging Face remote code, or a CLIP text tower of transformers",
    "clip": "OpenAI's and open_clip's CLIP, of which the text tower serves",
}
HF_LOGIT_SCALE = math.log(100)  # of EVA-CLIP-8B and 18B, whose Hugging Face files do not store their constant scale
TAILS = ("", ".weight", ".bias")


class Rule(NamedTuple):
    """What a key holds; `*` stands for the number of a block, and `.weight` or `.bias` may follow."""

    key: str
    pieces: tuple[str, ...]  # one after the other along the first axis
    leading: int = 0  # axes of length 1 that the piece has before those of the key
    transposed: bool = False


class Layout(NamedTuple):
    """What the same names do not tell: how q, k, v and the MLP are stored."""

    fused: bool  # q, k and v of the image tower in one weight
    mlp: str  # "gelu", "swiglu", or "packed": w1 and w2 of SwiGLU in one weight


@dataclass(frozen=True)
class Pieces:
    """Weights by piece, and what else the file holds."""

    dialect: str
    layout: Layout
    tensors: dict[str, Lazy]
    rotary: tuple[str, ...] = ()  # keys of rotary tables, which models compute
    unused: tuple[str, ...] = ()  # keys of what no CLIP has
    computed: tuple[str, ...] = ()  # pieces that the dialect leaves out because it knows them
    unknown: dict[str, Lazy] = field(default_factory=dict)  # what no rule names, by key


# Pieces of the image tower outside its blocks; native and timm's name is the same. Hugging Face's.
_OUTER = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
# Pieces of a block; the native name is the same. timm's name, and Hugging Face's where there is one.
_BLOCK: dict[str, tuple[str, str | None]] = {
    "norm1": ("norm1", "layer_norm1"),
    "norm2": ("norm2", "layer_norm2"),
    "gamma_1": ("gamma_1", None),
    "gamma_2": ("gamma_2", None),
    "attn.inner_attn_ln": ("attn.norm", "self_attn.inner_attn_ln"),
    "attn.proj": ("attn.proj", "self_attn.out_proj"),
    "mlp.ffn_ln": ("mlp.norm", "mlp.ffn_ln"),
}
_MLP: dict[str, dict[str, tuple[str, str | None]]] = {
    "gelu": {"mlp.fc1": ("mlp.fc1", "mlp.fc1"), "mlp.fc2": ("mlp.fc2", "mlp.fc2")},
    "swiglu": {
        "mlp.w1": ("mlp.fc1_g", "mlp.fc1"),
        "mlp.w2": ("mlp.fc1_x", "mlp.fc2"),
        "mlp.w3": ("mlp.fc2", "mlp.fc3"),
    },
    "packed": {"mlp.w3": ("mlp.fc2", None)},  # and w1 with w2
}
_LAYER, _RESBLOCK = "encoder.layers.*.", "transformer.resblocks.*."
# Pieces of the text tower, and Hugging Face's names.
_TEXT = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    _RESBLOCK + "ln_1": _LAYER + "layer_norm1",
    _RESBLOCK + "ln_2": _LAYER + "layer_norm2",
    _RESBLOCK + "attn.out_proj": _LAYER + "self_attn.out_proj",
    _RESBLOCK + "mlp.c_fc": _LAYER + "mlp.fc1",
    _RESBLOCK + "mlp.c_proj": _LAYER + "mlp.fc2",
    "ln_final": "final_layer_norm",
}


def rules(dialect: str, layout: Layout) -> list[Rule]:
    """The table of a dialect; where two rules serve a piece, the first writes it."""
    scale = Rule("logit_scale", ("logit_scale",))
    if dialect == "hf":
        return [*_hf_rules(layout), scale]
    prefix = {"native": "visual.", "open_clip": "visual.trunk."}.get(dialect, "")
    image = _image_rules(prefix, layout, timm=dialect in ("timm", "open_clip"))
    return image if dialect in ("mim", "timm") else [*image, *_text_rules("text."), *_text_rules(""), scale]


def _image_rules(prefix: str, layout: Layout, timm: bool) -> list[Rule]:
    block, piece = prefix + "blocks.*.", "visual.blocks.*."
    found = [Rule(prefix + name, ("visual." + name,)) for name in (*_OUTER, "head")]
    found.append(Rule(prefix + "fc_norm", ("visual.norm",)))  # timm's, in a tower that averages its tokens
    for name, (timms, _) in (_BLOCK | _MLP[layout.mlp]).items():
        found.append(Rule(block + (timms if timm else name), (piece + name,)))
    if layout.mlp == "packed":
        found.append(Rule(block + ("mlp.fc1" if timm else "mlp.w12"), (piece + "mlp.w1", piece + "mlp.w2")))
    beside = [Rule(f"{block}attn.{x}_bias", (f"{piece}attn.{x}.bias",)) for x in "qv"]
    if layout.fused:
        return [*found, *beside, Rule(block + "attn.qkv", tuple(f"{piece}attn.{x}" for x in "qkv"))]
    # timm's three projections have their own biases; EVA's have biases beside them.
    own = [Rule(f"{block}attn.{x}_proj", (f"{piece}attn.{x}",)) for x in "qkv"]
    return [*found, *own, *beside] if timm else [*found, *beside, *own]


def _text_rules(prefix: str) -> list[Rule]:
    found = [Rule(prefix + name, ("text." + name,)) for name in (*_TEXT, "text_projection")]
    for kind in ("weight", "bias"):
        pieces = tuple(f"text.{_RESBLOCK}attn.{x}.{kind}" for x in "qkv")
        found.append(Rule(f"{prefix}{_RESBLOCK}attn.in_proj_{kind}", pieces))
    return found


def _hf_rules(layout: Layout) -> list[Rule]:
    leading = {"cls_token": 2, "pos_embed": 1}
    found = [Rule("vision_model." + hf, ("visual." + name,), leading.get(name, 0)) for name, hf in _OUTER.items()]
    for name, (_, hf) in (_BLOCK | _MLP[layout.mlp]).items():
        if hf is not None:
            found.append(Rule(f"vision_model.{_LAYER}{hf}", ("visual.blocks.*." + name,)))
    found += [Rule("text_model." + hf, ("text." + name,)) for name, hf in _TEXT.items()]
    for tower, block in (("vision_model.", "visual.blocks.*."), ("text_model.", "text." + _RESBLOCK)):
        found += [Rule(f"{tower}{_LAYER}self_attn.{x}_proj", (f"{block}attn.{x}",)) for x in "qkv"]
    projection = Rule("text_projection.weight", ("text.text_projection",), transposed=True)
    return [*found, Rule("visual_projection", ("visual.head",)), projection]


def _generic(key: str) -> tuple[str, str]:
    """A key with `*` for the number of its block, and the number."""
    number = re.search(r"\.(\d+)\.", key)
    return (key, "") if number is None else (key[: number.start()] + ".*." + key[number.end() :], number[1])


class Table:
    """Rules looked up by key or by piece."""

    def __init__(self, rules: Iterable[Rule]):
        self.by_key: dict[str, Rule] = {}
        self.by_piece: dict[str, Rule] = {}
        for rule in rules:
            for tail in TAILS:
                whole = rule._replace(key=rule.key + tail, pieces=tuple(piece + tail for piece in rule.pieces))
                self.by_key.setdefault(whole.key, whole)
                for piece in whole.pieces:
                    self.by_piece.setdefault(piece, whole)

    def of_key(self, key: str) -> Rule | None:
        """What a key holds."""
        return self._numbered(self.by_key, key)

    def of_piece(self, piece: str) -> Rule | None:
        """The key that holds a piece, with all that it holds."""
        return self._numbered(self.by_piece, piece)

    @staticmethod
    def _numbered(rules: dict[str, Rule], name: str) -> Rule | None:
        generic, number = _generic(name)
        rule = rules.get(generic)
        if rule is None:
            return None
        pieces = tuple(piece.replace("*", number) for piece in rule.pieces)
        return rule._replace(key=rule.key.replace("*", number), pieces=pieces)


def read(tensors: dict[str, Lazy], part: str | None = None) -> Pieces:
    """The pieces of a file's tensors, whose dialect is found out from their keys.

    Args:
        tensors: of all towers that the file has.
        part: the tower that is wanted; of another's pieces the values do not matter.

    Raises:
        ValueError: no dialect has such keys, or keys of Hugging Face's hold a bias of k that is not zero.
    """
    dialect = detect(tensors)
    layout = _layout(dialect, tensors)
    table = Table(rules("native" if dialect == "clip" else dialect, layout))
    found: dict[str, Lazy] = {}
    rotary, unused, unknown = [], [], {}
    for key, tensor in tensors.items():
        rule = table.of_key(key)
        if is_rotary(key):
            rotary.append(key)
        elif rule is None and _is_unused(key):
            unused.append(key)
        elif rule is None or found.keys() & set(rule.pieces):  # of no rule, or there already by another name
            unknown[key] = tensor
        elif _is_bias_of_k(rule.pieces):
            if part != "text" and tensor.read().count_nonzero():
                raise ValueError(f"{key} is not zero; EVA's image towers have no bias of k, so it has no place in them")
            unused.append(key)
        else:
            found |= _cut(rule, key, tensor)
    computed: tuple[str, ...] = ()
    if dialect == "hf" and "visual.norm.weight" in found and not {"visual.norm.bias", "logit_scale"} & found.keys():
        found["logit_scale"], computed = full((), HF_LOGIT_SCALE), ("logit_scale",)
    return Pieces(dialect, layout, found, tuple(rotary), tuple(unused), computed, unknown)


def _cut(rule: Rule, key: str, tensor: Lazy) -> dict[str, Lazy]:
    if len(rule.pieces) > 1 and (not tensor.shape or tensor.shape[0] % len(rule.pieces)):
        raise ValueError(f"{key} has shape {tensor.shape}, which is not {len(rule.pieces)} equal parts")
    if rule.leading:
        tensor = tensor.view(*[1] * rule.leading, *tensor.shape)
    if rule.transposed:
        tensor = tensor.transposed()
    return dict(zip(rule.pieces, split(tensor, len(rule.pieces)), strict=True))


def write(pieces: Pieces, dialect: str) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors in a dialect, in the order of the pieces; and the names of pieces that have no place there.

    Raises:
        ValueError: of what is one tensor there a part is missing.
    """
    table = Table(rules(dialect, _layout_of(pieces, dialect)))
    found: dict[str, Lazy] = {}
    homeless = []
    for piece in pieces.tensors:
        rule = table.of_piece(piece)
        if rule is None:
            homeless.append(piece)
        elif rule.key not in found:
            found[rule.key] = assemble(rule, pieces.tensors)
    return found, homeless


def assemble(rule: Rule, tensors: dict[str, Lazy]) -> Lazy:
    """The tensor of a key from its pieces.

    Raises:
        ValueError: one is missing.
    """
    missing = [piece for piece in rule.pieces if piece not in tensors]
    if missing:
        raise ValueError(f"{rule.key} needs {', '.join(missing)}, which the file does not hold")
    tensor = join([tensors[piece] for piece in rule.pieces])
    if rule.transposed:
        return tensor.transposed()
    return tensor.view(*tensor.shape[rule.leading :]) if rule.leading else tensor


def native_rule(key: str) -> Rule:
    """What a key of one of this package's models holds."""
    rule = _NATIVE.of_key(key)
    if rule is None:
        raise ValueError(f"no rule names the model's {key}; weights are read into models of create_model")
    return rule


def detect(keys: Iterable[str]) -> str:
    """The dialect of keys, one of NAMES.

    Raises:
        ValueError: of none.
    """
    keys = list(keys)

    def any_of(*starts: str) -> bool:
        return any(key.startswith(starts) for key in keys)

    if any_of("visual.trunk."):
        return "open_clip"
    if any_of("vision_model.", "text_model."):
        return "hf"
    if any_of("visual.blocks.", "text."):
        return "native"
    if "token_embedding.weight" in keys:
        return "clip"
    if any_of("blocks.0."):
        timms = ("attn.norm.weight", "attn.q_proj.bias", "mlp.fc1_g.weight", "mlp.norm.weight")
        evas = ("lm_head.weight", "mask_token", "blocks.0.mlp.w3.weight", "blocks.0.attn.inner_attn_ln.weight")
        if not any(f"blocks.0.{name}" in keys for name in timms) and any(name in keys for name in evas):
            return "mim"
        return "timm"
    shown = ", ".join(map(repr, keys[:5])) + (", ..." if len(keys) > 5 else "")
    known = "; ".join(f"{name} ({what})" for name, what in NAMES.items())
    raise ValueError(f"its {len(keys)} keys look like {shown}; that is none of the known dialects: {known}")


def _layout(dialect: str, tensors: dict[str, Lazy]) -> Layout:
    """How a file stores what its names alone do not tell."""
    if dialect == "hf":
        fused = not any(key.endswith((".ffn_ln.weight", ".inner_attn_ln.weight")) for key in tensors)
        return Layout(fused, "swiglu" if any(key.endswith(".mlp.fc3.weight") for key in tensors) else "gelu")
    prefix = {"native": "visual.", "open_clip": "visual.trunk."}.get(dialect, "") + "blocks.0."
    fused = f"{prefix}attn.q_proj.weight" not in tensors
    mlp = {name: tensors.get(f"{prefix}mlp.{name}.weight") for name in ("w1", "w12", "fc1_g", "fc1", "fc2")}
    if mlp["w1"] or mlp["fc1_g"]:
        return Layout(fused, "swiglu")
    # timm packs w1 and w2 under GELU's names: then the first has twice the rows that the second has columns.
    first, second = mlp["fc1"], mlp["fc2"]
    packed = mlp["w12"] or (first and second and first.shape[:1] == (2 * second.shape[-1],))
    return Layout(fused, "packed" if packed else "gelu")


def _layout_of(pieces: Pieces, dialect: str) -> Layout:
    """How a dialect stores these pieces."""
    kind = "swiglu" if any(".mlp.w1." in piece for piece in pieces.tensors) else "gelu"
    if kind == "swiglu" and dialect in ("timm", "open_clip") and not any(".ffn_ln." in p for p in pieces.tensors):
        kind = "packed"
    return pieces.layout._replace(mlp=kind)


def is_rotary(key: str) -> bool:
    """Whether a key is of a rotary table."""
    return ".rope." in key or key.startswith("rope.") or key.endswith(("freqs_cos", "freqs_sin"))


def _is_bias_of_k(pieces: tuple[str, ...]) -> bool:
    return pieces[0].startswith("visual.") and pieces[0].endswith(".attn.k.bias")


def _is_unused(key: str) -> bool:
    """Whether a key is of what no EVA-CLIP has: a masked image model's own, or constants that a file repeats."""
    return key.removeprefix("visual.").startswith(("lm_head.", "mask_token")) or key.endswith(
        ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")
    )


def of_part(pieces: Pieces, part: str | None) -> Pieces:
    """The pieces of one tower alone; the other's keys, and logit_scale, count as unused."""
    if part is None:
        return pieces
    prefix, others = f"{part}.", ("text", *_FLAT_TEXT) if part == "visual" else ("vis",)
    unknown = {k: x for k, x in pieces.unknown.items() if not k.startswith(others)}
    unused = [k for k in pieces.unknown if k not in unknown]
    unused += [piece for piece in pieces.tensors if not piece.startswith(prefix)]
    tensors = {piece: x for piece, x in pieces.tensors.items() if piece.startswith(prefix)}
    return replace(pieces, tensors=tensors, unknown=unknown, unused=(*pieces.unused, *unused), computed=())


_FLAT_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")
_NATIVE = Table([*rules("native", Layout(True, "gelu")), *rules("native", Layout(False, "swiglu"))])
