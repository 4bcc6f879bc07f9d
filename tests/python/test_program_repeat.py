"""What a run leaves for the next one: its options, its place, what --resume compares."""

import json
import resource
import shutil
import signal

import pytest
from safetensors.torch import load_file

from program import (
    PROGRAM,
    TINY,
    contents_of,
    done,
    error_of,
    page_of,
    pretrain,
    sla2,
    start,
    wait_until,
)

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="the program is not built (make setup)"),
    pytest.mark.usefixtures("ffmpeg"),
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = ["--device", "cpu", "--threads", 1, "--seed", 3]
WIDE = "--layers 2 --heads 2 --height 64 --width 64".split()
CALIBRATE = "--keeps 0.5,0.25 --block-q 32 --block-k 32 --steps 2".split()


@pytest.fixture(scope="module")
def stages(clips, tmp_path_factory):
    """A model, its SLA2 weights with another keep than the default, and both after stage 2."""
    folder = tmp_path_factory.mktemp("stages")
    model, weights, tuned = folder / "model", folder / "sla2", folder / "tuned"
    result = pretrain(clips, model, *WIDE)
    assert result.returncode == 0, result.stderr
    data = ["--data", clips, *CPU]
    done("calibrate", "--model", model, "--out", weights, *CALIBRATE, *data)
    done("tune", "--model", model, "--sla2", weights, "--out", tuned, "--steps", 2, *data)
    return model, weights, tuned


def same_but(folder, *names):
    """The files of a run: without its configuration, the log's times and what `names` says."""
    return {
        name: content
        for name, content in contents_of(folder).items()
        if name not in names and name != "losses.jsonl"
    }


@pytest.mark.parametrize("stage", ["pretrain", "calibrate", "tune", "generate", "evaluate", "demo"])
def test_saved_options_repeat_the_run(stage, clips, stages, tmp_path):
    model, weights, tuned = stages
    first, second = tmp_path / "first", tmp_path / "second"
    end = "x.mp4" if stage == "generate" else ""
    options = {
        "pretrain": ["--steps", 2, *TINY, "--data", clips],
        "calibrate": ["--model", model, "--data", clips, *CALIBRATE],
        "tune": ["--model", model, "--sla2", weights, "--data", clips, "--steps", 2],
        "generate": ["--model", model, "--sla2", weights, "--prompt", "bars", "--steps", 1],
        "evaluate": ["--model", model, "--sla2", weights, "--data", clips, "--repeats", 1]
        + ["--sampling-steps", 1, "--clips", 1, "--samples", 1],
        "demo": ["--model", model, "--data", clips / "noise.mp4", "--stage1-steps", 1]
        + ["--stage2-steps", 1, "--sampling-steps", 1],
    }[stage]
    cpu = [] if stage == "pretrain" else CPU
    saved_as = "x.mp4.json" if end else f"{stage}.json"
    done(stage, "--out", first / end, *options, *cpu)
    done(stage, "--out", second / end, "--config", first / saved_as)
    saved = [json.loads((folder / saved_as).read_text()) for folder in (first, second)]
    assert {**saved[0], "out": 0} == {**saved[1], "out": 0}
    if stage == "demo":
        settings = [
            json.loads((f / "report.json").read_text())["settings"] for f in (first, second)
        ]
        assert settings[0] == settings[1]
        assert settings[0]["stage2"]["lr"] == saved[0]["lr"]
        assert settings[0]["stage2"]["sla_lr"] == saved[0]["sla_lr"]
        assert settings[0]["stage1"]["steps"] == saved[0]["stage1_steps"] == 1
        shown = page_of(first / "report.html")
        assert shown["removed"] == ["keeps"] or shown["removed"] == []
        assert "data-cell" in shown["clips"] and "SLA" in shown["training-lead"]
        for plot in ("speed-plot", "loss-plots", "error-plots", "length-plot"):
            assert "<svg" in shown[plot] and "figcaption" in shown[plot], plot
        assert "NaN" not in json.dumps(shown)
        return
    if stage == "evaluate":
        methods = [
            [{**m, "step_ms": 0} for m in json.loads((f / "report.json").read_text())["methods"]]
            for f in (first, second)
        ]
        assert methods[0] == methods[1] and saved[0]["keeps"] == [0.5]
        return
    if stage == "tune":
        assert saved[0]["keep"] == 0.5 == json.loads((first / "sla2.json").read_text())["keep"]
    if stage == "generate":
        assert saved[0]["shift"] == 1.0 and saved[0]["from_t"] is None
    assert same_but(first, saved_as) == same_but(second, saved_as)


