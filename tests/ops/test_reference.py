"""Quantising, packing and the linear layers' specification; that the kernels agree is told in test_linear.py."""

import pytest
import torch

from bluejay.errors import KernelError
from bluejay.ops import reference

QUANTIZE = {8: reference.quantize_int8, 4: reference.quantize_int4}
LINEAR = {8: reference.linear_int8, 4: reference.linear_int4}
SIGNS = [(1, (0, 10**6)), (-1, (-(10**6), 0))]
LIMITS = {8: (-90, 90), 4: (-8, 7)}


def random(*shape, seed=0, std=1.0):
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(seed))


def packed(weight, bits, group_size=32):
    return reference.pack(*QUANTIZE[bits](weight, group_size), bits=bits, group_size=group_size)


def expanded(integers, scales, group_size):
    return integers.double() * scales.double().repeat_interleave(group_size, 1)[:, : integers.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("N", "K", "group_size"), [(16, 64, 32), (17, 33, 32), (5, 100, 64), (1, 1, 32), (40, 4, 64)])
def test_no_weight_is_further_off_than_half_a_step(N, K, group_size, bits, dtype):
    weight = random(N, K, std=0.02).to(dtype)
    integers, scales = QUANTIZE[bits](weight, group_size)
    assert integers.dtype == torch.int8
    assert integers.shape == (N, K)
    assert scales.dtype == torch.float16
    assert scales.shape == (N, -(-K // group_size))
    low, high = LIMITS[bits]
    assert low <= integers.min() <= integers.max() <= high
    steps = scales.double().abs().repeat_interleave(group_size, 1)[:, :K]
    error = (expanded(integers, scales, group_size) - weight.double()).abs()
    inside = (integers > low) & (integers < high)  # at the ends, 4 bits may cut what 8 bits may not
    assert (error <= 0.5001 * steps)[inside | (bits == 8)].all()


def brute_force(group, bits=4):
    """The least squared error of a group over a fine grid of scales, both signs."""
    largest = group.abs().max()
    scales = (largest / torch.linspace(5, 12, 1401)).double()
    scales = torch.cat((scales, -scales))[:, None]
    rounded = (group.double() / scales).round().clamp(-8, 7) * scales
    return (rounded - group.double()).square().sum(1).min()


def test_the_search_for_4_bits_is_near_the_best_scale_there_is():
    weight = random(64, 32, std=0.02)
    errors = (expanded(*reference.quantize_int4(weight), 32) - weight).square().sum(1)
    best = torch.stack([brute_force(group) for group in weight])
    assert (errors <= 1.10 * best).all()
    assert errors.sum() <= 1.01 * best.sum()


@pytest.mark.parametrize("heavy", [False, True])
def test_the_search_beats_rounding_to_the_nearest(heavy):
    weight = random(256, 512, std=0.02)
    weight = weight**3 if heavy else weight
    groups = weight.view(-1, 32)
    error = (expanded(*reference.quantize_int4(weight), 32) - weight).square().view(-1, 32).sum(1)
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    for scale in (extreme / -8, extreme.abs() / 7):  # GGML's q4_0, and plain symmetric rounding
        scale = scale.half().float()
        nearest = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(1)
        assert (error <= 1.001 * nearest + 1e-12).all()  # float16 scales leave the fit a thousandth
        assert error.sum() < 0.95 * nearest.sum()


def test_plain_values_survive():
    """Zeros, one weight among zeros, and integers times a power of two."""
    for bits, quantize in QUANTIZE.items():
        integers, scales = quantize(torch.zeros(2, 32))
        assert not integers.any()
        assert not scales.any()
        lone = torch.zeros(1, 64)
        lone[0, 40] = 0.25 if bits == 4 else 0.4375
        torch.testing.assert_close(expanded(*quantize(lone), 32), lone.double(), rtol=1e-3, atol=0)
    steps = torch.arange(-8, 8).repeat(4)[None] / 64
    assert torch.equal(expanded(*reference.quantize_int4(steps), 32), steps.double())


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_too_small_for_a_scale_become_zeros(bits):
    integers, scales = QUANTIZE[bits](torch.full((1, 32), 1e-38))
    assert not expanded(integers, scales, 32).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_weight_is_refused(bits, value):
    weight = random(40, 64)
    weight[33, 5] = value
    with pytest.raises(KernelError, match="NaN, infinity or magnitudes"):
        QUANTIZE[bits](weight)


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(4, 32), 16, "group_size is 16"),
        (torch.zeros(4, 32, dtype=torch.int8), 32, "expected floating point"),
        (torch.zeros(4), 32, "expected floating point"),
        (torch.zeros(4, 0), 32, "expected floating point"),
    ],
)
def test_a_wrong_call_is_named(weight, group_size, message):
    with pytest.raises(KernelError, match=message):
        reference.quantize_int8(weight, group_size)


