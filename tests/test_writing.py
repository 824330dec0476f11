"""tools/writing.py: the same tokens as the simple way."""

import pytest
import torch
from conftest import CONFIGS, randomized

import quantize
import train
from tools import evaluate, export
from tools.writing import Writer, generate, pace

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_writes_the_same_tokens_also_past_the_window(config, temperature, device):
    model = randomized(config).to(device)
    for prompt, window in (([5], 64), ([1, 2, 3], 24)):
        simple, fast = (list(generate(m, prompt, 60, window, seed=3, temperature=temperature))
                        for m in (model, Writer(model, window)))
        assert fast == simple and len(set(simple)) > (5 if temperature else 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_quantized_model_rounds_what_passes_there_too(device):
    model = quantize.quantize(randomized(CONFIGS[1]).to(device), quantize.Recipe("4-4-4", "had"))
    simple, fast = (list(generate(m, [1, 2, 3], 40, 64, temperature=0)) for m in (model, Writer(model, 64)))
    assert fast == simple


@pytest.mark.parametrize("device", DEVICES)
def test_logits_agree_step_by_step(device):
    model = randomized(CONFIGS[1]).to(device)
    writer, tokens = Writer(model, 32), torch.randint(96, (1, 20), device=device)
    simple, fast = model.new_cache(), writer.new_cache()
    with torch.no_grad():
        for part in tokens.split([7, *[1] * 13], dim=1):
            expected = model(part, cache=simple)[:, -1]
            torch.testing.assert_close(writer(part, fast)[:, -1], expected, rtol=1e-4, atol=1e-4)


def test_the_pace_names_the_two_slow_tokens_and_averages_the_rest():
    assert pace([0, 1, 4, 4.5, 5]) == "the first after 1.00 s, the second after 4.00 s, the rest at 2.0 tokens/s"
    assert pace([0, 0.5]) == "the first after 0.50 s"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_eval_writes_on_cuda_what_it_writes_on_a_cpu(tmp_path, small_run, capsys):
    train.main([*small_run, "--osp", "--steps", "4", "--out", str(tmp_path / "run")])
    export.main([str(tmp_path / "run"), "--bits", "4-4-4", "--out", str(tmp_path / "4.pt"), "--device", "cpu"])
    for target in ("run", "4.pt"):
        texts = []
        for device in (["cpu"], ["cuda"], ["cuda", "--compile"]):
            capsys.readouterr()
            evaluate.main([str(tmp_path / target), "--prompt", "the ", "--tokens", "30", "--temperature", "0",
                             "--dtype", "float32", "--device", *device])
            out, err = capsys.readouterr()
            texts.append(out)
            assert "30 tokens: the first after" in err
        assert texts[0] == texts[1] == texts[2]