@pytest.mark.parametrize("stage", ["pretrain", "calibrate", "tune"])
def test_an_earlier_run_is_not_written_over(stage, clips, stages):
    model, weights, tuned = stages
    data = ["--data", clips, *CPU]
    command, out = {
        "pretrain": (["pretrain", "--data", clips, *TINY, *WIDE], model),
        "calibrate": (["calibrate", "--model", model, *CALIBRATE, *data], weights),
        "tune": (["tune", "--model", model, "--sla2", weights, *data], tuned),
    }[stage]
    before = contents_of(out)
    error = error_of(sla2(*command, "--out", out), 2)
    assert "--out must be a folder without an earlier run" in error and str(out) in error
    assert "--resume" in error
    assert contents_of(out) == before


# Not their defaults; each must reach the result.
PRETRAIN = {
    "batch": 3,
    "lr": 1e-3,
    "warmup": 1,
    "final-lr": 0.5,
    "weight-decay": 0.5,
    "clip-norm": 0.01,
    "ema": 0.1,
    "accumulation": 2,
    "prediction": "velocity",
    "timesteps": "uniform",
    "shift": 3,
    "t-min": 0.9,
    "caption-dropout": 0.9,
    "seed": 4,
    "fps": 4,
    "exclude": "bars",
}
SIZES = {
    "frames": 8,
    "height": 32,
    "width": 32,
    "patch": "2,8,8",
    "layers": 3,
    "heads": 4,
    "head-dim": 32,
    "ffn-dim": 48,
    "text-dim": 24,
    "caption-tokens": 3,
}
CHANGED = {
    "pretrain": {**PRETRAIN, **SIZES},
    "calibrate": {
        "keeps": "0.5",
        "batch": 2,
        "schedule": "turns",
        "router-lr": 0.1,
        "alpha-lr": 0.1,
        "final-lr": 0.3,
        "held-out": 1,
        "block-q": 64,
        "block-k": 64,
        "precision": "fp32",
        "score-norm": "softmax",
        "tokens": "raster",
        "tile": "2,2,2",
        "router": "head",
        "alpha": "head",
        "seed": 4,
    },
    "tune": {
        "keep": 0.25,
        "batch": 3,
        "lr": 0.1,
        "final-lr": 0.3,
        "alpha-lr-scale": 3,
        "proj-out-lr-scale": 3,
        "warmup": 1,
        "weight-decay": 0.3,
        "clip-norm": 3,
        "ema": 0.5,
        "accumulation": 2,
        "seed": 4,
    },
}


@pytest.mark.parametrize("stage", ["pretrain", "calibrate", "tune"])
def test_resume_refuses_every_other_option(stage, clips, stages, tmp_path):
    model, weights, tuned = stages
    out = {"pretrain": model, "calibrate": weights, "tune": tuned}[stage]
    before = contents_of(out)
    base = json.loads((out / f"{stage}.json").read_text())
    # What --resume may change, or what is tested by its contents below.
    free = {"out", "device", "threads", "steps", "checkpoint_every", "activation_checkpointing"}
    free |= {"data", "model", "sla2", "method", "log_every", "loader_threads"}
    assert {key.replace("-", "_") for key in CHANGED[stage]} == set(base) - free
    for option, value in CHANGED[stage].items():
        changed = tmp_path / "c.json"
        changed.write_text(json.dumps({**base, "steps": 8}))
        error = error_of(
            sla2(stage, "--config", changed, "--resume", f"--{option}={value}"),
            1,
        )
        assert f"{option.replace('-', '_')} must be" in error, error
        assert contents_of(out) == before


@pytest.mark.parametrize("stage", ["pretrain", "calibrate", "tune"])
def test_resume_knows_inputs_by_their_contents(stage, clips, stages, tmp_path):
    model, weights, tuned = (shutil.copytree(f, tmp_path / f.name) for f in stages)
    data = shutil.copytree(clips, tmp_path / "elsewhere")
    command, out = {
        "pretrain": (["pretrain", *TINY, *WIDE, "--steps", 6], model),
        "calibrate": (["calibrate", "--model", model, *CALIBRATE, *CPU], weights),
        "tune": (["tune", "--model", model, "--sla2", weights, "--steps", 2, *CPU], tuned),
    }[stage]
    command += ["--out", out, "--data", data, "--resume"]
    done(*command)  # another path, the same clips
    shutil.copyfile(data / "bars.mp4", data / "noise.mp4")
    assert "data must be" in error_of(sla2(*command), 1)
    shutil.copyfile(clips / "noise.mp4", data / "noise.mp4")
    if stage == "pretrain":
        return
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / WEIGHTS)
    tensors["proj_out.bias"] += 1
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    assert "model must be" in error_of(sla2(*command), 1)


