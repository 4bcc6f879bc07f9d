"""The program as a user meets it: pretrain, resume, generate, options, errors and exit codes."""

import json
import signal

import pytest

from program import (
    PROGRAM,
    TINY,
    error_of,
    make_media,
    pretrain,
    sla2,
    start,
    wait_until,
)

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="the program is not built (make setup)"),
    pytest.mark.usefixtures("ffmpeg"),
]


def start_pretrain(clips, out, *more, steps):
    return start("pretrain", "--data", clips, "--out", out, "--steps", steps, *TINY, *more)


def wait_for(process, path, lines):
    """Until the log has so many lines."""
    wait_until(process, lambda: path.exists() and len(path.read_text().splitlines()) >= lines)


def result_of(folder):
    names = [
        "diffusion_pytorch_model.safetensors",
        "captions.safetensors",
        "checkpoint.safetensors",
    ]
    return {name: (folder / name).read_bytes() for name in names}


def test_same_seed_gives_the_same_model(clips, model, tmp_path):
    assert pretrain(clips, tmp_path / "m").returncode == 0
    assert result_of(tmp_path / "m") == result_of(model)
    assert pretrain(clips, tmp_path / "n", "--seed", 4).returncode == 0
    assert result_of(tmp_path / "n") != result_of(model)


