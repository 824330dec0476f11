"""The four-bit file, the command line of quantize.py, and quantized models in eval.py."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import randomized, train_osp

import quantize as Q
from data.dataset import Dataset
from model import Config, Transformer
from nanoosp.files import read_archive, read_text
from nanoosp.recipe import METHODS
from quantize import Recipe, per_column, quantize
from tools import evaluate as evaluate_tool
from tools import export
from tools.evaluate import main as evaluate_main
from tools.loading import Loaded, load
from tools.packed import Int4Linear, pack, packed_model, save_packed, unpack


# Files


@pytest.fixture(scope="module")
def run_dir(dataset_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "osp"
    return train_osp(out, dataset_dir, n_layer=1, n_embd=32, seq_len=16, steps=4)


@pytest.fixture
def four_bit_file(run_dir, tmp_path):
    export.main([str(run_dir), "--method", "had", "--out", str(tmp_path / "four.pt")])
    return tmp_path / "four.pt"


def load_packed(path):
    return packed_model(read_archive(path), path)


def test_the_layout_of_a_file_is_that_of_version_2(four_bit_file):
    state = torch.load(four_bit_file, weights_only=True)
    assert (state["version"], state["packing"]) == (
        2, "code + 8 as a nibble; the low nibble of a byte is the even column")
    assert list(state) == ["packing", "version", "config", "weights", "codes", "quantization",
                           "options", "data"]
    scales = state["quantization"].pop("scales")
    assert state["quantization"] == dict(bits="4-4-4", method="had", symmetric=False,
                                         ffn_hadamard=True)
    name = "blocks.0.ffn.down_proj"
    assert scales[name].shape == (32, 1) and state["codes"][name].dtype == torch.uint8
    assert f"{name}.weight" not in state["weights"] and state["weights"]["embed.weight"].ndim == 2


def test_packing_loses_nothing_and_puts_even_columns_low():
    codes = torch.randint(-8, 8, (6, 10)).float()
    assert torch.equal(unpack(pack(codes)), codes)
    assert pack(torch.tensor([[-8.0, 7.0]])).tolist() == [[0xF0]]
    with pytest.raises(ValueError, match="5"):
        pack(codes[:, :5])


@pytest.mark.parametrize("method, group", [("rtn", 0), ("had", 32), ("gptq", 0), ("spinquant", 0)])
def test_a_loaded_file_has_the_same_logits_bit_for_bit(method, group, trained, tmp_path):
    model, windows = trained
    for bits, dtype in (("4-4-4", torch.float32), ("4-8-16", torch.bfloat16)):
        recipe = Recipe(bits, method, group=group, steps=3)
        q = quantize(copy.deepcopy(model).to(dtype), recipe, windows)
        save_packed(q, tmp_path / "q.pt", {}, {})
        loaded = load_packed(tmp_path / "q.pt")
        assert torch.equal(loaded(windows), q(windows)) and loaded.recipe.bits == bits
        assert all(torch.equal(W, loaded.state_dict()[name]) for name, W in q.state_dict().items())


def test_a_file_has_the_size_of_its_formula(tmp_path):
    model = randomized(Config(n_layer=2, n_head=4, n_embd=256, vocab_size=96))
    save_packed(quantize(model, Recipe("4-4-4")), tmp_path / "q.pt", {}, {})
    D, F, V, L = 256, model.config.n_ffn, 96, 2
    weights, rows = L * (4 * D * D + 3 * D * F), L * (5 * D + 2 * F)
    formula = weights / 2 + 4 * rows + 4 * (2 * V * D + (2 * L + 1) * D)
    assert (tmp_path / "q.pt").stat().st_size == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize("method, doubled", [("rtn", False), ("had", False), ("quarot", True)])
def test_a_tied_matrix_is_stored_once_unless_a_rotation_unties_it(method, doubled, tmp_path):
    """quarot moves the last norm's gain into the head, which is then no longer the embedding."""
    model = randomized(Config(n_layer=1, n_head=2, n_embd=64, vocab_size=3000, tie_embeddings=True))
    tokens = torch.randint(3000, (4, 17))
    q = quantize(model, Recipe("4-4-4", method), tokens)
    save_packed(q, tmp_path / "q.pt", {}, {})
    size, matrix = (tmp_path / "q.pt").stat().st_size, 4 * 3000 * 64
    assert (1 + doubled) * matrix < size < (1.2 + doubled) * matrix
    loaded = load_packed(tmp_path / "q.pt")
    assert torch.equal(loaded(tokens), q(tokens))
    state = read_archive(tmp_path / "q.pt")  # as files were written before: two copies
    state["weights"]["head.weight"] = state["weights"]["head.weight"].clone()
    torch.save(state, tmp_path / "old.pt")
    assert (tmp_path / "old.pt").stat().st_size > 2 * matrix
    assert torch.equal(load_packed(tmp_path / "old.pt")(tokens), q(tokens))