def poison(folder, name, value):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", ["calibrate", "tune"])
def test_non_finite_numbers_stop_the_stages(stage, clips, stages, tmp_path, value):
    model, weights, _ = stages
    broken = shutil.copytree(model, tmp_path / "model")
    poison(broken, "blocks.0.ffn.net.2.weight", value)
    out = tmp_path / "out"
    data = ["--data", clips, *CPU, "--out", out]
    if stage == "calibrate":
        result = sla2("calibrate", "--model", broken, *CALIBRATE, *data)
        layer = "blocks.1.attn1"  # the first attention behind the broken weight
    else:
        result = sla2("tune", "--model", broken, "--sla2", weights, "--steps", 2, *data)
        layer = "blocks.0"
    error = error_of(result, 1)
    assert "NaN or Inf in the" in error and "of step 0" in error and layer in error
    assert "last good checkpoint: none yet" in error
    assert not (out / "sla2.json").exists() and not (out / "checkpoint.safetensors").exists()


def test_evaluate_samples_again_what_changed(clips, stages, tmp_path):
    """Samples of an earlier run are kept for the same model, weights and data alone."""
    model, weights, _ = (shutil.copytree(f, tmp_path / f.name) for f in stages)
    data = shutil.copytree(clips, tmp_path / "data")
    out = tmp_path / "out"
    command = ["evaluate", "--model", model, "--sla2", weights, "--data", data, "--out", out, *CPU]
    command += "--sampling-steps 1 --clips 1 --samples 1 --repeats 1".split()

    def kept():
        return done(*command).stderr.count("already sampled")

    assert kept() == 0 and kept() == 3
    shutil.copyfile(data / "bars.mp4", data / "noise.mp4")
    assert kept() == 0
    poison(model, "proj_out.bias", 0.5)
    assert kept() == 0 and kept() == 3


def test_every_option_of_generate_reaches_the_video(clips, stages, tmp_path):
    model, weights, tuned = stages
    out = tmp_path / "x.mp4"

    def made(**changed):
        options = {"prompt": "bars", "steps": 2, "frames": clips / "noise.mp4", "seed": 3}
        options = {"model": model, "sla2": weights, **options, **changed}
        words = [w for k, v in options.items() if v for w in (f"--{k.replace('_', '-')}", v)]
        done("generate", "--out", out, "--device", "cpu", "--threads", 1, *words)
        return out.read_bytes()

    start_point = made()
    assert made() == start_point
    for option, value in {
        "sla2": tuned,
        "prompt": "noise",
        "frames": clips / "bars.mp4",
        "steps": 3,
        "seed": 4,
        "guidance": 3,
        "shift": 5,
        "from_t": 0.9,
    }.items():
        assert made(**{option: value}) != start_point, option
    assert made(frames=None) != start_point