def test_log_and_effective_config(model):
    log = [json.loads(line) for line in (model / "losses.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(6))
    config = json.loads((model / "pretrain.json").read_text())
    assert config["batch"] == 2 and config["ema"] == 0.999 and config["seed"] == 3


def test_interrupt_saves_and_exits_130(clips, tmp_path):
    process = start_pretrain(clips, tmp_path / "m", "--checkpoint-every", "100000", steps=100000)
    wait_for(process, tmp_path / "m/losses.jsonl", 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume continues" in err
    assert (tmp_path / "m/checkpoint.safetensors").exists()


def test_resume_refuses_other_options_and_missing_checkpoint(clips, model, tmp_path):
    assert "lr must be 0.0003" in error_of(pretrain(clips, model, "--resume", "--lr", 0.1), 1)
    assert "checkpoint.safetensors" in error_of(pretrain(clips, tmp_path / "m", "--resume"), 1)


def test_resume_refuses_another_model(clips, model):
    error = error_of(pretrain(clips, model, "--resume", "--layers", 2), 1)
    assert "layers must be 1" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_stops_with_step_layer_and_checkpoint(clips, tmp_path, value):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    assert pretrain(clips, tmp_path / "m").returncode == 0
    path = tmp_path / "m/checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["model.blocks.0.ffn.net.2.weight"][0, 0] = value
    save_file(tensors, path, metadata)
    before = path.read_bytes()
    error = error_of(pretrain(clips, tmp_path / "m", "--resume", steps=9), 1)
    assert "step 6" in error and "blocks.0" in error and str(path) in error
    assert path.read_bytes() == before


def test_bad_clips_are_named_and_skipped(clips, tmp_path, ffmpeg):
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.mp4").write_bytes((clips / "bars.mp4").read_bytes())
    (data / "empty.mp4").write_bytes(b"")
    (data / "wrong.mp4").write_bytes(b"not a video" * 100)
    (data / "cut.mp4").write_bytes((clips / "bars.mp4").read_bytes()[:600])
    make_media(ffmpeg, ["-f", "lavfi", "-i", "sine=duration=1", data / "sound.mp4"])
    make_media(
        ffmpeg,
        ["-f", "lavfi", "-i", "testsrc=size=32x32:rate=8", "-frames:v", "2", data / "short.mp4"],
    )
    result = pretrain(data, tmp_path / "m", steps=2)
    assert result.returncode == 0, result.stderr
    for name in ("empty", "wrong", "cut", "sound", "short"):
        assert any(
            line.startswith("skipped ") and f"{name}.mp4" in line
            for line in result.stderr.splitlines()
        ), name
    assert json.loads((tmp_path / "m/model_card.json").read_text())["captions"] == ["good"]
    (data / "good.mp4").unlink()
    assert "none of" in error_of(pretrain(data, tmp_path / "n", steps=2), 1)


def test_two_clips_of_one_name_are_refused(clips, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    (again / "bars.mp4").write_bytes((clips / "bars.mp4").read_bytes())
    error = error_of(sla2("pretrain", "--data", clips, again, "--out", tmp_path / "m", *TINY), 1)
    assert str(clips / "bars.mp4") in error and str(again / "bars.mp4") in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be in [1, "),
        (["--batch", "-3"], "--batch must be in [1, "),
        (["--lr", "0"], "--lr must be in (0, 10], got 0"),
        (["--lr", "nan"], "--lr must be in (0, 10], got nan"),
        (["--ema", "1"], "--ema must be in [0, "),
        (["--prediction", "noise"], "--prediction must be one of x, velocity"),
        (["--patch", "1,8"], "--patch must have 3 numbers, got 2"),
        (["--steps", "many"], "--steps"),
        (["--bogus"], "--bogus"),
    ],
)
def test_bad_options_are_usage_errors(clips, tmp_path, arguments, message):
    assert message in error_of(pretrain(clips, tmp_path / "m", *arguments), 2)
    assert not (tmp_path / "m").exists()


def test_config_file(clips, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"steps": 3, "lr": 0.01}))
    assert (
        sla2(
            "pretrain",
            "--data",
            clips,
            "--out",
            tmp_path / "m",
            *TINY,
            "--config",
            file,
            "--lr",
            0.002,
        ).returncode
        == 0
    )
    effective = json.loads((tmp_path / "m/pretrain.json").read_text())
    assert effective["steps"] == 3 and effective["lr"] == 0.002
    for text, message, code in [
        ('{"step": 3}', 'unknown key "step", did you mean "steps"?', 2),
        ('{"steps": "3"}', "steps must be a whole number", 2),
        ('{"steps": 0}', "--steps must be in", 2),
        ("[1]", "must be a JSON object", 2),
        ('{"steps": ', str(file), 2),
    ]:
        file.write_text(text)
        result = sla2("pretrain", "--data", clips, "--out", tmp_path / "n", *TINY, "--config", file)
        assert message in error_of(result, code)


def test_missing_required_and_unknown_command():
    assert "--out is required" in error_of(sla2("pretrain"), 2)
    error_of(sla2("nothing"), 2)
    error_of(sla2(), 2)
    assert sla2("--help").returncode == 0


def test_unwritable_output(clips, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert str(blocker) in error_of(pretrain(clips, blocker / "m"), 1)


def test_device_errors(clips, tmp_path):
    assert "tpu" in error_of(
        sla2("pretrain", "--data", clips, "--out", tmp_path / "m", "--device", "tpu"), 2
    )


def generate(model, out, *more):
    return sla2("generate", "--model", model, "--out", out, "--steps", 2, "--device", "cpu", *more)


def test_generate(clips, model, tmp_path):
    for name, more in {
        "text": ["--prompt", "bars"],
        "guided": ["--prompt", "bars", "--guidance", 2],
        "video": ["--frames", clips / "noise.mp4"],
    }.items():
        out = tmp_path / f"{name}.mp4"
        result = generate(model, out, *more)
        assert result.returncode == 0, result.stderr
        assert out.stat().st_size > 500
        assert (tmp_path / f"{name}.mp4.json").exists()
    again = tmp_path / "again.mp4"
    assert generate(model, again, "--prompt", "bars").returncode == 0
    assert again.read_bytes() == (tmp_path / "text.mp4").read_bytes()


def test_a_terminal_shows_a_bar_from_the_start(model, tmp_path):
    import os
    import pty
    import subprocess

    master, slave = pty.openpty()
    arguments = ["generate", "--model", model, "--prompt", "bars", "--steps", 2, "--device", "cpu"]
    process = subprocess.Popen(
        [PROGRAM, *map(str, arguments), "--out", tmp_path / "x.mp4"],
        stderr=slave,
        stdout=subprocess.DEVNULL,
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # how a terminal ends
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert text.index(" 0/2") < text.index(" 2/2") and "generating" in text
    assert "loading" not in text  # under a second


def test_generate_errors(model, tmp_path):
    out = tmp_path / "x.mp4"
    assert "bars, noise" in error_of(generate(model, out, "--prompt", "nobody"), 2)
    assert "required" in error_of(generate(model, out), 2)
    assert ".mp4" in error_of(generate(model, tmp_path / "x.avi", "--prompt", "bars"), 2)
    assert "config.json" in error_of(generate(tmp_path, out, "--prompt", "bars"), 1)
    assert not out.exists()


def test_info(model):
    machine = sla2("info")
    assert machine.returncode == 0 and "reference" in machine.stdout
    folder = sla2("info", model)
    assert "captions: bars, noise" in folder.stdout and "step 6" in folder.stdout
    error_of(sla2("info", model / "nothing"), 1)


def test_bench(tmp_path):
    shape = ["bench", "op", "--device", "cpu", "--shape", "1,2,256,32"]
    words = [
        "--keep",
        "0.5,1",
        "--repeats",
        2,
        "--row-seconds",
        0.01,
        "--json",
        tmp_path / "b.json",
    ]
    result = sla2(*shape, *words)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    ours = [row for row in report["rows"] if row["name"] == "sla2"]
    threads = {row["threads"] for row in ours}
    # forward int8, bf16, fp32; backward bf16, fp32; two keeps
    assert len(ours) == 10 * len(threads)
    for row in ours:
        assert row["verified"] and 0 < row["ms_q1"] <= row["ms_median"] <= row["ms_q3"]
        assert row["shape"] == [1, 2, 256, 32] and 0 < row["roofline_share"]
        flops = 4 * 2 * 256 * 256 * 32 * (2.5 if row["pass"] == "backward" else 1)
        assert abs(row["effective_tflops"] * row["ms_median"] / (flops * 1e-9) - 1) < 1e-6
    rivals = {row["name"] for row in report["rows"]} - {"sla2"}
    assert {"torch_sdpa_fp32", "torch_sdpa_bf16"} <= rivals
    first = next(row for row in ours if row["threads"] == max(threads))
    sdpa = next(row for row in report["rows"] if row["name"] == "torch_sdpa_fp32")
    assert first["speedup_over"]["torch_sdpa_fp32"] == pytest.approx(
        sdpa["ms_median"] / first["ms_median"]
    )
    for wrong in (
        ["--shape", "1,2"],
        ["--shape", "1,1,64,72"],
        ["--keep", "2"],
        ["--precision", "int7"],
        ["--pass", "sideways"],
        ["--layout", "bhdn"],
        ["--dtype", "fp64"],
        ["--implementation", "cpu_of_next_year"],
        ["--row-seconds", "0"],
    ):
        error_of(sla2("bench", "op", "--device", "cpu", *wrong), 2)
    error_of(sla2("bench", "model"), 2)
