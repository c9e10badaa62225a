"""The specification of every operator, in plain torch, on any device: slow, and the measure of what is fast.

Quantised weights. A group of 32 or 64 weights along the input dim shares one float16 scale: weight = integer * scale.

    bits  integers     stored as       scale
    8     -90 … 90     byte w + 90     largest magnitude / 90
    4     -8 … 7       nibble w + 8    the one with the least squared error of some; may be negative, to use the -8

Packed, the input dim is filled up with zeros to whole groups, the outputs to whole tiles of 16. Of a tile [16, K], the
bytes of 4 inputs of all 16 outputs lie together, as the kernels read them; with 4 bits, 8 inputs of them:

    int8 weight  uint8   [tiles, K/4, 64]    byte b of step j: output b//4, input 4j + b%4
    int4 weight  uint8   [tiles, K/8, 64]    low nibble: output b//4, input 8j + b%4; high nibble: input 4 further
    scales       float16 [tiles, K/group_size, 16]

Floats may be packed too, into tiles of 16 outputs and all their inputs:

    float32 weight  [tiles, K, 16]   the 16 outputs of one input side by side; zeros past the last output

Activations become integers on the fly, with a scale for each row and each 32 inputs. With 8-bit weights it is such
that of four inputs that are summed in 16 bits, which is what makes AVX2 fast, those of one sign add up to 180 at most,
182 when rounded: the weights being unsigned, 180 * 182 = 32,760 is the largest sum that may come about.

Keys and values may be kept as int8, each token's head of K numbers with a scale of its own: number = integer * scale.

    int8 cache   int8    [N, P, H, K + 4]    K integers, -127 … 127, then the scale, a float32 in 4 unaligned bytes
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bluejay.errors import KernelError

GROUP_SIZES = (32, 64)
TILE = 16  # outputs that lie together
ACTIVATION_GROUP = 32  # inputs that share a scale, whatever the weights' group
INPUTS_PER_STEP = {8: 4, 4: 8}  # of one output, in four bytes
WEIGHT_OFFSET = {8: 90, 4: 8}  # what is added to an integer to store it unsigned

# Scales that are tried for a group of 4-bit weights: the weight of the largest magnitude becomes -(this). -8 is GGML's
# q4_0 and 7 plain rounding; between 7 and 9 the squared error of Gaussian weights is 7 % below q4_0's, and a finer or
# wider grid gains less than 0.1 %.
_INT4_PLACES = (7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5, 8.75, 9.0, -6.5, -7.0, -7.5)
_SEARCHED_AT_ONCE = 2**17  # weights: fewer make more calls than work, the copies of more leave the cache
_LEAST = 1e-30  # a group or head of smaller magnitude counts as zeros: its reciprocal or scale would leave float32
_MOST = 127.0  # steps of an activation on each side
_MOST_OF_FOUR = 180.0  # what four that meet may add up to in steps
# A group of activations whose largest is beyond this many root mean squares of its row holds outliers.
_OUTLIER = 6.0  # a gelu reaches 5 in every seventieth group, and a second digit takes its time
_MOST_WIDE = 90.0 * 91.0  # two digits: 91 * high + low, of up to 90 and 45

_KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_KV_SCALE_BYTES = 4  # of an int8 cache


def quantize_int8(weight: Tensor, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Round weights to 8 bits, the nearest ones.

    Shapes (N outputs, K inputs, G groups of K): weight [N, K] floating -> integers [N, K] int8, scales [N, G] float16.
    Raises: KernelError for NaN, infinity, and magnitudes whose scale float16 cannot hold.
    """
    return _quantize(weight, group_size, bits=8)