def test_interrupt_of_stage_1_says_how_to_go_on(clips, stages, tmp_path):
    out = tmp_path / "out"
    process = start(
        *["calibrate", "--model", stages[0], "--data", clips, "--out", out, *CPU],
        *[*CALIBRATE[:-1], 10**6, "--checkpoint-every", 5],
    )
    wait_until(process, (out / "checkpoint.safetensors").exists)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "after step" in error and "--resume continues" in error
    assert str(out / "checkpoint.safetensors") in error


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 1_000_000, "num_layers must be that of the weights, 2, got 1000000"),
        ("ffn_dim", 1 << 24, "its sizes must be those of the weights"),
        ("num_attention_heads", 1 << 20, "its sizes must be those of the weights"),
        ("text_dim", 1 << 24, "its sizes must be those of the weights"),
    ],
)
def test_huge_sizes_are_refused_before_memory_is_asked_for(stages, tmp_path, key, value, message):
    model = shutil.copytree(stages[0], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    result = sla2("info", model, preexec_fn=limit, timeout=60)
    error = error_of(result, 1)
    assert message in error and str(model / "config.json") in error


def test_files_of_two_saves_are_not_mixed(clips, stages, tmp_path):
    """A run that was killed between two of its files."""
    model, weights, tuned = stages
    other = tmp_path / "other"
    data = ["--data", clips, *CPU]
    done("tune", "--model", model, "--sla2", weights, "--out", other, "--steps", 3, *data)
    mixed = shutil.copytree(tuned, tmp_path / "mixed")
    shutil.copyfile(other / "transformer" / WEIGHTS, mixed / "transformer" / WEIGHTS)
    generate = ["generate", "--prompt", "bars", "--steps", 1, "--out", tmp_path / "x.mp4", *CPU]
    assert "of another save" in error_of(sla2(*generate, "--sla2", mixed), 1)
    done(*generate, "--sla2", other)
    # As the message says.
    done(
        "tune", "--model", model, "--sla2", weights, "--out", mixed, "--resume", "--steps", 2, *data
    )
    done(*generate, "--sla2", mixed)


def test_tuned_weights_need_no_model(stages, tmp_path):
    model, weights, tuned = stages
    out = tmp_path / "x.mp4"
    generate = ["generate", "--prompt", "bars", "--steps", 1, "--out", out, *CPU]
    done(*generate, "--sla2", tuned)
    alone = out.read_bytes()
    saved = json.loads((tmp_path / "x.mp4.json").read_text())
    assert saved["model"] == str(tuned / "transformer")
    both = done(*generate, "--sla2", tuned, "--model", model)
    assert str(tuned / "transformer") in both.stderr and out.read_bytes() == alone
    assert "--model must be a folder" in error_of(
        sla2(*generate, "--sla2", tuned, "--model", tmp_path / "nowhere"), 1
    )
    assert "--model is required" in error_of(sla2(*generate, "--sla2", weights), 2)


def test_the_command_to_repeat_can_be_pasted(stages, tmp_path):
    import shlex

    out = tmp_path / "it's my $folder/b.json"
    arguments = ["bench", "op", "--shape", "1,1,64,16", "--keep", "0.5", "--repeats", "1"]
    arguments += ["--block-q", "32", "--block-k", "32", "--device", "cpu", "--json", str(out)]
    done(*arguments)
    assert shlex.split(json.loads(out.read_text())["command"]) == [PROGRAM, *arguments]


NO_EFFECT = {
    "pretrain": ["activation-checkpointing", "loader-threads=1", "checkpoint-every=1"],
    "calibrate": ["checkpoint-every=1"],
    "tune": ["checkpoint-every=1"],
}


@pytest.mark.parametrize("stage", ["pretrain", "calibrate", "tune"])
def test_every_option_reaches_the_result(stage, clips, stages, tmp_path):
    model, weights, _ = stages
    command, changed, file = {
        "pretrain": (["pretrain", *TINY, "--data", clips, "--steps", 4], PRETRAIN, WEIGHTS),
        "calibrate": (
            ["calibrate", "--model", model, *CALIBRATE, *CPU, "--data", clips],
            CHANGED["calibrate"],
            "sla2.safetensors",
        ),
        "tune": (
            [
                "tune",
                "--model",
                model,
                "--sla2",
                weights,
                "--steps",
                3,
                *CPU,
                "--data",
                clips,
                "--warmup",
                0,
            ],
            # SLA alone has a proj_out.
            {k: v for k, v in CHANGED["tune"].items() if k != "proj-out-lr-scale"},
            f"transformer/{WEIGHTS}",
        ),
    }[stage]

    def result(name, *more):
        out = tmp_path / name
        done(*command, "--out", out, *more)
        texts = [out / n for n in ("errors.json", "sla2.json") if (out / n).exists()]
        extra = [out / "sla2.safetensors"] if stage == "tune" else []
        return [path.read_bytes() for path in (out / file, *texts, *extra)]

    start_point = result("default")
    for option, value in changed.items():
        # Lists add up on the command line.
        if option == "keeps":
            command_was = list(command)
            at = command.index("--keeps")
            del command[at : at + 2]
        assert result(option, f"--{option}={value}") != start_point, option
        if option == "keeps":
            command[:] = command_was
    for option in NO_EFFECT[stage]:
        assert result(option, f"--{option}") == start_point, option
    if stage == "tune":
        # A recomputed block adds up the gradients of what blocks share in another order.
        result("recomputed", "--activation-checkpointing")
        ours, theirs = (load_file(tmp_path / name / file) for name in ("recomputed", "default"))
        assert max((ours[k] - theirs[k]).abs().max() for k in ours) < 1e-7
