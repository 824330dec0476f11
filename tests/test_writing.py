"""tools/writing.py: the same tokens as the simple way."""

import pytest
import torch
from conftest import CONFIGS, randomized

from eval import generate
from quantize import Recipe, quantize
from tools.writing import Writer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_writes_the_same_tokens_also_past_the_window(config, temperature, device):
    model = randomized(config).to(device)
    for prompt, window in (([5], 64), ([1, 2, 3], 24)):
        simple, fast = (list(generate(m, prompt, 60, window, temperature, seed=3))
                        for m in (model, Writer(model, window)))
        assert fast == simple and len(set(simple)) > (5 if temperature else 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_quantized_model_rounds_what_passes_there_too(device):
    model = quantize(randomized(CONFIGS[1]).to(device), Recipe("4-4-4", "had"))
    simple, fast = (list(generate(m, [1, 2, 3], 40, 64, 0)) for m in (model, Writer(model, 64)))
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
