"""Wan's own kind of model, without a card: stored latents and text through the program."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from program import PROGRAM, WAN, done, error_of, page_of, sla2

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="the program is not built (make setup)")

SHAPE = (4, 16, 24)  # of the latents; 4 x 8 x 12 tokens
CPU = ["--device", "cpu", "--threads", 1, "--seed", 3]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A small random model as diffusers saves it, and a folder of latents."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(5)
    diffusers.WanTransformer3DModel(**WAN).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for i in range(3):
        sample = {"latents": torch.randn(4, *SHAPE), "text": torch.randn(5, 20)}
        save_file(sample, folder / "data" / f"{i}.safetensors")
    text = {"text": torch.randn(5, 20), "negative_text": torch.randn(5, 20)}
    save_file(text, folder / "text.safetensors")
    return folder


def generate(wan, out, *more):
    return sla2(
        *["generate", "--text", wan / "text.safetensors", "--steps", 2, "--out", out, *CPU],
        *more,
    )


def test_both_stages_and_a_sample_of_latents(wan, tmp_path):
    model, data = ["--model", wan / "model"], ["--data", wan / "data"]
    weights, tuned, out = tmp_path / "sla2", tmp_path / "tuned", tmp_path / "x.safetensors"
    blocks = ["--block-q", 32, "--block-k", 32]
    done("calibrate", *model, *data, "--out", weights, "--keeps", 0.5, "--steps", 2, *blocks, *CPU)
    assert json.loads((weights / "sla2.json").read_text())["grid"] == [4, 8, 12]
    alpha = load_file(weights / "sla2.safetensors")["blocks.0.attn1.alpha_logit"]
    assert list(alpha.shape) == [2, 4 * 8 * 12 // 32]
    done("tune", *model, *data, "--sla2", weights, "--out", tuned, "--steps", 2, *CPU)
    assert not (tuned / "transformer" / "model_card.json").exists()

    samples = {}
    for name, more in {
        "full": model,
        "sla2": [*model, "--sla2", weights],
        "tuned": ["--sla2", tuned],
        "guided": [*model, "--guidance", 3, "--shift", 3],
    }.items():
        result = generate(wan, out, "--shape", "4,16,24", *more)
        assert result.returncode == 0, result.stderr
        samples[name] = load_file(out)
        assert samples[name]["latents"].shape == (4, *SHAPE)
        assert samples[name]["latents"].isfinite().all()
    for name in ("sla2", "tuned", "guided"):
        assert not torch.equal(samples[name]["latents"], samples["full"]["latents"])
    # Not clamped to the range of pixels, and of the form that training reads.
    assert samples["full"]["latents"].abs().max() > 1
    made = tmp_path / "made"
    made.mkdir()
    save_file(samples["full"], made / "0.safetensors")
    done(
        "tune",
        *model,
        "--data",
        made,
        "--sla2",
        weights,
        "--out",
        tmp_path / "t",
        "--steps",
        1,
        *CPU,
    )


def test_evaluate_compares_latents(wan, tmp_path):
    model, data = ["--model", wan / "model"], ["--data", wan / "data"]
    weights, out = tmp_path / "sla2", tmp_path / "out"
    blocks = ["--block-q", 32, "--block-k", 32]
    done("calibrate", *model, *data, "--out", weights, "--keeps", 0.5, "--steps", 2, *blocks, *CPU)
    command = ["evaluate", *model, *data, "--sla2", weights, "--out", out, "--keeps", "1,0.5,0.25"]
    command += ["--sampling-steps", 2, "--clips", 2, "--samples", 2, "--repeats", 1, *CPU]
    done(*command, "--ablations", "relu,fp32", "--shift", 3)
    report = json.loads((out / "report.json").read_text())
    assert report["mode"] == "latents" and report["sheet"] is None
    assert report["model"]["grid"] == [4, 8, 12] and report["model"]["tokens"] == 384
    assert [clip["name"] for clip in report["clips"]] == ["0", "1"]
    assert all(clip["videos"] == [] for clip in report["clips"])
    assert not list(out.rglob("*.mp4"))
    shown = page_of(out / "report.html")
    assert {"videos", "routing"} <= set(shown["removed"])
    assert "Whole latents" in shown["methods"] and "range of full attention" in shown["table-lead"]
    assert "of 32,760" in shown["length-plot"] and "NaN" not in json.dumps(shown)

    full, *others = report["methods"]
    assert full["method"] == "full" and full["psnr_to_full_db"] is None and len(others) == 8
    samples = {
        path.stem: {k: v.double() for k, v in load_file(path).items()}
        for path in (out / "samples").glob("*.safetensors")
    }

    def psnr(value, reference):
        peak = float(reference.max() - reference.min())
        return min(99.0, float(10 * torch.log10(peak**2 / (value - reference).square().mean())))

    for value in samples["full"].values():
        assert value.shape[-4:] == (4, *SHAPE)

    for row in others:
        assert row["val_loss"] > 0 and row["videos"] == 2
        assert (row["step_ms"] is None) == ("note" in row)
        name = f"sla2_{row['stage']}_{100 * row['keep']:g}"
        name = f"sla2_{row['note']}" if "note" in row else name
        ours = [
            psnr(samples[name][key], samples["full"][key]) for key in ("video.0.0", "video.0.1")
        ]
        assert row["psnr_to_full_db"] == pytest.approx(sum(ours) / 2, abs=1e-3)
    by_keep = {row["keep"]: row for row in others if row["stage"] == "calibrated"}
    assert by_keep[1]["psnr_denoised_db"] > by_keep[0.25]["psnr_denoised_db"]
    # The sample of full attention is the one that generate makes.
    text = load_file(wan / "data" / "0.safetensors")["text"]
    save_file({"text": text}, tmp_path / "text.safetensors")
    made = tmp_path / "x.safetensors"
    generate = ["generate", *model, "--text", tmp_path / "text.safetensors", "--out", made]
    generate += ["--shape", "4,16,24", "--steps", 2, "--shift", 3, *CPU]
    done(*generate, "--seed", 4)  # evaluate's next one
    assert torch.equal(load_file(made)["latents"].double(), samples["full"]["video.0.0"])

    done(*command, "--ablations", "relu,fp32", "--shift", 3)  # from the saved samples
    again = json.loads((out / "report.json").read_text())["methods"]
    assert [{**row, "step_ms": 0} for row in again] == [
        {**row, "step_ms": 0} for row in report["methods"]
    ]
    error = error_of(sla2(*command, "--guidance", 2), 2)
    assert "--guidance must be 1 for a model of latents" in error


def test_what_latents_need_is_named(wan, clips, tmp_path):
    out, model = tmp_path / "x.safetensors", ["--model", wan / "model"]
    shape = ["--shape", "4,16,24"]
    for result, message, code in [
        (generate(wan, tmp_path / "x.mp4", *model, *shape), "--out must end in .safetensors", 2),
        (generate(wan, out, *model), "--shape must be 3 numbers", 2),
        (generate(wan, out, *model, "--shape", "4,16"), "--shape must be 3 numbers", 2),
        (
            generate(wan, out, *model, "--shape", "4,15,24"),
            "--shape: height must be a multiple of 2",
            2,
        ),
        (sla2("generate", *model, *shape, "--prompt", "a", "--out", out, *CPU), "--text", 2),
        (
            sla2("calibrate", *model, "--data", clips, "--out", tmp_path / "s", *CPU),
            "--data must be folders of latents",
            1,
        ),
    ]:
        assert message in error_of(result, code)
    assert not out.exists()
    only = {"text": torch.randn(5, 20)}
    save_file(only, tmp_path / "only.safetensors")
    arguments = ["--text", tmp_path / "only.safetensors", "--out", out, *shape, *model, *CPU]
    error = error_of(sla2("generate", *arguments, "--guidance", 2), 2)
    assert "negative_text" in error


def test_latents_of_other_channels_are_refused(wan, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    save_file(
        {"latents": torch.randn(3, *SHAPE), "text": torch.randn(5, 20)}, data / "0.safetensors"
    )
    result = sla2(
        "calibrate", "--model", wan / "model", "--data", data, "--out", tmp_path / "s", *CPU
    )
    assert "--data must be latents of the model's 4 channels, got 3" in error_of(result, 1)
