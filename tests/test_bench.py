"""What --bench measures, and that it leaves nothing behind."""

import json

import pytest
import torch

import train
from tools.bench import RandomTokens, flops_per_token, kind, report, where_time_goes
from model import PRESETS, Config, Transformer


def test_flops_of_the_paper_model_are_the_sum_of_its_products():
    with torch.device("meta"):
        model = Transformer(Config(**PRESETS["1.4b"], norm="ss", embproj=True))
    layer = 4 * 2048**2 + 3 * 2048 * 5504  # q, k, v, o; gate, up, down
    matrices = 24 * layer + 2 * 2048**2 + 2048 * 49152  # EmbProj twice, and the head; the embedding is a look-up
    scores_and_values = 24 * 16 * 2048 * (2 * 128 + 2 * 128) / 2  # half of the 2048 keys, on average
    assert flops_per_token(model, 2048) == 3 * (2 * matrices + scores_and_values)


def test_bench_measures_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    shape = "--preset tiny --n-layer 1 --n-embd 32 --seq-len 16 --batch-size 4 --device cpu --steps 3".split()
    train.main([*shape, "--osp", "--bench", "--data", "random", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["step_ms"] == pytest.approx(result["forward_backward_ms"] + result["optimizer_ms"])
    assert result["tokens_per_s"] == pytest.approx(4 * 16 / result["step_ms"] * 1e3)
    assert 0 < result["optimizer_ms"] < result["step_ms"] and result["peak_memory_gib"] > 0
    assert not any("mfu" in key for key in result)  # the peak of a CPU is not known
    train.main([*shape, "--bench"])
    assert "tokens/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_kernels_are_told_apart_by_their_names():
    names = {  # as torch 2.11 has them on an H100
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128": "attention",
        "triton_red_fused__log_softmax__to_copy__unsafe_view_prepare_softmax_online_view_3": "loss",
        "triton_poi_fused__unsafe_view_mul_silu_silu_backward_view_1": "SwiGLU",
        "triton_red_fused__fused_rms_norm__to_copy__unsafe_view_add_mul_4": "norms and residual stream",
        "triton_poi_fused__unsafe_view_add_7": "norms and residual stream",
        "triton_poi_fused__to_copy_add_cat_mul_neg_slice_3": "RoPE and layout of heads",
        "triton_poi_fused_clone_transpose_3": "RoPE and layout of heads",
        "triton_poi_fused__to_copy_t_5": "weight casts, sums of gradients",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, 3>":
            "weight casts, sums of gradients",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "sums over GPUs",
        "void at::native::sum_and_scatter<float, long>(long const*, float*, long)": "other",
        "Memset (Device)": "other",
    }
    assert {name: kind(name) for name in names} == names
    shown = report(dict(tokens_per_s=1, tokens_per_step=1, ranks=1, step_ms=2, forward_backward_ms=1, optimizer_ms=1,
                        first_step_s=1, peak_memory_gib=1, model_tflops=1,
                        forward_backward_shares={"attention": 0.75, "other": 0.25}))
    assert "attention 75.0%" in shown and "other 25.0%" in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="shares are a GPU's")
def test_the_shares_of_kernels_add_up_to_one():
    a = torch.randn(512, 512, device="cuda")
    shares = where_time_goes(lambda: torch.softmax(a @ a, dim=0))
    assert sum(shares.values()) == pytest.approx(1) and shares["matrix products"] > 0 and shares["loss"] > 0


def test_random_tokens_are_shared_among_ranks_and_depend_on_the_step():
    data = RandomTokens(50, seq_len=8)
    a, again, b, later = (data.batch(step, 6, rank, 2).tolist() for step, rank in [(0, 0), (0, 0), (0, 1), (1, 0)])
    assert a == again and a != b and a != later
    assert len(a) == 3 and len(a[0]) == 9 and 0 <= min(map(min, a)) and max(map(max, a)) < 50