def test_the_size_that_is_printed_is_that_of_the_file_beside_the_target_in_bf16(
        run_dir, tmp_path, capsys):
    path = tmp_path / "q.pt"
    export.main([str(run_dir), "--method", "rtn", "--dtype", "bfloat16", "--out", str(path)])
    state = torch.load(run_dir / "ckpt.pt", weights_only=True)
    n = sum(W.numel() for W in state["model"].values())
    said = f"{path.stat().st_size / (2 * n):.3f} of what the {n:,} weights of osp take in bf16"
    assert said in capsys.readouterr().out


def test_the_command_line_writes_what_quantize_gives(run_dir, dataset_dir, tmp_path, capsys):
    for method in METHODS:
        (tmp_path / "q.pt").unlink(missing_ok=True)
        steps = ["--steps", "3"] if method == "spinquant" else []
        export.main([str(run_dir), "--method", method, *steps, "--out", str(tmp_path / "q.pt")])
        assert f"{method} 4-4-4" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text((dataset_dir.parent / "words.txt").read_text()[:2000])
    fp32 = (tmp_path / "q.pt").stat().st_size
    export.main([str(run_dir), "--calib", str(tmp_path / "text.txt"), "--no-clip", "--w-group", "16",
            "--dtype", "bfloat16", "--out", str(tmp_path / "small.pt")])
    assert load_packed(tmp_path / "small.pt").embed.weight.dtype == torch.bfloat16
    assert (tmp_path / "small.pt").stat().st_size < fp32
    assert load_packed(tmp_path / "small.pt").recipe.method == "gptq"
    assert list(tmp_path.glob("*.tmp")) == []


def test_calibration_comes_from_the_training_split(run_dir, dataset_dir):
    loaded = load(run_dir)
    windows = loaded.calibration(Recipe(method="gptq"))
    data = Dataset(dataset_dir, "train", 16, 0)
    assert torch.equal(windows, torch.from_numpy(data.batch(0, 128)))
    assert loaded.calibration(Recipe(method="rtn")) is None
    assert loaded.calibration(Recipe("16-4-4", "gptq")) is None  # no weight is rounded
    n = min(8 * 101, data.n_windows)
    assert len(loaded.calibration(Recipe(method="spinquant"))) == n  # a batch for every step


@pytest.fixture
def fails(run_dir, tmp_path, capsys):
    """fails(code, words, *argv): quantize.py ends with that exit code and with one line that has
    these words, and it writes no file."""

    def check(code, words, *argv, target=run_dir):
        with pytest.raises(SystemExit) as error:
            export.main([str(a) for a in (target, "--out", tmp_path / "never.pt", *argv)])
        text = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err
        assert (1 if isinstance(error.value.code, str) else error.value.code) == code
        line = text.strip().splitlines()[-1]
        assert all(word in line for word in (*words.split(), "error:")), text
        assert list(tmp_path.glob("never*")) == []

    return check


@pytest.mark.parametrize("bits", ["4-4", "0-4-4", "4-1-4", "4-9-4", "8-8-8", "x"])
def test_bits_that_no_file_can_have_are_exit_code_2(bits, fails):
    fails(2, f"--bits {bits}" if bits == "8-8-8" else bits, "--bits", bits)


def test_bad_options_are_exit_code_2(fails, run_dir, tmp_path):
    fails(2, "--method awq rtn spinquant", "--method", "awq")
    fails(2, "--center-embed quarot", "--center-embed")
    fails(2, "--w-group", "--w-group", "-1")
    fails(2, "--lr", "--lr", "nan")
    fails(2, "--out directory", "--out", tmp_path / "nowhere" / "q.pt")
    fails(2, f"{run_dir} exists", "--out", run_dir / "ckpt.pt")  # never over a trained model
    fails(2, "--calib rtn", "--method", "rtn", "--calib", tmp_path / "text.txt")
    fails(2, "--steps quarot", "--method", "quarot", "--steps", "5")


