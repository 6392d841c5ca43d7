"""Files and folders as other programs write them."""

import enum
import json
import os
import pickle
import sys
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from weights.small import same, small

import evaclip
from evaclip.weights.files import open_weights
from evaclip.weights.lazy import lazy

NAME = "EVA02-CLIP-tiny"


def weights_of(seed=1):
    torch.manual_seed(seed)
    return evaclip.create_model(NAME).state_dict()


def read(path):
    return {key: tensor.read() for key, tensor in open_weights(path).items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_of_several_files_is_one_checkpoint(suffix, tmp_path):
    weights = weights_of()
    keys = sorted(weights)
    files = {f"part-{i}{suffix}": keys[i::3] for i in range(3)}
    for name, held in files.items():
        (save_file if suffix == ".safetensors" else torch.save)({k: weights[k] for k in held}, tmp_path / name)
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, held in files.items() for key in held}}))
    assert same(read(index), weights) and same(read(tmp_path), weights)
    (tmp_path / f"part-1{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=f"names files that are not beside it: 'part-1{suffix}'"):
        open_weights(index)
    for content in ("[]", '{"weight_map": {"key": 3}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match="is no index of weights"):
            open_weights(index)


@pytest.mark.parametrize("name", ["../part.safetensors", "/tmp/part.safetensors", "model.safetensors.index.json"])
def test_an_index_names_files_of_weights_beside_it_alone(name, tmp_path, on_the_hub):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"key": torch.ones(2)}, tmp_path / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"key": name}}))
    with pytest.raises(ValueError, match=rf"names '{name}'; an index names files beside it, \*.safetensors, "):
        open_weights(folder)
    (folder / "model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.json")
    hub = on_the_hub("model.safetensors.index.json")
    with pytest.raises(FileNotFoundError, match=f"names '{name}'"):
        evaclip.create_model(NAME, checkpoint="owner/name")
    assert hub.asked == ["model.safetensors.index.json"]


