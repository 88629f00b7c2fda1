"""The top-k router after its projection, in one pass over the logits each way: scores, groups, choice, weights, loads, statistics.

Plain torch makes several T x E matrices of the logits (scores, biased scores, probabilities for the losses, their logarithms) and
keeps some for backward. Here a tile of tokens stays in registers; what leaves is T x K, and sums over tokens: one row per
program, which a second kernel adds up in order, so that results are the same on every run. Backward makes the scores again
from the logits.

With scores c of the chosen experts, shares r = c / sum(c) (or c, not renormalised), upstream g and softmax probabilities p,

    pull_k = r_k (g_k - sum_j r_j g_j)  (or c_k g_k),  times 1 - c_k for sigmoid scores
    dlogits_e = [e is choice k] pull_k - p_e sum_k pull_k + kept p_e (dP_e - <p, dP>) + kept dz 2 lse p_e

where the second term is exactly zero when weights are renormalised, and absent for sigmoids, whose probabilities s_e / sum(s)
get a factor 1 - s_e in the third. dP is the gradient of the summed probabilities, dz that of the sum of lse^2.

Legend: T tokens, E experts, K top-k, P programs.
"""

import triton
import triton.language as tl

TILE = 512  # logits of a tile: 4 per thread
MOST_ROWS = 32  # tokens of a tile, however few experts there are
MOST_PROGRAMS = 1024  # each leaves a row of partial sums; more tokens mean more tiles per program
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every score that can be chosen, above those that cannot
_NONE = tl.constexpr(2**30)


