"""The program's long jobs and their files: killed, refused, out of disk, every option."""

import json
import re
import resource
import shutil
import signal

import pytest

from program import (
    PROGRAM,
    TINY,
    contents_of,
    done,
    error_of,
    metadata_of,
    pretrain,
    sla2,
    start,
    wait_until,
)

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="the program is not built (make setup)"),
    pytest.mark.usefixtures("ffmpeg"),
]

WAN = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = ["--device", "cpu", "--threads", 2, "--seed", 3]
BLOCKS = ["--block-q", 32, "--block-k", 32]
# 2 layers of 2 heads, 4 x 8 x 8 tokens: 8 query blocks, 8 key blocks.
WIDE = "--layers 2 --heads 2 --height 64 --width 64".split()


def calibrate(clips, model, out, *more):
    arguments = ["--model", model, "--data", clips, "--out", out, "--keeps", "0.5,0.25"]
    return ["calibrate", *arguments, *BLOCKS, *CPU, *more]


def tune(clips, model, weights, out, *more):
    arguments = ["--model", model, "--sla2", weights, "--data", clips, "--out", out]
    return ["tune", *arguments, *CPU, *more]


@pytest.fixture(scope="module")
def wide(clips, tmp_path_factory):
    """A model with several blocks and its SLA2 weights."""
    folder = tmp_path_factory.mktemp("wide")
    model, weights = folder / "model", folder / "sla2"
    result = pretrain(clips, model, *WIDE)
    assert result.returncode == 0, result.stderr
    done(*calibrate(clips, model, weights, "--steps", 4))
    return model, weights


@pytest.mark.parametrize("stage", ["pretrain", "calibrate", "tune"])
def test_kill_and_resume_give_the_same_bits(stage, clips, wide, tmp_path):
    model, weights = wide
    steps = {"pretrain": 100, "calibrate": 200, "tune": 100}[stage]

    def command(out, *more):
        more = ["--steps", steps, "--checkpoint-every", 4, *more]
        if stage == "pretrain":
            return ["pretrain", "--data", clips, "--out", out, *TINY, *WIDE, *more]
        if stage == "calibrate":
            return calibrate(clips, model, out, *more)
        return tune(clips, model, weights, out, *more)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done(*command(whole))
    checkpoint = broken / "checkpoint.safetensors"
    for kill, share in enumerate((0.3, 0.7)):
        process = start(*command(broken, *(["--resume"] if kill else [])))
        wait_until(
            process,
            lambda least=share * steps: (
                checkpoint.exists() and int(metadata_of(checkpoint)["step"]) >= least
            ),
        )
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        assert int(metadata_of(checkpoint)["step"]) < steps
        assert not (broken / "sla2.json").exists() and not (broken / "config.json").exists()
    done(*command(broken, "--resume"))

    def results(folder):
        """All but the temporary that a kill may leave, times and the paths among the options."""
        files = contents_of(folder)
        log = files.pop("losses.jsonl", b"").decode().splitlines()
        files = {
            name: content
            for name, content in files.items()
            if not name.endswith(".tmp") and name != f"{stage}.json"
        }
        return files, [{**json.loads(line), "seconds": 0} for line in log]

    assert results(broken) == results(whole)
    assert len(results(whole)[0]) >= 4


@pytest.mark.parametrize("stage", ["calibrate", "tune"])
def test_interrupt_saves_and_exits_130(stage, clips, wide, tmp_path):
    model, weights = wide
    out = tmp_path / "out"
    more = ["--steps", 10**6, "--checkpoint-every", 5]
    command = {
        "calibrate": calibrate(clips, model, out, *more),
        "tune": tune(clips, model, weights, out, *more),
    }
    process = start(*command[stage])
    wait_until(process, (out / "checkpoint.safetensors").exists)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert int(metadata_of(out / "checkpoint.safetensors")["step"]) > 0


def test_resume_needs_a_checkpoint(clips, wide, tmp_path):
    model, weights = wide
    for command in (calibrate(clips, model, tmp_path), tune(clips, model, weights, tmp_path)):
        assert "checkpoint.safetensors" in error_of(sla2(*command, "--resume", "--steps", 1), 1)
        assert contents_of(tmp_path) == {}