def quantize_int4(weight: Tensor, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Round weights to 4 bits, with a search for the scale of least squared error.

    For each place that the largest weight may get, the weights are rounded and the scale is fitted to the integers:
    s = sum(w q) / sum(q q), which leaves the error sum(w w) - sum(w q)^2 / sum(q q). The best one's scale is kept.

    Shapes: as `quantize_int8`. Raises: as `quantize_int8`.
    """
    return _quantize(weight, group_size, bits=4)


def _quantize(weight: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    if group_size not in GROUP_SIZES:
        raise KernelError(f"group_size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] == 0:
        raise KernelError(f"weight is {weight.dtype} {list(weight.shape)}, expected floating point [outputs, inputs]")
    N, K = weight.shape
    num_groups = -(-K // group_size)
    integers = torch.empty(N, num_groups * group_size, dtype=torch.int8, device=weight.device)
    scales = torch.empty(N, num_groups, dtype=torch.float16, device=weight.device)
    at_once = max(1, _SEARCHED_AT_ONCE // (num_groups * group_size))
    for first in range(0, N, at_once):
        rows = slice(first, first + at_once)
        padded = F.pad(weight[rows].float(), (0, num_groups * group_size - K))
        # Groups as columns: sums over a group then run over whole vectors of groups.
        columns = padded.view(-1, group_size).t().contiguous()
        found = _round_int8(columns) if bits == 8 else _round_int4(columns)
        integers[rows] = found[0].to(torch.int8).t().reshape(padded.shape)
        scales[rows] = found[1].view(-1, num_groups)
    if not scales.isfinite().all():
        raise KernelError("the weights hold NaN, infinity or magnitudes beyond 500,000; they cannot be quantised")
    return integers[:, :K], scales


def _round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Groups as columns [group_size, n] float32 -> integers, as float32; scales [n] float16."""
    largest = WEIGHT_OFFSET[8]
    scales = (weight.abs().amax(0) / largest).half()
    return _rounded(weight, scales, -largest, largest), scales


def _round_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Groups as columns [group_size, n] float32 -> integers, as float32; scales [n] float16."""
    high, low = weight.amax(0), weight.amin(0)
    extreme = torch.where(high > -low, high, low)
    reciprocal = torch.where(extreme.abs() < _LEAST, 0.0, -1 / extreme)
    integers, products = torch.empty_like(weight), torch.empty_like(weight)
    best = torch.full_like(extreme, -1.0)
    fitted = torch.zeros_like(extreme)
    for place in _INT4_PLACES:
        torch.mul(weight, reciprocal * place, out=integers).round_().clamp_(-8, 7)
        with_weight = torch.mul(weight, integers, out=products).sum(0)
        squares = torch.mul(integers, integers, out=products).sum(0).clamp_(min=1)
        scale = with_weight / squares
        explained = scale * with_weight
        # "not less" lets NaN through, to be found out in the end.
        better = ~(explained <= best)
        best = torch.where(better, explained, best)
        fitted = torch.where(better, scale, fitted)
    scales = fitted.half()
    return _rounded(weight, scales, -8, 7), scales


def _rounded(weight: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """The nearest integers for scales as they are stored; zeros where the scale is 0."""
    scales = scales.float()
    return (weight * torch.where(scales == 0, 0.0, 1 / scales)).round_().clamp_(low, high)


def pack(integers: Tensor, scales: Tensor, *, bits: int, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Lay integers and scales out as the kernels read them; see the module's text.

    Shapes: integers [N, K] int8, scales [N, G] float16
        -> weight [tiles, K'/4 or K'/8, 64] uint8, scales [tiles, G, 16] float16.
    """
    N, K = integers.shape
    num_groups = scales.shape[1]
    rows = -N % TILE
    unsigned = F.pad(integers, (0, num_groups * group_size - K, 0, rows)).add(WEIGHT_OFFSET[bits]).view(torch.uint8)
    # Four bytes that stay together move as one number.
    words = unsigned.view(-1, TILE, num_groups * group_size).view(torch.int32)
    if bits == 4:
        low, high = words.view(*words.shape[:2], -1, 2).unbind(3)
        words = low | (high << 4)
    packed = words.transpose(1, 2).contiguous().view(torch.uint8)
    return packed, F.pad(scales, (0, 0, 0, rows)).view(-1, TILE, num_groups).transpose(1, 2).contiguous()


def unpack(weight: Tensor, scales: Tensor, *, bits: int, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`: integers [out_features, in_features] int8 and scales [out_features, groups] float16."""
    words = weight.view(torch.int32).transpose(1, 2)
    if bits == 4:
        words = torch.stack((words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F), dim=3).flatten(2)
    unsigned = words.contiguous().view(torch.uint8).flatten(0, 1)[:out_features, :in_features]
    integers = unsigned.view(torch.int8).sub(WEIGHT_OFFSET[bits])  # 180 wraps to -76, and back to 90
    return integers, scales.transpose(1, 2).flatten(0, 1)[:out_features]


def dequantize(
    weight: Tensor,
    scales: Tensor,
    *,
    bits: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weights that packed ones stand for, [out_features, in_features]."""
    group_size = group_size_of(weight, scales, bits=bits)
    integers, plain = unpack(weight, scales, bits=bits, out_features=out_features, in_features=in_features)
    spread = plain.to(dtype).repeat_interleave(group_size, dim=1)[:, :in_features]
    return integers.to(dtype) * spread


def group_size_of(weight: Tensor, scales: Tensor, *, bits: int) -> int:
    """How many weights share a scale; packed tensors of any other make are a KernelError."""
    if weight.dim() == scales.dim() == 3 and scales.shape[1]:
        padded_in = INPUTS_PER_STEP[bits] * weight.shape[1]
        size, rest = divmod(padded_in, scales.shape[1])
        right = (weight.shape[0], 64, TILE) == (scales.shape[0], weight.shape[2], scales.shape[2])
        if right and not rest and size in GROUP_SIZES and (weight.dtype, scales.dtype) == (torch.uint8, torch.float16):
            return size
    raise KernelError(
        f"int{bits}: weight is {weight.dtype} {list(weight.shape)} and scales {scales.dtype} {list(scales.shape)}, "
        f"expected uint8 [tiles, inputs/{INPUTS_PER_STEP[bits]}, 64] and float16 [tiles, inputs/32 or /64, 16]"
    )


def quantize_activations(x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Round activations to integers, with a scale for each row and each 32 inputs.

    A group has up to 127 steps on each side. With 8-bit weights, of the inputs 8i + {0, 1, 4, 5} and 8i + {2, 3, 6, 7}
    those of one sign reach 180 steps together, which mostly asks for larger steps (some 105 on each side); a group with
    outliers (the largest beyond 6 root mean squares of its row) has 8190, two digits, so that what lies beside the
    outlier is not lost. A group below 1e-30 is zeros; with 8-bit weights, four inputs that add up to more than float32
    holds make their row NaN.

    Shapes (K inputs, filled up with zeros to whole groups of 32): x [..., K] -> integers [..., K'] int32, scales
        [..., K'/32] float32.
    """
    x = x.float()
    rms = x.double().square().mean(-1, keepdim=True).sqrt().float()
    padded = F.pad(x, (0, -x.shape[-1] % ACTIVATION_GROUP))
    groups = padded.view(*x.shape[:-1], -1, ACTIVATION_GROUP)
    largest = reach = groups.abs().amax(-1)
    steps = torch.full_like(largest, _MOST)
    if bits == 8:
        wide = largest > _OUTLIER * rms
        steps = torch.where(wide, _MOST_WIDE, steps)
        reach = torch.where(wide, largest, torch.maximum(largest, _largest_of_four(groups) * (_MOST / _MOST_OF_FOUR)))
    empty = largest < _LEAST
    factors = torch.where(empty, 0.0, steps / reach)
    integers = (groups * factors.unsqueeze(-1)).round().nan_to_num(0.0).to(torch.int32)
    return integers.flatten(-2), torch.where(empty, 0.0, reach / steps)


def _largest_of_four(groups: Tensor) -> Tensor:
    """The largest sum of one sign over four inputs that meet, [..., 32] -> [...]."""
    parts = torch.stack((groups, -groups), dim=-2).clamp(min=0)
    eights, quads, pairs, inputs = 4, 2, 2, 2
    fours = parts.view(*parts.shape[:-1], eights, quads, pairs, inputs).sum(-1).sum(-2)
    return fours.flatten(-3).amax(-1)


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """Multiply with packed 8-bit weights: x [..., K] float32, bias [N] float32 -> [..., N] float32.

    Each row's result depends on that row alone. Raises: KernelError for shapes and dtypes that do not fit.
    """
    return _linear(x, weight, scales, bias, out_features, bits=8)


def linear_int4(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """Multiply with packed 4-bit weights; see `linear_int8`."""
    return _linear(x, weight, scales, bias, out_features, bits=4)


def _linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, bits: int) -> Tensor:
    group_size = group_size_of(weight, scales, bits=bits)
    K = x.shape[-1]
    padded_in = INPUTS_PER_STEP[bits] * weight.shape[1]
    if x.dtype != torch.float32 or -(-K // group_size) * group_size != padded_in:
        raise KernelError(f"x is {x.dtype} {list(x.shape)}, the weights ask for float32 with {padded_in} inputs")
    if -(-out_features // TILE) != weight.shape[0]:
        raise KernelError(f"out_features is {out_features}, the weights have {weight.shape[0]} tiles of 16")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (out_features,)):
        raise KernelError(f"bias is {bias.dtype} {list(bias.shape)}, expected float32 [{out_features}]")
    integers, x_scales = quantize_activations(x, bits=bits)
    rounded = integers.double() * x_scales.double().repeat_interleave(ACTIVATION_GROUP, dim=-1)
    rounded = rounded[..., :K]
    out = torch.empty(*x.shape[:-1], out_features, device=x.device)
    at_once = 64  # tiles: the weights of a large head, as float64, would fill the memory
    for tile in range(0, weight.shape[0], at_once):
        first, last = tile * TILE, min((tile + at_once) * TILE, out_features)
        part = slice(tile, tile + at_once)
        exact = dequantize(
            weight[part], scales[part], bits=bits, out_features=last - first, in_features=K, dtype=torch.float64
        )
        out[..., first:last] = rounded @ exact.t()
    return out if bias is None else out + bias


def pack_float32(weight: Tensor) -> Tensor:
    """Lay floats out as `linear_float32` reads them: weight [N, K] float32 -> [tiles, K, 16]; see the module's text."""
    N, K = weight.shape
    return F.pad(weight, (0, 0, 0, -N % TILE)).view(-1, TILE, K).transpose(1, 2).contiguous()


def unpack_float32(weight: Tensor, *, out_features: int) -> Tensor:
    """Undo `pack_float32`: [out_features, K]."""
    return weight.transpose(1, 2).flatten(0, 1)[:out_features]


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """Multiply with packed float32 weights: x [..., K] float32, bias [N] float32 -> [..., N] float32.

    Each row's result depends on that row alone. Raises: KernelError for shapes and dtypes that do not fit.
    """
    _check(
        weight.dtype == torch.float32 and weight.dim() == 3 and weight.shape[2] == TILE,
        f"weight is {_described(weight)}, expected float32 [tiles, inputs, {TILE}]",
    )
    _check(
        x.dtype == torch.float32 and x.dim() > 0 and x.shape[-1] == weight.shape[1] > 0,
        f"x is {_described(x)}, the weights ask for float32 with {weight.shape[1]} features",
    )
    _check(
        0 < out_features <= weight.shape[0] * TILE < out_features + TILE,
        f"out_features is {out_features}, the weights have {weight.shape[0]} tiles of {TILE}",
    )
    _check(
        bias is None or (bias.dtype == torch.float32 and bias.shape == (out_features,)),
        f"bias is {bias if bias is None else _described(bias)}, expected float32 [{out_features}]",
    )
    plain = unpack_float32(weight, out_features=out_features)
    # In float64 the order of the sums, which may change with the number of rows, is not seen: all but always.
    out = F.linear(x.double(), plain.double(), None if bias is None else bias.double())
    return out.float()


def kv_width(head_dim: int, dtype: torch.dtype) -> int:
    """The last dim of a cache of keys or values: of int8 it has room for the scale."""
    return head_dim + _KV_SCALE_BYTES if dtype == torch.int8 else head_dim


def quantize_kv(x: Tensor) -> Tensor:
    """Round heads of keys or values to 8 bits, as a cache of int8 keeps them.

    A head's scale is its largest magnitude / 127, its integers are the nearest to x / scale, even ones in the middle. A
    head below 1e-30 is zeros with scale 0; one that holds NaN or infinity is zeros with scale NaN, and reads as NaN.

    Shapes (K head dim): x [..., K] float32 -> [..., K + 4] int8.
    """
    largest = x.abs().amax(-1, keepdim=True)  # NaN if one of them is
    scales = (largest / _MOST).masked_fill(largest < _LEAST, 0.0).masked_fill(~largest.isfinite(), torch.nan)
    integers = torch.where(scales > 0, x / scales, 0.0).round().to(torch.int8)
    return torch.cat((integers, scales.view(torch.int8)), -1)


def dequantize_kv(packed: Tensor) -> Tensor:
    """What `quantize_kv` made stands for: packed [..., K + 4] int8 -> [..., K] float32."""
    # A copy begins where a float32 may.
    scales = packed[..., -_KV_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return packed[..., :-_KV_SCALE_BYTES].float() * scales


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attend each query to the cached keys and values of its own sequence, its own position included.

    The queries of a sequence are its last tokens: query i of n stands at position context_len - n + i and sees the keys
    j <= position, with a window only those with j > position - window. Prompts, chunks of prompts and single tokens
    may stand in one batch.

    Shapes (T tokens this step, S sequences, H heads, K head dim, N blocks, P tokens per block):
        q                 [T, H, K]        float32
        k_cache, v_cache  [N, P, H, K]     float32, float16 or bfloat16; each token's [H, K] is contiguous
                          [N, P, H, K + 4] int8, as `quantize_kv` packs heads; each token's [H, K + 4] is contiguous
        block_tables      [S, max_blocks]  int32, -1 past the end
        context_lens      [S]              int32, tokens, this step included
        query_starts      [S + 1]          int32, sequence s owns the rows query_starts[s] to query_starts[s + 1] of q
    Returns: [T, H, K] float32; the softmax is computed in float32.
    Raises: KernelError if a dtype, a shape or a number does not fit.
    Source: Kwon et al. 2023 (arXiv:2309.06180), section 4.3.
    """
    _check_caches(q, k_cache, v_cache, "q")
    _check_batch(q, k_cache, block_tables, context_lens, query_starts, scale, window)
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for s, length in enumerate(context_lens.tolist()):
        rows = slice(starts[s], starts[s + 1])
        positions = torch.arange(length - (rows.stop - rows.start), length, device=q.device)
        blocks = block_tables[s, : -(-length // k_cache.shape[1])].long()
        keys, values = (_widened(cache[blocks].flatten(0, 1)[:length]) for cache in (k_cache, v_cache))
        visible = torch.arange(length, device=q.device) <= positions[:, None]
        if window is not None:
            visible &= torch.arange(length, device=q.device) > positions[:, None] - window
        scores = torch.einsum("qhk,jhk->hqj", q[rows] * scale, keys).masked_fill(~visible, -torch.inf)
        out[rows] = torch.einsum("hqj,jhk->qhk", scores.softmax(-1), values)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's key and value into its slot of the cache, rounded to the nearest number of the cache's dtype.

    An int8 cache gets what `quantize_kv` makes of them.

    Shapes (T tokens, H heads, K head dim, N blocks, P tokens per block):
        k, v              [T, H, K]     float32
        k_cache, v_cache  [N, P, H, K]  float32, float16 or bfloat16, or int8 [N, P, H, K + 4]; changed in place
        slots             [T]           int64, block * P + offset; -1 skips the token
    Raises: KernelError if a dtype, a shape or a slot does not fit, or two tokens share a slot; nothing is written then.
    """
    _check_caches(k, k_cache, v_cache, "k")
    _check(v.dtype == torch.float32 and v.shape == k.shape, f"v is {_described(v)}, expected k's {_described(k)}")
    _check(
        slots.dtype == torch.int64 and slots.shape == k.shape[:1],
        f"slots is {_described(slots)}, expected int64 [{k.shape[0]}]: one for each token of k",
    )
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    wrong = slots[(slots < -1) | (slots >= num_slots)].tolist()
    _check(not wrong, f"slots holds {wrong[:10]}, expected -1 or 0 to {num_slots - 1}: the cache has {num_slots} slots")
    kept = slots >= 0
    used = slots[kept].sort().values
    twice = used[1:][used.diff() == 0].tolist()
    _check(not twice, f"slots holds {twice[:10]} more than once, expected a slot of its own for each token")
    block, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    for cache, x in ((k_cache, k[kept]), (v_cache, v[kept])):
        cache[block, offset] = quantize_kv(x) if cache.dtype == torch.int8 else x.to(cache.dtype)


def _widened(cache: Tensor) -> Tensor:
    """Keys or values as a cache holds them -> [..., K] float32."""
    return dequantize_kv(cache) if cache.dtype == torch.int8 else cache.float()


def gelu_new_(x: Tensor) -> Tensor:
    """GELU as x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), in place; x is float32 and contiguous.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2; the approximation that GPT-2 was trained with.
    """
    _check(
        x.dtype == torch.float32 and x.is_contiguous(),
        f"x is {_described(x)} with strides {list(x.stride())}, expected float32, contiguous",
    )
    return x.copy_(F.gelu(x, approximate="tanh"))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim; all float32, weight and bias [width].

    Source: Ba et al. 2016 (arXiv:1607.06450), section 3.
    """
    width = weight.shape[-1:]
    _check(
        x.dtype == weight.dtype == bias.dtype == torch.float32 and x.shape[-1:] == weight.shape == bias.shape,
        f"x is {_described(x)}, weight {_described(weight)}, bias {_described(bias)}, expected float32 of one width",
    )
    return F.layer_norm(x, width, weight, bias, eps)


def add_(x: Tensor, y: Tensor) -> Tensor:
    """Add y to x in place; both float32 and contiguous, of one shape."""
    for name, tensor in (("x", x), ("y", y)):
        _check(
            tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape == x.shape,
            f"{name} is {_described(tensor)} with strides {list(tensor.stride())}, expected float32, contiguous, "
            f"{list(x.shape)}",
        )
    return x.add_(y)


def rotate_(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the first dims of each head, in place; dims 2i and 2i+1 are one pair, and pairs are complex numbers.

    Shapes (H heads, K head dim, P pairs): x [..., H, K] float32, contiguous; turns [..., 1, P] complex64, contiguous.
    Source: Su et al. 2021 (arXiv:2104.09864), section 3.4.2.
    """
    check_rotate(x, turns)
    pairs = turns.shape[-1]
    turned = torch.view_as_complex(x[..., : 2 * pairs].contiguous().view(*x.shape[:-1], pairs, 2)) * turns
    x[..., : 2 * pairs] = torch.view_as_real(turned).flatten(-2)
    return x


def check_rotate(x: Tensor, turns: Tensor) -> None:
    """Check what `rotate_` gets. Raises: KernelError."""
    _check(
        x.dtype == torch.float32 and x.dim() >= 2 and x.is_contiguous(),
        f"x is {_described(x)} with strides {list(x.stride())}, expected float32 [..., H, K], contiguous",
    )
    fitting = turns.dim() == x.dim() and turns.shape[:-1] == (*x.shape[:-2], 1) and 2 * turns.shape[-1] <= x.shape[-1]
    _check(
        turns.dtype == torch.complex64 and fitting and turns.is_contiguous(),
        f"turns is {_described(turns)}, expected complex64 [..., 1, pairs], contiguous, for x {_described(x)}",
    )


def read_sum(buffer: Tensor) -> int:
    """Add up the 64-bit words of a buffer, [n] uint8 with n a multiple of 64; beyond 64 bits the sum wraps around."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.shape[0] % 64:
        raise KernelError(f"buffer is {_described(buffer)}, expected uint8 [a multiple of 64]")
    return int(buffer.view(torch.int64).sum().item())


def _check_caches(x: Tensor, k_cache: Tensor, v_cache: Tensor, name: str) -> None:
    """Check this step's tensor and the caches that it meets."""
    _check(x.dtype == torch.float32 and x.dim() == 3, f"{name} is {_described(x)}, expected float32 [T, H, K]")
    _check(min(x.shape[1:]) > 0, f"{name} is {_described(x)}, expected at least one head of at least one dim")
    for cache, its_name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        _check(
            cache.dtype in _KV_DTYPES and cache.dim() == 4 and cache.shape[1] > 0,
            f"{its_name} is {_described(cache)}, expected float32, float16 or bfloat16 [N, P, H, K], "
            "or int8 [N, P, H, K + 4]",
        )
        dims = "head dim + 4" if cache.dtype == torch.int8 else "head dim"
        _check(
            cache.shape[2:] == (x.shape[1], kv_width(x.shape[2], cache.dtype)),
            f"{its_name} is {_described(cache)}, expected heads and {dims} as in {name}, {_described(x)}",
        )
        _check(
            cache[:1, :1].is_contiguous() and all(cache.stride()),
            f"{its_name} has strides {list(cache.stride())}, expected each token's heads and dims to be contiguous",
        )
    _check(
        k_cache.dtype == v_cache.dtype and k_cache.shape == v_cache.shape,
        f"v_cache is {_described(v_cache)}, expected k_cache's {_described(k_cache)}",
    )


def _check_batch(
    q: Tensor,
    k_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Check who owns which queries, and where its keys are."""
    _check(
        block_tables.dtype == torch.int32 and block_tables.dim() == 2,
        f"block_tables is {_described(block_tables)}, expected int32 [S, max_blocks]",
    )
    S = block_tables.shape[0]
    for tensor, name, size in ((context_lens, "context_lens", S), (query_starts, "query_starts", S + 1)):
        _check(
            tensor.dtype == torch.int32 and tensor.shape == (size,),
            f"{name} is {_described(tensor)}, expected int32 [{size}] for the {S} sequences of block_tables",
        )
    _check(abs(scale) < float("inf"), f"scale is {scale}, expected a finite number")
    _check(window is None or window > 0, f"window is {window}, expected None or at least 1")
    counts = query_starts.diff()
    _check(
        query_starts[0].item() == 0 and query_starts[-1].item() == q.shape[0] and bool((counts >= 0).all()),
        f"query_starts is {query_starts.tolist()[:20]}, expected to rise from 0 to the {q.shape[0]} rows of q",
    )
    room = block_tables.shape[1] * k_cache.shape[1]
    wrong = ((context_lens < counts) | (context_lens > room)).nonzero().flatten().tolist()
    _check(
        not wrong,
        f"context_lens of the sequences {wrong[:10]} is {context_lens[wrong[:10]].tolist()}, "
        f"expected at least their queries, {counts[wrong[:10]].tolist()}, at most the {room} slots of a block table",
    )
    places = torch.arange(block_tables.shape[1], device=q.device) * k_cache.shape[1]
    outside = (block_tables < 0) | (block_tables >= k_cache.shape[0])
    wrong = (outside & (places < context_lens[:, None])).any(1).nonzero().flatten().tolist()
    _check(
        not wrong,
        f"block_tables of the sequences {wrong[:10]} name blocks that are not there, "
        f"expected 0 to {k_cache.shape[0] - 1} for as long as the context goes on",
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise KernelError(message)