def test_names_that_are_no_words_are_named(tmp_path):
    torch.save({0: torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"holds entries that are no tensors by name: 0;"):
        open_weights(tmp_path / "w.pt")


def test_a_folder_must_tell_which_file_is_meant(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"which weights of the folder .*It holds none of \*\.safetensors"):
        open_weights(tmp_path)
    torch.save(weights_of(1), tmp_path / "a.pt")
    assert same(read(tmp_path), weights_of(1))
    torch.save(weights_of(2), tmp_path / "b.pt")
    with pytest.raises(FileNotFoundError, match=r"It holds 'a.pt', 'b.pt'; give one file"):
        open_weights(tmp_path)
    save_file(weights_of(3), tmp_path / "model.safetensors")
    assert same(read(tmp_path), weights_of(3))


def test_a_sharded_checkpoint_is_read_by_the_models_part(tmp_path):
    weights = weights_of()
    moments = {"optimizer": {"state": {"visual.norm.weight": {"exp_avg": torch.zeros(64)}}}}
    dcp.save({"model": weights} | moments, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert same(read(tmp_path), weights) and same(read(tmp_path / "shards"), weights)
    shard = next((tmp_path / "shards").glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"cannot read .* of .*shards: a file of it is damaged"):
        read(tmp_path)
    for cut in (content[:-1], b""):
        shard.write_bytes(cut)
        with pytest.raises(ValueError, match=r"lacks files that its .metadata names, or ends .*: __0_0.distcp; was"):
            open_weights(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks files that its .metadata names, or ends .*: __0_0.distcp; was"):
        open_weights(tmp_path)


class Runs:
    """Calls a function, by a name of its own or by one that a harmless module leads to, when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("by", ["its own name", "another's"])
def test_a_sharded_checkpoint_runs_no_code(by, tmp_path):
    dcp.save(weights_of(), checkpoint_id=tmp_path, no_dist=True)
    attack = pickle.dumps(Runs(os.mkdir, str(tmp_path / "made")), protocol=4)
    if by == "another's":  # which that module imports
        own, others = (
            b"\x8c\x05posix\x94\x8c\x05mkdir",
            b"\x8c'torch.distributed.checkpoint.filesystem\x94\x8c\x08os.mkdir",
        )
        assert own in attack
        attack = b"\x80\x04" + attack[11:].replace(own, others)  # without the frame, whose length it was
    (tmp_path / ".metadata").write_bytes(attack)
    with pytest.raises(
        ValueError, match=r"cannot read .*\.metadata: it pickles a .*mkdir, and no code of a file is run"
    ):
        open_weights(tmp_path)
    assert not (tmp_path / "made").exists()


# DeepSpeed's own classes, pickled beside the tensors; nothing of them is there when the files are read.
LOSS_SCALER = ("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
STAGE = ("deepspeed.runtime.zero.config", "ZeroStageEnum")


@pytest.fixture
def deepspeed(monkeypatch):
    """Objects of DeepSpeed's classes, which are importable until the test undoes it."""
    scaler = type(LOSS_SCALER[1], (), {"__module__": LOSS_SCALER[0]})()
    scaler.scale = 65536.0
    stage = enum.IntEnum(STAGE[1], {"optimizer_states": 1}, module=STAGE[0])(1)
    for (module, name), instance in ((LOSS_SCALER, scaler), (STAGE, stage)):
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            place = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, place, sys.modules.get(place) or types.ModuleType(place))
        setattr(sys.modules[module], name, type(instance))
    return {"loss_scaler": scaler, "zero_stage": stage}


def write_zero(folder, weights, frozen, world, stage, prefix, others):
    """A checkpoint in DeepSpeed's layout, of two parameter groups."""
    names = [key for key in weights if key not in frozen]
    groups = [names[::2], names[1::2]]
    shapes = [{name: weights[name].shape for name in group} for group in groups]
    model = {
        "module": {k: x.half() for k, x in weights.items()} | {"visual.rope.freqs_cos": torch.ones(4)},
        "buffer_names": ["visual.rope.freqs_cos"],
        "param_shapes": shapes,
        "frozen_param_shapes": {name: weights[name].shape for name in frozen},
        "frozen_param_fragments": {name: weights[name] for name in frozen},
        "shared_params": {},
    } | others
    folder.mkdir()
    if stage < 3:
        torch.save(model, folder / "mp_rank_00_model_states.pt")
        flat = [torch.cat([weights[name].flatten() for name in group]) for group in groups]
        padded = [torch.cat([x, x.new_full((-len(x) % (2 * world),), 9.0)]) for x in flat]
        shards = [{"single_partition_of_fp32_groups": [x.chunk(world)[rank] for x in padded]} for rank in range(world)]
    else:
        shards = [{"fp32_flat_groups": []} for _ in range(world)]
        for rank in range(world):
            own = {name: _share(weights[name], rank, world) for name in frozen}
            torch.save(
                model | {"frozen_param_fragments": own}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            )
            for group in groups:
                shards[rank]["fp32_flat_groups"].append(
                    torch.cat([_share(weights[name], rank, world) for name in group])
                )
    for rank, shard in enumerate(shards):
        state = shard | others | {"partition_count": world}
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, folder / name)


def _share(tensor, rank, world):
    flat = tensor.flatten()
    return torch.cat([flat, flat.new_full((-len(flat) % world,), 9.0)]).chunk(world)[rank].clone()


@pytest.mark.parametrize(("stage", "prefix"), [(1, ""), (2, "bf16_"), (3, "")])
def test_float32_weights_are_put_together_from_deepspeeds_shards(stage, prefix, deepspeed, monkeypatch, tmp_path):
    weights = weights_of()
    # Eleven processes: their files do not sort by name, and most tensors are no multiple of 11.
    write_zero(tmp_path / "epoch_3", weights, ["logit_scale"], 11, stage, prefix, deepspeed)
    (tmp_path / "latest").write_text("epoch_3")
    monkeypatch.undo()  # DeepSpeed's classes are gone
    found = read(tmp_path)
    assert torch.equal(found.pop("visual.rope.freqs_cos"), torch.ones(4))
    assert same(found, weights)
    target = evaclip.create_model(NAME, checkpoint=tmp_path)
    assert same(target.state_dict(), weights)
    (tmp_path / "epoch_3" / f"{prefix}zero_pp_rank_10_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match=r"holds 10 files .*, of a run of 11 processes; all are needed"):
        open_weights(tmp_path)


def test_without_zero_deepspeeds_weights_are_the_models_own(deepspeed, monkeypatch, tmp_path):
    weights = weights_of()
    torch.save({"module": weights, "lr_scheduler": None} | deepspeed, tmp_path / "mp_rank_00_model_states.pt")
    monkeypatch.undo()
    assert same(read(tmp_path), weights) and same(read(tmp_path / "mp_rank_00_model_states.pt"), weights)


@pytest.mark.parametrize("stage", [1, 3])
def test_shards_of_another_length_are_refused(stage, deepspeed, monkeypatch, tmp_path):
    write_zero(tmp_path / "z", weights_of(), [], 2, stage, "", deepspeed)
    monkeypatch.undo()
    path = tmp_path / "z" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    key = "single_partition_of_fp32_groups" if stage == 1 else "fp32_flat_groups"
    torch.save({"optimizer_state_dict": {"partition_count": 2, key: [torch.zeros(5), torch.zeros(5)]}}, path)
    with pytest.raises(ValueError, match="hold"):
        open_weights(tmp_path / "z")


def test_shards_of_other_groups_are_refused(deepspeed, monkeypatch, tmp_path):
    write_zero(tmp_path / "z", weights_of(), [], 2, 1, "", deepspeed)
    monkeypatch.undo()
    path = tmp_path / "z" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"single_partition_of_fp32_groups": [torch.zeros(5)]}}, path)
    with pytest.raises(ValueError, match=r"the model has 2 groups of parameters, the shards \[2, 1\]"):
        open_weights(tmp_path / "z")
    torch.save([1], tmp_path / "z" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt is no file of DeepSpeed's"):
        open_weights(tmp_path / "z")


def test_another_kind_of_optimizer_state_says_what_to_do(deepspeed, monkeypatch, tmp_path):
    torch.save({"module": {}} | deepspeed, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"run the zero_to_fp32.py that DeepSpeed puts beside them"):
        open_weights(tmp_path)
    torch.save({}, tmp_path / "mp_rank_01_model_states.pt")
    with pytest.raises(ValueError, match="of a tensor-parallel model"):
        open_weights(tmp_path)


class Hub:
    """huggingface_hub, with one repository and no network."""

    def __init__(self, folder, files):
        self.folder, self.files, self.asked = folder, files, []

    def list_repo_files(self, name):
        assert name == "owner/name"
        return self.files

    def hf_hub_download(self, name, file):
        assert name == "owner/name"
        self.asked.append(file)
        return str(self.folder / file)


@pytest.fixture
def on_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    def put(*files):
        hub = Hub(tmp_path, ["README.md", *files])
        for function in ("list_repo_files", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, function, getattr(hub, function))
        return hub

    return put


def test_a_name_of_the_hub_is_downloaded_with_all_its_files(on_the_hub, tmp_path):
    weights = small("EVA-CLIP-8B").state_dict()
    tensors = {key: lazy(value) for key, value in weights.items()}
    from evaclip.weights.convert import write_safetensors

    files = write_safetensors(tensors, tmp_path / "model.safetensors", shard_size=2e-4)
    hub = on_the_hub(*(file.name for file in files), "training_args.bin")
    for name in ("owner/name", "hf-hub:owner/name", "hf-hub:owner/name/model.safetensors.index.json"):
        hub.asked.clear()
        target = small("EVA-CLIP-8B", seed=2)
        evaclip.load_checkpoint(target, name)
        assert same(target.state_dict(), weights)
        assert sorted(hub.asked) == sorted(file.name for file in files) and len(files) > 3


def test_a_repository_of_several_files_asks_which(on_the_hub, tmp_path):
    torch.save(weights_of(), tmp_path / "b.pt")
    hub = on_the_hub("a.pt", "b.pt")
    with pytest.raises(FileNotFoundError, match=r"It holds a.pt, b.pt; give one as hf-hub:owner/name/FILE"):
        evaclip.create_model(NAME, checkpoint="owner/name")
    model = evaclip.create_model(NAME, checkpoint="hf-hub:owner/name/b.pt")
    assert same(model.state_dict(), weights_of()) and hub.asked == ["b.pt"]


def test_without_network_the_error_says_that_neither_path_nor_hub_has_it(monkeypatch):
    import huggingface_hub

    def unreachable(*arguments):
        raise ConnectionError("Network is unreachable\nmore")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    words = (
        r"there is no path owner/name here, and the Hugging Face hub did not give owner/name \(Network is unreachable\)"
    )
    with pytest.raises(FileNotFoundError, match=words):
        evaclip.create_model(NAME, checkpoint="owner/name")


def test_without_huggingface_hub_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"owner/name, which is no local path .* pip install 'evakernels\[hub\]'"):
        evaclip.create_model(NAME, checkpoint="owner/name")


@pytest.mark.parametrize("path", ["gone.pt", "gone/weights.pt", "a/b/c", "gone/x.safetensors", "runs/gone"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
        evaclip.create_model(NAME, checkpoint=path)