@pytest.mark.parametrize(("N", "K", "group_size"), [(16, 32, 32), (17, 33, 32), (33, 200, 64), (1, 1, 64)])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_layout_is_that_of_the_kernels(N, K, group_size, bits):
    """Byte by byte, as the plan of the layout says it; what fills up stands for zero."""
    integers, scales = QUANTIZE[bits](random(N, K, std=0.02), group_size)
    weight, laid = reference.pack(integers, scales, bits=bits, group_size=group_size)
    num_tiles, padded = -(-N // 16), -(-K // group_size) * group_size
    assert weight.shape == (num_tiles, padded // (4 if bits == 8 else 8), 64)
    assert laid.shape == (num_tiles, padded // group_size, 16)
    assert weight.is_contiguous()
    assert laid.is_contiguous()
    for output in range(num_tiles * 16):
        for k in range(padded):
            if bits == 8:
                value = int(weight[output // 16, k // 4, 4 * (output % 16) + k % 4]) - 90
            else:
                byte = int(weight[output // 16, k // 8, 4 * (output % 16) + k % 4])
                value = (byte >> 4 if k % 8 >= 4 else byte & 15) - 8
            assert value == (int(integers[output, k]) if output < N and k < K else 0)
        for group in range(laid.shape[1]):
            assert laid[output // 16, group, output % 16] == (scales[output, group] if output < N else 0)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_unpack_undoes_pack(bits, group_size):
    integers, scales = QUANTIZE[bits](random(35, 150), group_size)
    weight, laid = reference.pack(integers, scales, bits=bits, group_size=group_size)
    back = reference.unpack(weight, laid, bits=bits, out_features=35, in_features=150)
    assert torch.equal(back[0], integers)
    assert torch.equal(back[1], scales)
    floats = reference.dequantize(weight, laid, bits=bits, out_features=35, in_features=150)
    torch.testing.assert_close(floats.double(), expanded(integers, scales, group_size))


def test_activations_have_127_steps_or_8190_where_there_are_outliers():
    x = random(3, 128)
    x[0, 70] = 60.0
    x[1] = 1.0
    x[2, 1:] *= 1e-3
    for bits in (8, 4):
        integers, scales = reference.quantize_activations(x, bits=bits)
        back = integers * scales.repeat_interleave(32, 1)
        assert ((back - x).abs() <= 0.501 * scales.repeat_interleave(32, 1)).all()
        most = integers.view(3, 4, 32).abs().amax(-1)
        if bits == 4:
            assert (most == 127).all()
            continue
        # Four equal inputs share 180 steps, one alone has all; outliers have as many as two digits hold.
        assert most[0, 2] == 90 * 91
        assert (most[1] == 45).all()
        assert most[2, 0] == 8190
        assert ((most[0] <= 127) | (most[0] == 90 * 91)).all()


def test_four_activations_that_meet_have_room_in_16_bits():
    x = torch.cat([random(200, 96, seed=seed) ** power for seed, power in enumerate((1, 2, 3))])
    integers, _ = reference.quantize_activations(x, bits=8)
    groups = integers.view(-1, 32)
    fours = [groups[:, [8 * i + j for j in four]] for i in range(4) for four in ((0, 1, 4, 5), (2, 3, 6, 7))]
    one_digit = groups.abs().amax(1) < 128
    most = torch.stack([sign * part.clamp(*limits).sum(1) for part in fours for sign, limits in SIGNS]).amax(0)
    assert most[one_digit].max() in (180, 181, 182)
    full = groups.abs().amax(1) == 127  # its largest holds a group back, where its fours do not
    assert ((most >= 178) | full)[one_digit].all()


def test_activations_of_nothing_are_nothing():
    x = torch.zeros(2, 40)
    x[1, :3] = torch.tensor([1e-35, -1e-38, 1e-45])
    for bits in (8, 4):
        integers, scales = reference.quantize_activations(x, bits=bits)
        assert integers.shape == (2, 64)
        assert not integers.any()
        assert not scales.any()


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.013), (4, 0.1)])
@pytest.mark.parametrize(("N", "K"), [(48, 128), (31, 77), (1, 1)])
def test_linear_is_near_the_product_of_floats(N, K, bits, most, group_size):
    weight, x, bias = random(N, K, std=0.02), random(2, 3, K, seed=1), random(N, seed=2)
    found = LINEAR[bits](x, *packed(weight, bits, group_size), bias, out_features=N)
    assert found.shape == (2, 3, N)
    exact = x @ weight.t()
    assert (found - bias - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_is_the_sum_over_groups_of_integer_sums(bits):
    weight, x = random(20, 96), random(3, 96, seed=1) ** 3  # cubes: some groups hold outliers
    tensors = packed(weight, bits)
    integers, scales = reference.unpack(*tensors, bits=bits, out_features=20, in_features=96)
    q, s = reference.quantize_activations(x, bits=bits)
    expected = torch.zeros(3, 20)
    for group in range(3):
        part = slice(32 * group, 32 * group + 32)
        exact = q[:, part].long() @ integers[:, part].long().t()
        expected += exact.float() * (s[:, group, None] * scales[:, group].float())
    found = LINEAR[bits](x, *tensors, None, out_features=20)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_the_others(bits):
    x, tensors = random(5, 200), packed(random(40, 200, seed=1), bits)
    whole = LINEAR[bits](x, *tensors, None, out_features=40)
    for row in range(5):
        alone = LINEAR[bits](x[row : row + 1], *tensors, None, out_features=40)
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-6, atol=1e-6)


def outlier_error(seed):
    """A layer as wide as GPT-J-6B's, with activations 20 times larger in 6 of 4096 inputs."""
    weight, x = random(1024, 4096, seed=seed, std=0.02), random(4, 4096, seed=seed + 1)
    channels = torch.randperm(4096, generator=torch.Generator().manual_seed(seed + 2))[:6]
    x[:, channels] *= 20
    found = reference.linear_int8(x, *packed(weight, 8), None, out_features=1024)
    exact = x.double() @ weight.double().t()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_outliers_cost_8_bits_at_most_a_hundredth(seed):
    assert outlier_error(seed) <= 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].double()}, "x is torch.float64"),
        (lambda a: a | {"x": a["x"][:, :40]}, r"x is .* \[2, 40\]"),
        (lambda a: a | {"weight": a["weight"].to(torch.int32)}, "expected uint8"),
        (lambda a: a | {"weight": a["weight"][:, :5]}, "expected uint8"),
        (lambda a: a | {"scales": a["scales"].float()}, "float16"),
        (lambda a: a | {"scales": a["scales"][:1]}, "expected uint8"),
        (lambda a: a | {"bias": torch.zeros(31)}, "bias is"),
        (lambda a: a | {"out_features": 70}, "out_features is 70"),
    ],
)
def test_what_does_not_fit_together_is_a_kernel_error(change, message):
    weight, scales = packed(random(32, 96), 8)
    arguments = {"x": random(2, 96), "weight": weight, "scales": scales, "bias": None, "out_features": 32}
    with pytest.raises(KernelError, match=message):
        reference.linear_int8(**change(arguments))