def test_bad_files_are_exit_code_1(fails, four_bit_file, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    fails(1, "short.txt 9 17", "--calib", tmp_path / "short.txt")
    fails(1, "no checkpoint", target=tmp_path / "nothing")
    fails(1, "quantized", target=four_bit_file)
    fails(1, "groups of 7", "--w-group", "7")
    (tmp_path / "cut.pt").write_bytes(four_bit_file.read_bytes()[:3000])
    fails(1, "cut.pt usable", target=tmp_path / "cut.pt")


@pytest.mark.parametrize("value, options", [
    (math.nan, ["--hf"]), (math.inf, ["--hf"]), (math.nan, ["--method", "rtn", "--out"]),
    (3e38, ["--method", "had", "--out"]),  # finite, but its rotation is not
    (3e38, ["--method", "had", "--format", "mxfp4", "--out"])])
def test_weights_that_are_not_finite_are_never_written(run_dir, tmp_path, value, options):
    state = read_archive(run_dir / "ckpt.pt")
    state["model"]["blocks.0.ffn.down_proj.weight"].fill_(value)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(SystemExit, match="^error: blocks.0.ffn.down_proj.weight holds numbers that "
                                         "are not finite: [^\n]*$"):
        export.main([str(a) for a in (tmp_path / "broken.pt", *options, tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pt"]


def test_a_quantized_file_from_elsewhere_is_refused(four_bit_file, run_dir, tmp_path):
    state, bad = torch.load(four_bit_file, weights_only=True), tmp_path / "bad.pt"
    scales = state["quantization"]["scales"]
    wider = dict(state["config"], n_embd=64)
    negative = {name: -scale for name, scale in scales.items()}

    def otherwise(**changes):
        return dict(quantization=dict(state["quantization"], **changes))

    wrong = [
        (dict(version=3), "version 3.*reads version 2"),
        (otherwise(format="mxfp4"), "version 2"),
        (otherwise(format=["int"]), "version 2"),
        (dict(version=3) | otherwise(format="mxfp4"), "does not fit"),
        (dict(version=3) | otherwise(format="mxfp4", scales={
            name: (torch.zeros(len(scale), 3, dtype=torch.uint8), torch.ones(()))
            for name, scale in scales.items()}), "has 3 scales a row"),
        (dict(version=3) | otherwise(format="mxfp4", scales={
            name: (torch.full((len(scale), 1), 127.5), torch.ones(()))
            for name, scale in scales.items()}), "a scale is no byte"),
        (dict(config=wider), "does not fit"),
        (dict(config=dict(state["config"], n_layer=10**8)), "100000000 layers"),  # at once
        (dict(weights={}), "fit"),
        (dict(config=dict(n_moons=3)), "n_moons"),
        (dict(codes=[]), "not a quantized"),
        (otherwise(ffn_hadamard=None), "contradicts"),
        (otherwise(bits="16-4-4"), "contradicts"),
        (otherwise(method="awq"), "unknown method"),
        (otherwise(symmetric="yes"), "symmetric is 'yes'"),
        (otherwise(scales=negative), "positive"),
        (dict(config=dict(state["config"], norm_eps=-1.0)), "norm_eps"),
        (dict(quantization={}), "does not fit"),
        (dict(codes={}), "does not fit"),
    ]
    for change, words in wrong:
        torch.save(state | change, bad)
        with pytest.raises(ValueError, match=f"bad.pt.*{words}"):
            load_packed(bad)
    torch.save(state | dict(options={}), bad)
    with pytest.raises(ValueError, match="bad.pt does not say data, embproj"):
        load(bad)
    bad.write_bytes(four_bit_file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="usable"):
        load_packed(bad)
    with pytest.raises(ValueError, match="not a quantized"):
        load_packed(run_dir / "ckpt.pt")
    with pytest.raises(ValueError, match="4 bits, not 8"):
        save_packed(quantize(randomized(), Recipe("8-8-8")), tmp_path / "eight.pt", {}, {})
    assert not (tmp_path / "eight.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's int4 kernel is for CUDA")
def test_the_int4_kernel_gives_what_the_dequantized_product_gives():
    codes = torch.randint(-8, 8, (256, 5504), device="cuda").float()
    of_rows = torch.rand(256, 1, device="cuda") + 0.5
    of_groups = of_rows.expand(-1, 43) * torch.rand(43, device="cuda")  # each of 128 weights
    x = torch.randn(3, 5, 5504, device="cuda")
    for scales in (of_rows, of_groups):
        expected = x @ (per_column(scales, 5504) * codes).mT
        assert (Int4Linear(codes, scales)(x) - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's int4 kernel is for CUDA")
def test_packed_weights_write_what_the_simulated_model_writes(tmp_path):
    model = randomized(Config(n_layer=2, n_head=2, n_embd=128, vocab_size=96)).cuda()
    recipe = Recipe("4-16-16", "had")  # fewer bits would amplify the rounding of bf16
    save_packed(quantize(model, recipe), tmp_path / "q.pt", {}, {})
    state = torch.load(tmp_path / "q.pt")
    simulated, packed = (packed_model(state, "", "cuda", int4) for int4 in (False, True))
    tokens = torch.randint(96, (2, 32), device="cuda")
    assert (packed(tokens) - simulated(tokens)).norm() < 0.05 * simulated(tokens).norm()
    assert sum(isinstance(m, Int4Linear) for m in packed.modules()) == 14


def test_the_int4_kernel_is_refused_where_it_cannot_run(four_bit_file, run_dir, capsys):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        evaluated(capsys, four_bit_file, "--prompt", "a", "--int4")
    with pytest.raises(SystemExit, match="not quantized"):
        evaluated(capsys, run_dir, "--prompt", "a", "--int4")
    with pytest.raises(ValueError, match="no 8 x 48"):
        Int4Linear(torch.zeros(8, 48), torch.ones(8, 1))


# eval.py


def evaluated(capsys, *argv):
    evaluate_main([str(a) for a in (*argv, "--device", "cpu")])
    return capsys.readouterr().out


def test_eval_measures_bits_by_method_and_a_file_has_the_loss_of_its_simulation(
        run_dir, tmp_path, capsys):
    argv = run_dir, "--bits", "16-16-16,4-4-4", "--methods", "rtn,gptq"
    row, = json.loads(evaluated(capsys, *argv, "--json"))
    assert list(row["quantized"]) == ["16-16-16", "4-4-4"]
    assert list(row["quantized"]["4-4-4"]) == ["rtn", "gptq"]
    rtn16, gptq4 = row["quantized"]["16-16-16"]["rtn"], row["quantized"]["4-4-4"]["gptq"]
    assert abs(rtn16["added"]) < 1e-5 < abs(gptq4["added"])
    assert gptq4["added"] == pytest.approx(gptq4["val_loss"] - row["val_loss"])
    four = tmp_path / "four.pt"
    export.main([str(run_dir), "--method", "gptq", "--out", str(four), "--device", "cpu"])
    table = evaluated(capsys, *argv).splitlines()[-3:]
    assert table[0].split()[-3:] == ["exact", "16-16-16", "4-4-4"]
    assert table[2].split()[1] == "gptq"
    assert float(table[2].split()[-1]) == pytest.approx(gptq4["added"], abs=6e-5)
    row, = json.loads(evaluated(capsys, four, "--json"))
    assert row["val_loss"] == gptq4["val_loss"] and "quantized" not in row
    assert row["label"] == "OSP, gptq 4-4-4" and row["target"] == "four"
    assert evaluated(capsys, four, "--prompt", "a", "--tokens", 5)
    with pytest.raises(SystemExit, match="already"):
        evaluated(capsys, four, "--bits", "4-4-4")


def test_one_setting_is_a_table_of_methods_by_targets_and_a_sweep_is_drawn(
        run_dir, tmp_path, capsys):
    out = evaluated(capsys, run_dir, run_dir, "--bits", "4-4-4", "--methods", "rtn,had")
    lines = out.splitlines()[-4:]
    assert lines[0].split() == ["loss", "at", "4-4-4", run_dir.name, run_dir.name]
    assert lines[1].startswith("not quantized") and lines[3].startswith("+ had")
    assert len(lines[3].split()) == 6
    out = evaluated(capsys, run_dir, "--sweep", "--methods", "rtn", "--plot", tmp_path)
    assert "3-16-16" in out and "16-4-16" in out
    assert (tmp_path / "bits.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        evaluated(capsys, run_dir, "--sweep", "--bits", "4-4-4")


def test_eval_finds_what_is_wrong_before_it_measures(run_dir, four_bit_file, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(tmp_path / "mark.txt") == "abc"
    calibrated = "--bits", "4-4-4", "--methods", "gptq", "--calib"
    for argv, words in [((run_dir, tmp_path / "none", "--json"), "nothing at"),
                        ((run_dir, *calibrated, tmp_path / "short.txt"), "short.txt"),
                        ((four_bit_file, "--bits", "4-4-4"), "quantized already")]:
        with pytest.raises(SystemExit, match=words):
            evaluated(capsys, *argv)
        assert capsys.readouterr().out == ""
    for argv in (["--calib", "x"], ["--bits", "none", "--methods", "gptq"], ["--symmetric", "--bits", "none"],
                 ["--format", "fp4"], ["--format", "mxfp4", "--bits", "3-4-4"],
                 ["--format", "nvfp4", "--w-group", "16"], ["--prompt", "a", "--symmetric"],
                 ["--prompt", "a", "--bits", "4-4-4"], ["--bits", "4-4-4", "--center-embed"],
                 ["--text", "x", "--seq-len", "2"]):
        with pytest.raises(SystemExit) as error:
            evaluated(capsys, run_dir, *argv)
        assert error.value.code == 2


@pytest.mark.parametrize("name", ["norm.gain", "embed.weight"])
def test_a_model_of_nan_is_reported_and_json_stays_json(name, run_dir, tmp_path, capsys):
    state = torch.load(run_dir / "ckpt.pt", weights_only=True)
    state["model"][name] = torch.full_like(state["model"][name], math.nan)
    torch.save(state, tmp_path / "nan.pt")
    row, = json.loads(evaluated(capsys, tmp_path / "nan.pt", "--json"), parse_constant=pytest.fail)
    assert row["val_loss"] is None
    with pytest.raises(SystemExit, match="not finite"):
        evaluated(capsys, tmp_path / "nan.pt", "--prompt", "a")


def test_eval_refuses_impossible_bits_and_methods(run_dir, capsys):
    for argv in (["--bits", "4-4-4,4-4"], ["--bits", "1-4-4"],
                 ["--bits", "4-4-4", "--methods", "rtn,awq"]):
        with pytest.raises(SystemExit) as error:
            evaluated(capsys, run_dir, *argv)
        line = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and argv[-1].split(",")[-1] in line


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_what_a_sweep_has_measured_is_on_the_screen_when_it_is_interrupted(
        json_too, run_dir, capsys, monkeypatch):
    exactly, losses = evaluate_tool.mean_loss, iter((None, 5.0, 5.25))

    def interrupted_third(*args, **kwargs):
        loss = next(losses, "interrupted")
        if loss == "interrupted":
            raise KeyboardInterrupt
        return exactly(*args, **kwargs) if loss is None else torch.tensor(loss)

    monkeypatch.setattr(evaluate_tool, "mean_loss", interrupted_third)
    with pytest.raises(SystemExit) as error:
        evaluated(capsys, run_dir, "--sweep", "--methods", "rtn", *json_too)
    assert error.value.code == 130
    out, err = capsys.readouterr()
    shown = err if json_too else out
    exact = float(re.search(r"loss +([\d.]+) nats", shown).group(1))
    lines = re.findall(rf"(?m)^{run_dir.name} rtn (\S+): loss (\S+) \((\S+)\)$", shown)
    assert [line[:2] for line in lines] == [("8-16-16", "5.0000"), ("7-16-16", "5.2500")]
    assert float(lines[0][2]) == pytest.approx(5 - exact, abs=2e-4)
    assert out == "" or not json_too


@pytest.mark.parametrize("bits, given, refused", [
    ("16-16-4", dict(format="mxfp4"), None),  # no block is cut: keys and values are integers
    ("4-16-16", dict(format="mxfp4"), "mxfp4's block of 32 does not divide the 44 weights"),
    ("16-4-16", dict(format="mxfp4"), "mxfp4's block of 32 does not divide the 44 weights"),
    ("16-4-4", dict(group=3), None),
    ("4-4-4", dict(group=3), "--w-group 3 does not divide the 44 weights"),
])
def test_widths_are_refused_only_where_something_would_cut_them(bits, given, refused):
    model = Transformer(Config(n_layer=1, n_head=2, n_embd=44, vocab_size=96, n_ffn=100))
    loaded, recipe = Loaded(Path("x"), model, {}, {}, 1), Recipe(bits, **given)
    if refused is None:
        evaluate_tool.calibrate(loaded, [recipe])
        Q.quantize(model, recipe)(torch.zeros(1, 8, dtype=torch.long))
    else:
        with pytest.raises(ValueError, match=refused):
            evaluate_tool.calibrate(loaded, [recipe])
