"""The operator as dense torch code with autograd, from its equations alone: the oracle here.

Everything is computed in `dtype` (double unless a test wants a naive run of the same precision),
token by token, N x N, without low-bit formats. Nothing of the package under test is called.
"""

import math

import torch


def feature_map(name, x):
    if name == "softmax":
        return torch.softmax(x, -1)
    return torch.nn.functional.elu(x) + 1 if name == "elu" else torch.relu(x)


def pooled(x, block):
    """[N, d] -> [blocks, d]: means over the true rows of each block."""
    return torch.stack([part.mean(0) for part in x.split(block)])


def protected_blocks(protected, block_k, length, num_blocks):
    is_protected = torch.zeros(num_blocks, dtype=torch.bool)
    if protected is not None and min(protected[1], length) > protected[0]:
        end = min(protected[1], length)
        is_protected[protected[0] // block_k : (end - 1) // block_k + 1] = True
    return is_protected


def soft_top_k(p, tau, target, is_protected):
    """m [M, T] of Eq. 17, with the exact gradient of the constrained problem.

    lambda is found by bisection without gradient; one Newton step around the root then carries
    d lambda / d p = -g / sum g, which is the implicit function theorem.
    """
    free = ~is_protected
    m = torch.ones_like(p)
    if free.sum() <= target:
        return m
    x = p[:, free] / tau
    with torch.no_grad():
        low, high = -x.amax(1, True) - 60, -x.amin(1, True) + 60
        for _ in range(200):
            middle = (low + high) / 2
            above = torch.sigmoid(x + middle).sum(1, True) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        m0 = torch.sigmoid(x + low)
        slope = (m0 * (1 - m0)).sum(1, True)
    level = low - (torch.sigmoid(x + low).sum(1, True) - target) / slope
    return m.index_put((torch.arange(len(p))[:, None], free.nonzero().T), torch.sigmoid(x + level))


def routing_weights(qh, ks, wq, wk, config, scale, protected, length):
    """m [M, T] of one head (0 and 1 with hard routing), and the scores. q and k get no gradient."""
    qb, kb = pooled(qh.detach(), config.block_q), pooled(ks.detach(), config.block_k)
    scores = (qb @ wq) @ (kb @ wk).T * scale
    num_blocks = scores.shape[1]
    fixed = protected_blocks(protected, config.block_k, length, num_blocks)
    if config.routing == "soft":
        p = scores.softmax(1) if config.score_norm == "softmax" else scores
        target = min(max(config.keep * num_blocks, 1), num_blocks)
        return soft_top_k(p, config.tau, target, fixed), scores
    kept = min(max(math.floor(config.keep * num_blocks + 1e-6), 1), num_blocks)
    order = scores.masked_fill(fixed, -math.inf).argsort(dim=1, descending=True, stable=True)
    m = torch.zeros_like(scores).scatter(1, order[:, : min(kept, int((~fixed).sum()))], 1.0)
    m[:, fixed] = 1.0
    return m, scores


def one_head(qh, kh, vh, wq, wk, alpha, proj_out, config, protected, given):
    """q [Nq, d], k [Nk, d], v [Nk, dv] of one head, cut to its key length."""
    scale = config.scale or 1 / math.sqrt(qh.shape[1])
    ks = kh - kh.mean(0)
    if given is None:
        m, scores = routing_weights(qh, ks, wq, wk, config, scale, protected, len(kh))
    else:
        m, scores = given, None
    rows = torch.arange(len(qh)) // config.block_q
    columns = torch.arange(len(kh)) // config.block_k
    weight = m[rows][:, columns]
    logits = scale * qh @ ks.T + torch.where(
        weight > 0,
        weight.clamp_min(1e-300).log()
        if weight.dtype == torch.float64
        else weight.clamp_min(1e-38).log(),
        -math.inf,
    )
    attended = torch.softmax(logits, 1)
    out_sparse = attended @ vh
    lse = torch.logsumexp(logits, 1)

    rest = torch.ones_like(weight) if config.linear_scope == "all" else 1 - weight
    keys = kh if config.linear_keys == "raw" else ks
    mass = feature_map(config.feature_map, qh) @ feature_map(config.feature_map, keys).T * rest
    total = mass.sum(1, keepdim=True)
    valid = total >= 2.0**-64
    out_linear = torch.where(valid, mass @ vh / torch.where(valid, total, 1), 0)

    complement = ((1 - m).sum(1) > 0)[rows, None]
    if config.method == "sla":
        mixed = out_sparse + out_linear @ proj_out
    else:
        a = torch.sigmoid(alpha)[rows if len(alpha) > 1 else torch.zeros_like(rows), None]
        mixed = a * out_sparse + (1 - a) * out_linear
    out = torch.where(complement, mixed, out_sparse)
    return out, out_sparse, out_linear, lse, m, scores, attended.detach()


def weights_of_blocks(blocks, num_blocks):
    """int32 [..., L] with -1 behind the last -> 0/1 double [..., T]."""
    m = torch.zeros(*blocks.shape[:-1], num_blocks + 1, dtype=torch.float64)
    index = torch.where(blocks < 0, num_blocks, blocks).long()
    return m.scatter(-1, index, 1.0)[..., :num_blocks]


def dense(
    q,
    k,
    v,
    proj_q=None,
    proj_k=None,
    alpha_logit=None,
    *,
    proj_out=None,
    config,
    protected=None,
    key_lengths=None,
    given=None,
    dtype=torch.float64,
):
    """A dict of out, out_sparse, out_linear [B, H, Nq, dv], lse [B, H, Nq] and weights, scores
    (lists over B and H of [M, T]), attended (of [Nq, length]: the sparse branch's softmax).
    `given`: weights [B, H, M, T] instead of the router's."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    batch, heads, q_tokens, d = q.shape
    group = heads // k.shape[1]
    identity = torch.eye(d, dtype=dtype)
    wq = identity if proj_q is None else proj_q.to(dtype)
    wk = identity if proj_k is None else proj_k.to(dtype)
    alpha = torch.zeros(heads, 1, dtype=dtype) if alpha_logit is None else alpha_logit.to(dtype)
    dv = v.shape[3]
    out_proj = torch.zeros(dv, dv, dtype=dtype) if proj_out is None else proj_out.to(dtype)
    results = []
    for b in range(batch):
        n = k.shape[2] if key_lengths is None else int(key_lengths[b])
        for h in range(heads):
            m = None
            if given is not None:
                m = given[b, h, :, : -(-n // config.block_k)].to(dtype)
            results.append(
                one_head(
                    q[b, h],
                    k[b, h // group, :n],
                    v[b, h // group, :n],
                    wq if wq.dim() == 2 else wq[h],
                    wk if wk.dim() == 2 else wk[h],
                    alpha[h],
                    out_proj,
                    config,
                    protected,
                    m,
                )
            )
    names = ("out", "out_sparse", "out_linear", "lse", "weights", "scores", "attended")
    parts = dict(zip(names, zip(*results, strict=True), strict=True))
    for name in names[:4]:
        stacked = torch.stack(parts[name])
        parts[name] = stacked.reshape(batch, heads, *stacked.shape[1:])
    return parts


def cancelled_terms(q, k, v, attended, d_out, scale):
    """Norms of what the sparse branch's gradients of q and k are differences of: the score's
    gradient is p (dP - Ds), and |dP|, |Ds| are at most the products of |dO| and |v|. With one key
    routed, dP = Ds and the exact gradient is zero; its rounding is not."""
    batch, heads, _, d = q.shape
    group = heads // k.shape[1]
    d_q = torch.zeros(q.shape, dtype=torch.float64)
    d_k = torch.zeros(k.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            p = attended[b * heads + h].double()
            n = p.shape[1]
            keys, values = (x[b, h // group, :n].detach().double() for x in (k, v))
            d_p = d_out[b, h].double().abs() @ values.abs().T
            d_scores = p * (d_p + (p * d_p).sum(1, keepdim=True)) * scale
            d_q[b, h] = d_scores @ (keys - keys.mean(0)).abs()
            d_k[b, h // group, :n] += d_scores.T @ q[b, h].detach().double().abs()
    return float(d_q.norm()), float(d_k.norm())
