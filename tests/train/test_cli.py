"""The command line as a user meets it."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import evaclip
from evaclip.cli import claim_folder, main

SMALL_RUN = (
    *("--model.vision", "layers", "1", "--model.text", "layers", "1", "--data.batch-size", "16"),
    *("--schedule.steps", "2", "--run.tensorboard", "False"),
)


def test_without_a_command_it_lists_them(capsys):
    assert main([]) == 0
    assert "evaclip train RECIPE" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "digit"], "did you mean digits"),
        (["train"], r"which recipe\?"),
        (["train", "digits", "--model.name", "EVA02-CLIP-B16"], "EVA02-CLIP-B-16"),
        (["train", "digits", "--data.source", "nowhere"], "'nowhere' does not exist"),
        (["train", "digits", "--data.batch-size", "5000"], "batch_size is 5000"),
        (["train", "digits", "--compute.device", "abacus"], 'allowed are "auto"'),
        (["eval", "nowhere"], "nowhere does not exist"),
        (["eval"], r"which run\?"),
        (["train", "digits", "--model.vision", "image_size", "big"], "image_size is 'big'"),
        (["train", "digits", "--model.vision", "layers", "0"], "layers is 0"),
        (["train", "digits", "--model.vision", "image_size", "16"], "images of 1 x 8 x 24, but .* takes 1 x 16 x 16"),
        (["eval", __file__], "test_cli.py is a file; give .* `evaclip export .*test_cli.py FOLDER`"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.visual-lr" in text
    assert "Share of image patches left out" in text


def test_models_lists_them_with_their_sizes(capsys):
    assert main(["models"]) == 0
    output = capsys.readouterr().out
    for name in evaclip.list_models():
        assert name in output
    assert "17,630,494,720" in output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the command line, two steps long."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", "digits", "--run.output", str(folder), *SMALL_RUN]) == 0
    return folder / "digits"


def test_a_run_leaves_what_the_readme_says(run):
    for name in ("recipe.json", "metrics.jsonl", "showcase.png", "example.png"):
        assert (run / name).stat().st_size > 0


def test_a_second_run_does_not_touch_the_first(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "digits", "--run.output", str(run.parent), *SMALL_RUN]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run.parent / "digits-2" / "metrics.jsonl").exists()


def test_eval_on_digits_writes_json_and_a_table(run, capsys):
    assert main(["eval", str(run)]) == 0
    results = json.loads((run / "eval-digits.json").read_text())
    assert set(results) == {"zero-shot classification", "retrieval"}
    assert results["retrieval"]["texts"] == 500
    assert "image_to_text@1" in capsys.readouterr().out


def test_eval_on_a_labelled_folder_and_on_captions(run, tmp_path):
    for label, shade in (("one", 0), ("two", 255)):
        (tmp_path / "classes" / label).mkdir(parents=True)
        (tmp_path / "pairs").mkdir(exist_ok=True)
        Image.new("L", (24, 8), shade).save(tmp_path / "classes" / label / "a.png")
        Image.new("L", (24, 8), shade).save(tmp_path / "pairs" / f"{label}.png")
        (tmp_path / "pairs" / f"{label}.txt").write_text(f"{label} {label} three\n")
    templates = tmp_path / "templates.txt"
    templates.write_text("zero {}\n{} zero\n")
    output = tmp_path / "results.json"
    data = str(tmp_path / "classes")
    assert main(["eval", str(run), "--data", data, "--templates", str(templates), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["zero-shot classification"]["samples"] == 2
    assert main(["eval", str(run), "--data", str(tmp_path / "pairs"), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["retrieval"]["images"] == 2


def test_training_on_a_folder_of_captioned_images(tmp_path):
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text(f"a red square of shade {i}")
    arguments = ["--data.source", str(tmp_path), "--model.name", "EVA02-CLIP-tiny", "--data.tokenizer", "clip"]
    arguments += ["--model.text", "vocabulary", "49408", "context", "77"]
    size = ["--data.batch-size", "4", "--schedule.steps", "2", "--run.output", str(tmp_path / "runs"), "--name", "red"]
    assert main(["train", "digits", *arguments, *size]) == 0
    model, tokenizer, preprocess = evaclip.load(tmp_path / "runs" / "red")
    with Image.open(tmp_path / "0.jpg") as image:
        features = model.encode_image(preprocess(image)[None], normalize=True)
    assert features.norm().item() == pytest.approx(1)
    assert model.encode_text(tokenizer(["a red square"])).shape == features.shape


def test_the_printed_snippet_runs(run, capsys, monkeypatch):
    from evaclip.train.showcase import show_digits

    model, tokenizer, _ = evaclip.load(run)
    show_digits(model, tokenizer, run)
    output = capsys.readouterr().out
    snippet = output.split("or, in Python:\n")[1]
    exec("\n".join(line.strip() for line in snippet.strip().splitlines()), {})
    assert "tensor([[" in capsys.readouterr().out


def test_a_changed_model_cannot_continue_a_run(run, capsys):
    assert main(["train", str(run), "--model.vision.layers", "2", "--schedule.steps", "4"]) == 2
    assert "blocks.1" in capsys.readouterr().err


def test_options_that_fail_at_once_are_not_kept(run, tmp_path, monkeypatch):
    run = shutil.copytree(run, tmp_path / "run")
    before = (run / "recipe.json").read_bytes()
    further = ["train", str(run), "--schedule.steps", "3"]
    with monkeypatch.context() as patch:
        patch.setattr("evaclip.train.step.forward_backward", lambda *_: (_ for _ in ()).throw(ValueError("no memory")))
        assert main([*further, "--run.keep", "7"]) == 2
    assert (run / "recipe.json").read_bytes() == before
    assert main([*further, "--run.keep", "8"]) == 0
    assert json.loads((run / "recipe.json").read_text())["run"]["keep"] == 8


@pytest.mark.parametrize("option", [("--name", "other"), ("--run.output", "elsewhere")])
def test_a_run_is_continued_where_it_is(option, run, capsys):
    before = (run / "recipe.json").read_bytes()
    assert main(["train", str(run), *option, "--schedule.steps", "9"]) == 2
    assert "is continued where it is; leave out --name and --run.output" in capsys.readouterr().err
    assert (run / "recipe.json").read_bytes() == before


def test_a_run_that_is_past_its_steps_says_so(run, capsys):
    assert main(["train", str(run), "--schedule.steps", "1", "--schedule.warmup", "0"]) == 0
    assert "is at step 2 already, so that none of 1 steps is left" in capsys.readouterr().out


def test_results_are_written_though_nobody_reads_the_tables(run, tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "evaclip.cli", "eval", str(run), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(120) in (1, 141) and process.stderr.read() == ""  # 1: rich says so
    assert "retrieval" in json.loads(output.read_text())


def test_a_reader_that_has_left_is_no_error():
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "evaclip.cli", "models"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    process.stdout.close()
    assert process.wait(120) == 141 and process.stderr.read() == ""


def test_a_state_of_other_parameters_is_refused(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    assert main(["train", str(run), "--loss.fixed-logit-scale", "50", "--schedule.steps", "9"]) == 2
    assert "load the state of the same model" in capsys.readouterr().err


def test_a_checkpoint_folder_is_no_run(run, capsys):
    before = sorted(run.rglob("*"))
    assert main(["train", str(run / "checkpoints" / "step-00000002")]) == 2
    assert f"`evaclip train {run}` continues its run" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("change", ["--optimizer.name=adamw", "--compute.precision=bf16"])
def test_a_run_keeps_its_optimizer_and_precision(run, change, capsys):
    assert main(["train", str(run), change, "--schedule.steps", "4"]) == 2
    assert "was written with" in capsys.readouterr().err


def test_eval_refuses_an_unknown_device(run, capsys):
    assert main(["eval", str(run), "--device", "abacus"]) == 2
    assert "the device is 'abacus'" in capsys.readouterr().err


def test_parallel_runs_take_folders_of_their_own(tmp_path):
    assert [claim_folder(tmp_path, "a").name for _ in range(3)] == ["a", "a-2", "a-3"]


def test_a_folder_of_classes_may_hold_a_readme(run, tmp_path):
    for label in ("one", "two"):
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.new("L", (24, 8)).save(tmp_path / "data" / label / "a.png")
    (tmp_path / "data" / "one" / "README.txt").write_text("about")
    templates = tmp_path / "templates.txt"
    templates.write_text("{}")
    output = tmp_path / "out.json"
    data = str(tmp_path / "data")
    assert main(["eval", str(run), "--data", data, "--templates", str(templates), "--output", str(output)]) == 0
    assert "zero-shot classification" in json.loads(output.read_text())


def test_loaded_model_is_the_trained_one(run):
    model, _, _ = evaclip.load(run)
    again, _, _ = evaclip.load(run / "checkpoints" / "step-00000002")
    assert not model.training
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
