"""Speed of sla2 on a GPU beside torch's flash and cuDNN attention and FlexAttention, in one run.

python bench/gpu_rivals.py [--shape B,H,N,D] [--keep 0.03] [--repeats 10] [--json FILE]

FlexAttention gets SLA2's own routing as its block mask: the sparse branch alone, blocks of
128 x 128, nothing of the router, the linear branch or the mix. Times by CUDA events, bf16, the L2
cache flushed before every run.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FLUSH_BYTES = 256 << 20


def clock(work, repeats, flush, prepare=None):
    samples = []
    for run in range(repeats + 2):
        argument = prepare() if prepare else None
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work(argument) if prepare else work()
        end.record()
        torch.cuda.synchronize()
        if run >= 2:
            samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def measure(name, attend, tensors, gradient, repeats, flush):
    """Milliseconds forward and backward, or why not."""
    try:
        with torch.no_grad():
            forward = clock(lambda: attend(*tensors), repeats, flush)
        leaves = [t.clone().requires_grad_(True) for t in tensors]
        backward = clock(
            lambda out: torch.autograd.grad(out, leaves, gradient),
            repeats,
            flush,
            prepare=lambda: attend(*leaves),
        )
    except (RuntimeError, ImportError, ValueError) as error:
        return {"name": name, "error": str(error).splitlines()[0][:200]}
    return {"name": name, "forward_ms": forward, "backward_ms": backward}


def routed_mask(q, k, keep):
    """SLA2's routing with 128 x 128 blocks, as FlexAttention's block mask."""
    from torch.nn.attention.flex_attention import BlockMask

    import sla2

    config = sla2.Config(keep=keep, block_q=128, block_k=128)
    blocks = sla2.route(q, k, config=config).blocks
    count = (blocks >= 0).sum(-1).to(torch.int32)
    columns = -(-k.shape[2] // 128)
    indices = F.pad(blocks.clamp(min=0), (0, columns - blocks.shape[-1])).contiguous()
    return BlockMask.from_kv_blocks(
        count, indices, BLOCK_SIZE=128, seq_lengths=(q.shape[2], k.shape[2])
    )


def attentions(q, k, keep):
    def sdpa(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    yield "torch flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION)
    yield "torch cudnn", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)

    def flex():
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention)
        mask = routed_mask(q, k, keep)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    yield "FlexAttention, sparse part", flex

    def ours(precision):
        import sla2

        config = sla2.Config(keep=keep, precision=precision)
        return lambda q, k, v: sla2.attention(q, k, v, config=config)

    for precision in ("int8", "fp8", "bf16"):
        yield f"sla2 {precision}", lambda precision=precision: ours(precision)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1,12,32760,128")
    parser.add_argument("--keep", type=float, default=0.03)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_rivals needs a GPU that torch can use, found none")
    shape = [int(x) for x in arguments.shape.split(",")]
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    rows = []
    for name, make in attentions(q, k, arguments.keep):
        try:
            attend = make()
        except (RuntimeError, ImportError, ValueError) as error:
            rows.append({"name": name, "error": str(error).splitlines()[0][:200]})
        else:
            rows.append(measure(name, attend, (q, k, v), gradient, arguments.repeats, flush))
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": shape,
        "keep": arguments.keep,
        "rows": rows,
    }
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