@triton.jit
def _expert_of_column(E, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Expert of each column of a tile, -1 at padding: each group of experts is padded to WIDTH, a power of two."""
    column = tl.arange(0, GROUPS * WIDTH)
    size = E // NUM_GROUPS
    group, place = column // WIDTH, column % WIDTH
    return tl.where((group < NUM_GROUPS) & (place < size), group * size + place, -1)


@triton.jit
def _load_logits(logits_ptr, token, expert, T, E):
    """A tile in fp32; -inf at padded columns, 0 in rows behind the last token."""
    at = logits_ptr + token[:, None] * E + expert[None, :]
    logits = tl.load(at, mask=(token < T)[:, None] & (expert >= 0)[None, :], other=0.0).to(tl.float32)
    return tl.where((expert >= 0)[None, :], logits, float("-inf"))


@triton.jit
def _load_counted(keep_ptr, token, T, MASKED: tl.constexpr):
    """Which rows count in losses and statistics."""
    inside = token < T
    if MASKED:
        inside = inside & (tl.load(keep_ptr + token, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _exps(logits):
    """exp(logits - their row's maximum), the maxima, and the sums."""
    top = tl.max(logits, axis=1)
    exps = tl.exp(logits - top[:, None])
    return exps, top, tl.sum(exps, axis=1)


@triton.jit
def _first(values, best, names):
    """The lowest name in each row among those whose value is ``best``."""
    return tl.min(tl.where(values == best[:, None], names[None, :], _NONE), axis=1)


@triton.jit
def _limit_groups(
    keys, expert, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys with -inf outside each row's best groups."""
    keys_RGW = tl.reshape(keys, (ROWS, GROUPS, WIDTH))
    value = tl.max(keys_RGW, axis=2)
    if SUM_OF_TWO:
        expert_RGW = tl.broadcast_to(tl.reshape(expert, (1, GROUPS, WIDTH)), (ROWS, GROUPS, WIDTH))
        first = tl.min(tl.where(keys_RGW == value[:, :, None], expert_RGW, _NONE), axis=2)
        value += tl.max(tl.where(expert_RGW == first[:, :, None], float("-inf"), keys_RGW), axis=2)
    group = tl.arange(0, GROUPS)
    value = tl.where((group < NUM_GROUPS)[None, :], tl.maximum(value, _LOWEST), float("-inf"))
    kept = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in range(TOP_GROUPS):
        hit = group[None, :] == _first(value, tl.max(value, axis=1), group)[:, None]
        kept = tl.where(hit, 1, kept)
        value = tl.where(hit, float("-inf"), value)
    keys_RGW = tl.where(kept[:, :, None] != 0, keys_RGW, float("-inf"))
    return tl.reshape(keys_RGW, (ROWS, GROUPS * WIDTH))


@triton.jit
def _shares(scores, K: tl.constexpr, CHOICES: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Weights before the scale, from the chosen scores (logits for AFTER), and the sum they were divided by."""
    chosen = (tl.arange(0, CHOICES) < K)[None, :]
    if AFTER:
        exps, _, total = _exps(tl.where(chosen, scores, float("-inf")))
        return exps / total[:, None], total
    scores = tl.where(chosen, scores, 0.0)
    total = tl.sum(scores, axis=1)
    if RENORMALIZE:
        scores = scores / tl.maximum(total, 1e-20)[:, None]
    return scores, total


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, keep_ptr, weights_ptr, ids_ptr, prob_ptr, count_ptr, kept_ptr, sums_ptr,
    T, E, num_tiles, scale,
    K: tl.constexpr, SIGMOID: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Weights and ids (T, K) of ``num_tiles`` tiles, and a row of each partial sum.

    Rows of prob, count and kept are (E,): probabilities of the kept tokens, assignments of all and of the kept ones. A row of
    sums is logsumexp^2, entropy, logit norm and number of the kept tokens.
    """
    program = tl.program_id(0).to(tl.int64)
    expert = _expert_of_column(E, NUM_GROUPS, GROUPS, WIDTH)
    real = (expert >= 0)[None, :]
    choice = tl.arange(0, CHOICES)
    # Whole tiles, since adding rows up would cross warps; once at the end is enough.
    prob_sum = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    count = tl.zeros((ROWS, GROUPS * WIDTH), tl.int32)
    kept_count = tl.zeros((ROWS, GROUPS * WIDTH), tl.int32)
    z_sum = tl.zeros((ROWS,), tl.float32)
    entropy_sum = tl.zeros((ROWS,), tl.float32)
    norm_sum = tl.zeros((ROWS,), tl.float32)
    num_kept = tl.zeros((ROWS,), tl.float32)
    for tile in range(num_tiles):
        token = (program * num_tiles + tile) * ROWS + tl.arange(0, ROWS)
        counted = _load_counted(keep_ptr, token, T, MASKED)
        logits = _load_logits(logits_ptr, token, expert, T, E)
        exps, top, total = _exps(logits)
        probs = exps / total[:, None]
        scores = probs
        if SIGMOID:
            scores = tl.sigmoid(logits)
            probs = scores / tl.maximum(tl.sum(scores, axis=1), 1e-20)[:, None]

        keys = logits
        if BIASED:
            keys = scores + tl.load(bias_ptr + expert, mask=expert >= 0, other=0.0)[None, :]
        keys = tl.where(keys != keys, float("inf"), keys)  # NaN is the largest, as for torch; ids stay valid
        keys = tl.where(real, tl.maximum(keys, _LOWEST), float("-inf"))
        if NUM_GROUPS > 1:
            keys = _limit_groups(keys, expert, NUM_GROUPS, TOP_GROUPS, SUM_OF_TWO, ROWS, GROUPS, WIDTH)
        values = logits if AFTER else scores
        picked = tl.zeros((ROWS, CHOICES), tl.float32)
        ids = tl.zeros((ROWS, CHOICES), tl.int32)
        chosen = tl.zeros((ROWS, GROUPS * WIDTH), tl.int32)
        for k in range(K):
            best = _first(keys, tl.max(keys, axis=1), expert)
            hit = expert[None, :] == best[:, None]
            value = tl.sum(tl.where(hit, values, 0.0), axis=1)
            here = (choice == k)[None, :]
            picked = tl.where(here, value[:, None], picked)
            ids = tl.where(here, best[:, None], ids)
            chosen = tl.where(hit, 1, chosen)
            keys = tl.where(hit, float("-inf"), keys)
        shares, _ = _shares(picked, K, CHOICES, AFTER, RENORMALIZE)
        out = token[:, None] * K + choice[None, :]
        write = (token < T)[:, None] & (choice < K)[None, :]
        tl.store(weights_ptr + out, shares * scale, mask=write)
        tl.store(ids_ptr + out, ids.to(tl.int64), mask=write)

        count += tl.where((token < T)[:, None], chosen, 0)
        if MASKED:
            kept_count += tl.where(counted[:, None], chosen, 0)
        prob_sum += tl.where(counted[:, None], probs, 0.0)
        lse = top + tl.log(total)
        entropy = -tl.sum(probs * tl.log(tl.maximum(probs, 1e-20)), axis=1)
        norm = tl.sqrt(tl.sum(tl.where(real, logits * logits, 0.0), axis=1))
        z_sum += tl.where(counted, lse * lse, 0.0)
        entropy_sum += tl.where(counted, entropy, 0.0)
        norm_sum += tl.where(counted, norm, 0.0)
        num_kept += counted.to(tl.float32)
    row = program * E + expert
    tl.store(prob_ptr + row, tl.sum(prob_sum, axis=0), mask=expert >= 0)
    tl.store(count_ptr + row, tl.sum(count, axis=0), mask=expert >= 0)
    if MASKED:
        tl.store(kept_ptr + row, tl.sum(kept_count, axis=0), mask=expert >= 0)
    tl.store(sums_ptr + program * 4, tl.sum(z_sum))
    tl.store(sums_ptr + program * 4 + 1, tl.sum(entropy_sum))
    tl.store(sums_ptr + program * 4 + 2, tl.sum(norm_sum))
    tl.store(sums_ptr + program * 4 + 3, tl.sum(num_kept))


@triton.jit
def _column_sums(rows_ptr, num_rows, width, column, inside, zeros, BLOCK_P: tl.constexpr):
    """Sums over the rows of some columns, in the type of ``zeros``."""
    total = zeros
    for first in range(0, num_rows, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        at = rows_ptr + row[:, None].to(tl.int64) * width + column[None, :]
        values = tl.load(at, mask=(row < num_rows)[:, None] & inside[None, :], other=0)
        total += tl.sum(values.to(zeros.dtype), axis=0)
    return total


@triton.jit
def reduce_kernel(
    prob_ptr, count_ptr, kept_ptr, sums_ptr, prob_sum_ptr, counts_ptr, kept_counts_ptr, z_ptr, entropy_ptr, norm_ptr,
    num_kept_ptr, P, E,
    MASKED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adds up the programs' rows; program 0 also the four numbers."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    floats, ints = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.int64)
    tl.store(prob_sum_ptr + e, _column_sums(prob_ptr, P, E, e, inside, floats, BLOCK_P), mask=inside)
    counts = _column_sums(count_ptr, P, E, e, inside, ints, BLOCK_P)
    tl.store(counts_ptr + e, counts, mask=inside)
    if MASKED:
        counts = _column_sums(kept_ptr, P, E, e, inside, ints, BLOCK_P)
    tl.store(kept_counts_ptr + e, counts, mask=inside)
    if tl.program_id(0) == 0:
        column = tl.arange(0, 4)
        sums = _column_sums(sums_ptr, P, 4, column, column < 4, tl.zeros((4,), tl.float64), BLOCK_P)
        tl.store(z_ptr, tl.sum(tl.where(column == 0, sums, 0.0)).to(tl.float32))
        tl.store(entropy_ptr, tl.sum(tl.where(column == 1, sums, 0.0)).to(tl.float32))
        tl.store(norm_ptr, tl.sum(tl.where(column == 2, sums, 0.0)).to(tl.float32))
        tl.store(num_kept_ptr, tl.sum(tl.where(column == 3, sums, 0.0)).to(tl.int64))


@triton.jit
def route_backward_kernel(
    dweights_ptr, dprob_ptr, dz_ptr, logits_ptr, keep_ptr, ids_ptr, dlogits_ptr, T, E, scale,
    K: tl.constexpr, SIGMOID: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """dlogits (T, E) of one tile; see the formula in the module's docstring."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = _expert_of_column(E, 1, 1, WIDTH)
    choice = tl.arange(0, CHOICES)
    counted = _load_counted(keep_ptr, token, T, MASKED)[:, None]
    logits = _load_logits(logits_ptr, token, expert, T, E)
    exps, top, total = _exps(logits)
    softmax = exps / total[:, None]

    read = (token < T)[:, None] & (choice < K)[None, :]
    at = token[:, None] * K + choice[None, :]
    ids = tl.load(ids_ptr + at, mask=read, other=0).to(tl.int32)
    grads = tl.load(dweights_ptr + at, mask=read, other=0.0) * scale
    picked = tl.load(logits_ptr + token[:, None] * E + ids, mask=read, other=0.0).to(tl.float32)
    scores = picked
    if SIGMOID:
        scores = tl.sigmoid(picked)
    elif not AFTER:
        scores = tl.exp(picked - top[:, None]) / total[:, None]
    shares, divisor = _shares(scores, K, CHOICES, AFTER, RENORMALIZE)
    pulls = shares * grads
    coupled = tl.sum(pulls, axis=1)  # what the softmax over all experts takes back from each of them
    if AFTER or RENORMALIZE:
        # A divisor at its floor is a constant.
        mean = coupled if AFTER else tl.where(divisor > 1e-20, coupled, 0.0)
        pulls -= shares * mean[:, None]
        coupled -= mean
    if SIGMOID:
        pulls *= tl.sigmoid(-picked)  # 1 - sigmoid without its rounding

    dprobs = tl.load(dprob_ptr + expert, mask=expert >= 0, other=0.0)[None, :]
    if SIGMOID:
        sigmoids = tl.sigmoid(logits)
        sum_of_sigmoids = tl.sum(sigmoids, axis=1)
        probs = sigmoids / tl.maximum(sum_of_sigmoids, 1e-20)[:, None]
        mean = tl.where(sum_of_sigmoids > 1e-20, tl.sum(probs * dprobs, axis=1), 0.0)
        dlogits = tl.where(counted, probs * tl.sigmoid(-logits) * (dprobs - mean[:, None]), 0.0)
    else:
        mean = tl.sum(softmax * dprobs, axis=1)
        dlogits = tl.where(counted, softmax * (dprobs - mean[:, None]), 0.0) - softmax * coupled[:, None]
    lse = (top + tl.log(total))[:, None]
    dlogits += tl.where(counted, tl.load(dz_ptr) * 2 * lse * softmax, 0.0)
    for k in range(K):
        here = (choice == k)[None, :]
        pull = tl.sum(tl.where(here, pulls, 0.0), axis=1)
        own = tl.sum(tl.where(here, ids, 0), axis=1)
        dlogits += tl.where(expert[None, :] == own[:, None], pull[:, None], 0.0)
    at = dlogits_ptr + token[:, None] * E + expert[None, :]
    tl.store(at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=(token < T)[:, None] & (expert >= 0)[None, :])


def blocks(num_experts: int, num_groups: int, top_k: int) -> dict[str, int]:
    """Sizes of a forward tile: padded groups and their padded width, tokens, padded choices; and warps."""
    groups = triton.next_power_of_2(num_groups)
    width = triton.next_power_of_2(num_experts // num_groups)
    columns = groups * width
    return {
        "ROWS": max(min(TILE // columns, MOST_ROWS), 1),
        "GROUPS": groups,
        "WIDTH": width,
        "CHOICES": triton.next_power_of_2(top_k),
        "num_warps": 4 if columns <= 4 * TILE else 8,
    }
