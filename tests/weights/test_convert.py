"""`evaclip convert`: what it writes, what it refuses, and how much memory it takes."""

import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from weights.small import same, small

import evaclip
from evaclip.cli import main
from evaclip.models import create_model
from evaclip.train.recipe import Model, Recipe, save_recipe
from evaclip.weights import dialects, files
from evaclip.weights.convert import write_safetensors
from evaclip.weights.lazy import full, lazy

NAME = "EVA02-CLIP-tiny"


TEXT = {"layers": 1, "width": 64, "heads": 2, "vocabulary": 96}


def weights_of(seed=1, name=NAME):
    torch.manual_seed(seed)
    return create_model(name).state_dict()


@pytest.fixture
def source(tmp_path):
    torch.save(weights_of(), tmp_path / "native.pt")
    return tmp_path / "native.pt"


def test_a_file_goes_round_all_dialects_by_the_command_line(source, tmp_path, capsys):
    steps = [("open_clip", "a.safetensors"), ("hf", "b.bin"), ("native", "c.pt")]
    before = source
    for to, name in steps:
        assert main(["convert", str(before), str(tmp_path / name), "--to", to]) == 0
        before = tmp_path / name
        assert evaclip.load_checkpoint(create_model(NAME), before).dialect == to
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("native to open_clip: ") and said[0].endswith(f"written to {tmp_path / 'a.safetensors'}")
    assert same(torch.load(before, weights_only=True), weights_of())


def test_timm_gets_the_image_tower_and_is_told_what_it_does_not(source, tmp_path):
    converted = evaclip.convert(source, tmp_path / "timm.safetensors", to="timm")
    written = load_file(tmp_path / "timm.safetensors")
    assert set(converted.left_out) == {key for key in pieces() if not key.startswith("visual.")}
    assert torch.equal(written["blocks.0.mlp.fc1_g.weight"], weights_of()["visual.blocks.0.mlp.w1.weight"])
    assert "left out: " in str(converted)
    target = create_model(NAME)
    report = evaclip.load_checkpoint(target, tmp_path / "timm.safetensors", part="visual")
    assert report.dialect == "timm" and same(target.visual.state_dict(), visual(weights_of()))


def visual(weights):
    return {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}


def pieces():
    return dialects.read({key: lazy(x) for key, x in weights_of().items()}).tensors


def test_dtypes_change_but_that_of_the_scale(source, tmp_path):
    evaclip.convert(source, tmp_path / "half.safetensors", dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_mode == source.stat().st_mode  # anyone's who may read the source
    half = load_file(tmp_path / "half.safetensors")
    assert half.pop("logit_scale").dtype == torch.float32
    assert all(torch.equal(value, weights_of()[key].half()) for key, value in half.items())


def test_a_large_file_is_written_as_several_that_load_again(source, tmp_path):
    converted = evaclip.convert(source, tmp_path / "w.safetensors", shard_size=2e-4)
    *shards, index = converted.files
    assert index.name == "w.safetensors.index.json" and not (tmp_path / "w.safetensors").exists()
    assert shards[1].name == f"w-00002-of-{len(shards):05d}.safetensors"
    total = sum(x.nbytes for x in weights_of().values())
    assert json.loads(index.read_text())["metadata"] == {"total_size": total}
    assert all(sum(x.nbytes for x in load_file(shard).values()) <= 2e5 for shard in shards)
    assert same(create_model(NAME, checkpoint=index).state_dict(), weights_of())


def test_weights_may_be_resized_for_a_named_model(tmp_path):
    torch.save(weights_of(), tmp_path / "w.pt")
    finer = create_model(NAME, device="meta", vision={"image_size": 64})
    evaclip.convert(tmp_path / "w.pt", tmp_path / "finer.pt", model=finer, resize="eva")
    written = torch.load(tmp_path / "finer.pt")
    assert written["visual.pos_embed"].shape == (1, 65, 64)
    with pytest.raises(ValueError, match="resize needs to know the model"):
        evaclip.convert(tmp_path / "w.pt", tmp_path / "other.pt", resize="eva")


@pytest.mark.parametrize("sharded", [False, True])
def test_runs_and_their_checkpoints_become_one_file(sharded, tmp_path):
    run = tmp_path / "runs" / "mine"
    folder = run / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    recipe = Recipe(name="mine", model=Model(name=NAME, vision={"layers": 1}))
    for place in (run, folder):
        save_recipe(recipe, place / "recipe.json")
    weights = {k: v for k, v in weights_of().items() if not k.startswith("visual.blocks.1.")}
    if sharded:
        dcp.save({"model": weights, "optimizer": {"lr": torch.ones(2)}}, checkpoint_id=folder / "shards", no_dist=True)
    else:
        save_file(weights, folder / "model.safetensors")
    for i, source in enumerate((run, folder)):
        assert main(["convert", str(source), str(tmp_path / f"{i}.safetensors")]) == 0
        assert same(load_file(tmp_path / f"{i}.safetensors"), weights)
    with pytest.raises(ValueError, match=r"missing: visual.blocks.1.norm1.weight"):
        evaclip.convert(run, tmp_path / "x.safetensors", model=create_model(NAME, device="meta"))
    assert not (tmp_path / "x.safetensors").exists()


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(source, tmp_path, capsys):
    def refused(*arguments):
        assert main(["convert", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out.safetensors"
    before = source.read_bytes()
    assert "is there already; nothing is overwritten" in refused(source, source)
    assert source.read_bytes() == before
    assert "must end in .safetensors, .pt or .bin" in refused(source, tmp_path / "out.npz")
    assert "there is no folder" in refused(source, tmp_path / "gone" / "out.pt")
    assert "no checkpoint at" in refused(tmp_path / "gone.pt", out)
    assert "which weights" not in refused(source)
    assert "shard_size is -1.0 GB; above 0" in refused(source, out, "--shard-size", "-1")
    assert "no model is called 'EVA'" in refused(source, out, "--model", "EVA")
    torch.save(weights_of() | {"visual.extra": torch.zeros(2)}, tmp_path / "more.pt")
    assert "holds keys that are not known: 'visual.extra'" in refused(tmp_path / "more.pt", out)
    torch.save(weights_of(name="EVA01-CLIP-tiny-layerscale"), tmp_path / "gamma.pt")
    assert "the dialect 'hf' has no place for 'visual.blocks.0.gamma_1'" in refused(
        tmp_path / "gamma.pt", out, "--to", "hf"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"native.pt", "more.pt", "gamma.pt"}


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the size of files stands for a full disk")
@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_a_write_that_fails_leaves_nothing_behind(name, source, tmp_path, capsys):
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, unlimited[1]))
    try:
        assert main(["convert", str(source), str(tmp_path / name)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert f"{tmp_path / name} could not be written, and nothing of it is left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["native.pt"]


def test_what_others_wrote_meanwhile_or_under_a_like_name_stays(source, tmp_path, monkeypatch):
    other = tmp_path / "out.safetensors.partial"
    other.write_text("another's")
    evaclip.convert(source, tmp_path / "out.safetensors")
    assert other.read_text() == "another's"

    def slow(tensors, path, **named):
        save_file(tensors, path, **named)
        (tmp_path / "late.safetensors").write_text("another's")

    monkeypatch.setattr("evaclip.weights.convert.save_file", slow)
    with pytest.raises(FileExistsError, match="is there already"):
        evaclip.convert(source, tmp_path / "late.safetensors")
    assert (tmp_path / "late.safetensors").read_text() == "another's"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "openclip"}, "to is 'openclip'; allowed: 'native', 'timm', 'open_clip' or 'hf'"),
        ({"part": "image"}, "part is 'image'; allowed: 'visual', 'text' or None"),
        ({"dtype": torch.int8}, "dtype is torch.int8; give one of floating point"),
    ],
)
def test_options_that_are_none_are_refused(options, words, source, tmp_path):
    with pytest.raises(ValueError, match=words):
        evaclip.convert(source, tmp_path / "out.pt", **options)