def test_a_refused_resume_changes_nothing(clips, wide, tmp_path):
    model, weights = wide
    stages = [
        calibrate(clips, model, tmp_path / "calibrate", "--steps", 2),
        tune(clips, model, weights, tmp_path / "tune", "--steps", 2),
    ]
    for command in stages:
        done(*command)
        out = tmp_path / command[0]
        before = contents_of(out)
        assert f"{command[0]}.json" in before
        assert "batch" in error_of(sla2(*command, "--resume", "--steps", 4, "--batch", 3), 1)
        assert contents_of(out) == before


def full_after(limit):
    """Writing behind `limit` bytes of a file fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_full_disk_loses_nothing(clips, wide, tmp_path):
    model, weights = (shutil.copytree(f, tmp_path / f.name) for f in wide)
    tuned, video = tmp_path / "tuned", tmp_path / "video" / "v.mp4"
    generate = ["generate", "--model", model, "--prompt", "bars", "--steps", 1, *CPU]
    generate += ["--out", video]
    done(*tune(clips, model, weights, tuned, "--steps", 2))
    done(*generate)
    size = len((model / WEIGHTS).read_bytes())
    resume = ["--resume", "--steps"]
    for command, folder, limit in [
        # Under and over the size of what is written first.
        (["pretrain", "--data", clips, "--out", model, *TINY, *WIDE, *resume, 9], model, 4096),
        (["pretrain", "--data", clips, "--out", model, *TINY, *WIDE, *resume, 9], model, size),
        (calibrate(clips, model, weights, *resume, 9), weights, 2048),
        (tune(clips, model, weights, tuned, *resume, 9), tuned, 4096),
        (generate, video.parent, 256),
    ]:
        before = contents_of(folder)
        error = error_of(sla2(*command, preexec_fn=full_after(limit)), 1)
        assert "cannot write" in error and str(folder) in error
        after = contents_of(folder)
        after.pop("losses.jsonl", None)  # a log: it grows as the steps are done
        before.pop("losses.jsonl", None)
        assert after == before, command
    # What is there still works.
    done(*generate, "--sla2", tuned)


def damage_tensors(source, out, file, change):
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    tensors = load_file(out / file)
    change(tensors)
    save_file(tensors, out / file, {"format": "pt"})


def test_weights_that_do_not_fit_are_named(wide, tmp_path):
    import torch

    model, weights = wide
    some, router = "blocks.1.ffn.net.2.weight", "blocks.1.attn1.proj_k"

    def broken(source, file, change):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        damage_tensors(source, out, file, change)
        return out

    cases = []
    for source, file, name in ((model, WEIGHTS, some), (weights, "sla2.safetensors", router)):

        def damaged(change, source=source, file=file):
            return broken(source, file, change)

        cases += [
            (source, damaged(lambda t, n=name: t.pop(n)), f"1 missing ({name})"),
            (source, damaged(lambda t: t.update(foo=torch.zeros(2))), "1 extra (foo)"),
            (source, damaged(lambda t, n=name: t.update({n: torch.zeros(3, 5)})), f"{name}: Float"),
            (source, damaged(lambda t, n=name: t[n].fill_(float("nan"))), "NaN"),
            (source, damaged(lambda t, n=name: t.update({n: t[n].int()})), "Int"),
        ]
        for size in (0, 7, 100, -3):
            out = shutil.copytree(source, tmp_path / f"cut{size}{file}")
            (out / file).write_bytes((out / file).read_bytes()[:size])
            cases.append((source, out, str(out / file)))
    video = tmp_path / "v.mp4"
    for source, folder, message in cases:
        folders = [model, folder] if source == weights else [folder, weights]
        run = sla2(
            *["generate", "--model", folders[0], "--sla2", folders[1], "--prompt", "bars"],
            *["--steps", 1, "--out", video, *CPU],
        )
        error = error_of(run, 1)
        assert message in error and (message == "NaN" or str(folder) in error), error
        assert not list(tmp_path.glob("v.mp4*"))


@pytest.mark.parametrize(
    ("command", "arguments", "message", "code"),
    [
        ("calibrate", ["--keeps", "0.5,1.5"], "--keeps must be in (0, 1], got 1.5", 2),
        ("calibrate", ["--keeps", "0"], "--keeps must be in (0, 1], got 0", 2),
        ("calibrate", ["--router-lr", "1e999"], "--router-lr must be in (0, 1], got inf", 2),
        ("calibrate", ["--alpha-lr", "nan"], "--alpha-lr must be in (0, 1], got nan", 2),
        (
            "calibrate",
            ["--block-q", "512"],
            "--block-q must be one of 32, 64, 128, 256, got 512",
            2,
        ),
        ("calibrate", ["--block-q", "48"], "--block-q must be one of 32, 64, 128, 256", 2),
        ("calibrate", ["--tile", "4,4"], "--tile must have 3 numbers, got 2", 2),
        ("calibrate", ["--tile", "4,4,0"], "--tile must be in [1, 256], got 0", 2),
        ("calibrate", ["--method", "full"], "--method must be one of sla2, sla", 2),
        ("calibrate", ["--data", "nowhere"], "nowhere", 1),
        ("calibrate", ["--batch", "1.5"], "--batch: must be a whole number", 2),
        ("tune", ["--keep", "0"], "--keep must be in (0, 1], got 0", 2),
        ("tune", ["--lr", "inf"], "--lr must be in (0, 10], got inf", 2),
        ("tune", ["--ema", "1"], "--ema must be in [0, ", 2),
        ("tune", ["--seed", "9223372036854775808"], "--seed: must be a whole number of 64 bits", 2),
        ("tune", ["--sla2", "nowhere"], "nowhere/sla2.json", 1),
        ("tune", ["--threads", "2000"], "--threads must be in [0, 1024]", 2),
        ("evaluate", ["--ablations", "alpha"], "--ablations must be one of", 2),
        ("evaluate", ["--clips", "0"], "--clips must be in [1, 100], got 0", 2),
        ("evaluate", ["--data", "nowhere"], "nowhere", 1),
    ],
)
def test_bad_options_of_the_stages(clips, wide, tmp_path, command, arguments, message, code):
    model, weights = wide
    out = tmp_path / "out"
    given = ["--model", model, "--data", clips, "--out", out, *CPU]
    # The data is opened with the folder proven writable: nothing but the folder is left.
    given += [] if command == "calibrate" else ["--sla2", weights]
    if arguments[0] in ("--data", "--seed"):  # lists add up, so not given twice
        at = given.index(arguments[0])
        del given[at : at + 2]
    assert message in error_of(sla2(command, *given, *arguments), code)
    assert not out.exists() or contents_of(out) == {}


def test_bad_options_of_generate(clips, wide, tmp_path):
    import torch
    from safetensors.torch import save_file

    model, _ = wide
    out, text = tmp_path / "v.mp4", tmp_path / "text.safetensors"
    for arguments, message, code in [
        (["--prompt", "bars", "--text", text], "--prompt and --text exclude each other", 2),
        (["--prompt", "bars", "--from-t", "0.5"], "--from-t needs --frames", 2),
        (["--frames", clips / "bars.mp4", "--from-t", "1"], "--from-t must be in [0.01, 0.99]", 2),
        (["--prompt", "bars", "--guidance", "nan"], "--guidance must be in [0, 100], got nan", 2),
        (["--prompt", "bars", "--shift", "inf"], "--shift must be in (0, 100], got inf", 2),
        (["--frames", clips], "a video must be a regular file", 1),
        (["--text", text], str(text), 1),
    ]:
        result = sla2("generate", "--model", model, "--out", out, "--steps", 1, *CPU, *arguments)
        assert message in error_of(result, code)
    for tensors, message in [
        ({"other": torch.zeros(2, 16)}, 'no tensor "text"'),
        ({"text": torch.zeros(2, 8)}, "text must be floats [L, 16], got Float [2, 8]"),
        ({"text": torch.zeros(0, 16)}, "text must be floats [L, 16], got Float [0, 16]"),
        ({"text": torch.zeros(2, 16).int()}, "text must be floats [L, 16], got Int [2, 16]"),
        ({"text": torch.full((2, 16), float("nan"))}, "text must be finite"),
    ]:
        save_file(tensors, text)
        given = ["--text", text, "--out", out, "--steps", 1, *CPU]
        assert message in error_of(sla2("generate", "--model", model, *given), 1)
    assert [path.name for path in tmp_path.iterdir()] == [text.name]


def test_every_option_of_every_command(clips, tmp_path):
    """Each option that --help names is given once, with a value that is not its default."""
    import torch
    from safetensors.torch import save_file

    out = {name: tmp_path / name for name in ("m", "s", "t", "e", "d", "v.mp4", "b.json")}
    save_file({"text": torch.zeros(2, 16)}, tmp_path / "text.safetensors")
    (tmp_path / "c.json").write_text("{}")
    everywhere = f"--config {tmp_path}/c.json --device cpu --threads 1 --seed 7"
    commands = [
        f"pretrain --data {clips} --exclude noise --out {out['m']} --steps 2 --batch 2 --lr 1e-3"
        " --warmup 1 --final-lr 0.5 --weight-decay 0.1 --clip-norm 2 --ema 0.5 --accumulation 2"
        " --activation-checkpointing --checkpoint-every 1 --log-every 1 --loader-threads 2"
        " --prediction velocity --timesteps uniform --shift 2 --t-min 0.1 --caption-dropout 0.2"
        " --frames 8 --height 32 --width 32 --fps 4 --patch 2,8,8 --layers 1 --heads 2"
        " --head-dim 16 --ffn-dim 32 --text-dim 16 --caption-tokens 2",
        f"pretrain --data {clips} --exclude noise --out {out['m']} --resume --steps 3 --batch 2"
        " --lr 1e-3 --warmup 1 --final-lr 0.5 --weight-decay 0.1 --clip-norm 2 --ema 0.5"
        " --accumulation 2 --prediction velocity --timesteps uniform --shift 2 --t-min 0.1"
        " --caption-dropout 0.2 --frames 8 --height 32 --width 32 --fps 4 --patch 2,8,8 --layers 1"
        " --heads 2 --head-dim 16 --ffn-dim 32 --text-dim 16 --caption-tokens 2",
        f"calibrate --model {out['m']} --data {clips} --out {out['s']} --steps 2 --batch 2"
        " --keeps 0.5,0.25 --schedule turns --router-lr 0.01 --alpha-lr 0.02 --final-lr 0.5"
        " --held-out 1"
        " --checkpoint-every 1 --method sla2 --block-q 32 --block-k 64 --precision bf16"
        " --score-norm softmax --tokens raster --tile 2,2,2 --router head --alpha head",
        f"calibrate --model {out['m']} --data {clips} --out {out['s']} --resume --steps 3 --batch 2"
        " --keeps 0.5,0.25 --schedule turns --router-lr 0.01 --alpha-lr 0.02 --final-lr 0.5"
        " --held-out 1"
        " --block-q 32 --block-k 64 --precision bf16 --score-norm softmax --tokens raster"
        " --tile 2,2,2 --router head --alpha head",
        f"tune --model {out['m']} --sla2 {out['s']} --data {clips}/bars.mp4 --out {out['t']}"
        " --keep 0.5 --steps 2 --batch 2 --lr 1e-3 --final-lr 0.5 --alpha-lr-scale 5"
        " --proj-out-lr-scale 3 --warmup 1"
        " --weight-decay 0.1 --clip-norm 2 --ema 0.9 --accumulation 2 --activation-checkpointing"
        " --checkpoint-every 1",
        f"tune --model {out['m']} --sla2 {out['s']} --data {clips}/bars.mp4 --out {out['t']}"
        " --resume --keep 0.5 --steps 3 --batch 2 --lr 1e-3 --final-lr 0.5 --alpha-lr-scale 5"
        " --proj-out-lr-scale 3 --warmup 1"
        " --weight-decay 0.1 --clip-norm 2 --ema 0.9 --accumulation 2",
        f"generate --model {out['m']} --sla2 {out['t']} --prompt bars --out {out['v.mp4']}"
        f" --steps 2 --guidance 2 --shift 3 --frames {clips}/noise.mp4 --from-t 0.5",
        f"generate --model {out['m']} --text {tmp_path}/text.safetensors --shape 1,2,3"
        f" --out {out['v.mp4']}",
        f"evaluate --model {out['m']} --sla2 {out['t']} --data {clips} --out {out['e']}"
        " --keeps 0.5,0.25 --ablations linear_keys,linear_scope,elu,relu,fp32 --sampling-steps 2"
        " --guidance 2 --shift 3 --clips 1 --samples 2 --repeats 1",
        f"bench model --model {out['m']} --sla2 {out['t']} --repeats 1",
        f"bench op --shape 1,1,256,16 --keep 0.5 --precision bf16 --block-q 32 --block-k 32"
        f" --pass forward --implementation reference --row-seconds 0.01 --minutes 1 --no-rivals"
        f" --repeats 1 --dtype bf16 --layout bhnd,bnhd --json {out['b.json']}",
        f"demo --out {out['d']} --preset small --data {clips}/noise.mp4 --model {out['m']}"
        " --stage1-steps 1 --stage2-steps 1 --lr 1e-3 --sla-lr 1e-3 --sampling-steps 1",
        "info",
    ]
    given = {}
    for command in commands:
        words = command.split()
        name = words[0]
        if name != "info":
            words += everywhere.split()
        result = sla2(*words)
        assert result.returncode == 0, (command, result.stderr)
        given.setdefault(name, {"--help", "--config"}).update(w for w in words if w[:2] == "--")
    assert {"sla2.json", "sla2.safetensors", "transformer/config.json"} <= set(
        contents_of(out["t"])
    )
    assert json.loads((out["e"] / "report.json").read_text())["methods"]
    rows = json.loads((out["b.json"]).read_text())["rows"]
    assert [row["layout"] for row in rows] == ["bhnd", "bnhd"]

    def read(*names):
        return json.loads(tmp_path.joinpath(*names).read_text())

    # What they say is what was done.
    config, card, weights = read("m", WAN), read("m", "model_card.json"), read("s", "sla2.json")
    for key, value in {
        "patch_size": [2, 8, 8],
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ffn_dim": 32,
        "text_dim": 16,
    }.items():
        assert config[key] == value, key
    for key, value in {
        "frames": 8,
        "height": 32,
        "width": 32,
        "fps": 4,
        "prediction": "velocity",
        "shift": 2,
        "captions": ["bars"],
    }.items():
        assert card[key] == value, key
    for key, value in {
        "keep": 0.5,
        "keeps": [0.5, 0.25],
        "block_q": 32,
        "block_k": 64,
        "precision": "bf16",
        "score_norm": "softmax",
        "token_order": "raster",
        "tile": [2, 2, 2],
        "router": "head",
        "alpha": "head",
        "method": "sla2",
    }.items():
        assert weights[key] == value, key
    assert "8 frames" in sla2("info", out["m"]).stdout
    report = read("e", "report.json")
    assert report["settings"]["sampling_steps"] == 2 and report["timing"]["repeats"] == 1
    assert report["settings"]["shift"] == 3 and report["settings"]["guidance"] == 2
    assert {m["keep"] for m in report["methods"]} == {1, 0.5, 0.25} and len(report["clips"]) == 1
    assert {m["note"] for m in report["methods"] if "note" in m} == {
        *("linear_keys", "linear_scope", "elu", "relu", "fp32")
    }
    settings = read("d", "report.json")["settings"]
    assert settings["stage1"]["steps"] == settings["stage2"]["steps"] == 1
    assert settings["sampling_steps"] == 1 and settings["seed"] == 7
    assert settings["stage2"]["lr"] == settings["stage2"]["sla_lr"] == 1e-3
    bench = read("b.json")
    assert bench["options"]["shape"] == [1, 1, 256, 16]
    assert {row["threads"] for row in bench["rows"]} == {1}
    named = re.findall(r"^  ([a-z]+) ", sla2("--help").stdout, re.MULTILINE)
    assert sorted(named) == sorted(given)
    for name in given:
        text = sla2(name, "--help").stdout
        options = set(re.findall(r"^ +(?:-\w,)?(--[a-z0-9-]+)", text, re.MULTILINE))
        assert len(options) > 1 and options <= given[name], name