def test_a_value_beyond_the_dtype_is_refused(tmp_path):
    weights = weights_of()
    weights["visual.head.bias"][3] = -7e4
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"visual.head.bias has values that float16 cannot hold; take bfloat16"):
        evaclip.convert(tmp_path / "w.pt", tmp_path / "half.safetensors", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
    evaclip.convert(tmp_path / "w.pt", tmp_path / "half.pt", dtype=torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read and reset in /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_sharded_checkpoint_is_converted_within_the_memory_of_two_shards(suffix, tmp_path):
    model = create_model("EVA-CLIP-18B", device="meta", vision={"layers": 8, "width": 640, "heads": 8}, text=TEXT)
    tensors = {key: full(tuple(x.shape), 0.5) for key, x in model.state_dict().items()}
    shard = 0.03
    written = write_safetensors(tensors, tmp_path / "native.safetensors", shard)
    source = written[-1] if suffix == ".safetensors" else _as_torch_files(written, tmp_path)
    total = sum(x.nbytes for x in tensors.values())
    assert total > 5.5 * shard * 1e9
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is used now
    before = _memory("VmHWM")
    evaclip.convert(source, tmp_path / "hf.safetensors", to="hf", shard_size=shard)
    # One file of the output in memory, and pages of one file of the source.
    assert _memory("VmHWM") - before < 2 * shard * 1e9


def _as_torch_files(written, folder):
    *shards, index = written
    places = json.loads(index.read_text())["weight_map"]
    for shard in shards:
        torch.save(load_file(shard), folder / f"{shard.stem}.bin")
    names = {key: f"{Path(name).stem}.bin" for key, name in places.items()}
    (folder / "pytorch.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return folder / "pytorch.bin.index.json"


def _memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_loading_reads_one_tensor_at_a_time(tmp_path, monkeypatch):
    """The model's own copy, and never more of the file than a tensor of it."""
    weights = small("EVA-CLIP-8B").state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    alive, most = [], 0
    safe_open = files.safe_open

    class Counting:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *arguments):
            return self.file.__exit__(*arguments)

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, key):
            nonlocal most
            tensor = self.opened.get_tensor(key)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(x.nbytes for ref in alive if (x := ref()) is not None))
            return tensor

    monkeypatch.setattr(files, "safe_open", Counting)
    evaclip.load_checkpoint(small("EVA-CLIP-8B", seed=1), tmp_path / "w.safetensors")
    assert len(alive) >= len(weights)
    assert most <= max(x.nbytes for x in weights.values()) + 4
