"""Attention of PyTorch, timed on request: the other end of bench/rivals.cpp.

One JSON object a line in, one out. {"do": "prepare", "id", "name", "pass", "shape", "device",
"threads", and for FlexAttention "blocks" (int32 [B, H, M, L], as a list), "block_q", "block_k"}
answers {"ok": true} or {"reason": "..."}; {"do": "run", "id"} runs it once and answers {"ms": x},
on a GPU by its events, the L2 cache flushed before; {"do": "clear"} frees everything.
"""

import json
import sys
import time

# More than any GPU's second-level cache holds, and as often as hides the time that Python takes to
# start the work.
FLUSH_BYTES, FLUSHES = 256 << 20, 8


def block_mask(torch, request, tokens):
    """SLA2's own routing as FlexAttention's block mask: the sparse branch alone."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, heads = request["shape"][:2]
    block_q, block_k = request["block_q"], request["block_k"]
    rows, columns = -(-tokens // block_q), -(-tokens // block_k)
    blocks = torch.tensor(request["blocks"], dtype=torch.int32, device=request["device"])
    blocks = blocks.reshape(batch, heads, rows, -1)
    count = (blocks >= 0).sum(-1).to(torch.int32)
    indices = torch.nn.functional.pad(blocks.clamp(min=0), (0, columns - blocks.shape[-1]))
    return BlockMask.from_kv_blocks(
        count, indices.contiguous(), BLOCK_SIZE=(block_q, block_k), seq_lengths=(tokens, tokens)
    )


class Case:
    def __init__(self, torch, request):
        self.torch = torch
        self.threads = request["threads"]
        self.flush = None
        if request["device"] != "cpu":
            torch.cuda.set_device(request["device"])
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=request["device"])
        kind, dtype = request["name"].rsplit("_", 1)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.backward = request["pass"] == "backward"
        generator = torch.Generator().manual_seed(1)
        shape = request["shape"]
        self.leaves = [
            torch.randn(shape, generator=generator)
            .to(request["device"], dtype)
            .requires_grad_(self.backward)
            for _ in range(3)
        ]
        self.gradient = torch.randn(shape, generator=generator).to(request["device"], dtype)
        if kind == "torch_sdpa":
            self.attend = torch.nn.functional.scaled_dot_product_attention
        else:
            from torch.nn.attention.flex_attention import flex_attention

            mask = block_mask(torch, request, shape[2])
            compiled = torch.compile(flex_attention)
            self.attend = lambda q, k, v: compiled(q, k, v, block_mask=mask)
            self.run()  # compiles

    def run(self):
        """Milliseconds."""
        self.torch.set_num_threads(self.threads)
        clock = self.on_clock if self.flush is None else self.on_gpu
        if not self.backward:
            with self.torch.no_grad():
                return clock(lambda: self.attend(*self.leaves))
        out = self.attend(*self.leaves)
        return clock(lambda: self.torch.autograd.grad(out, self.leaves, self.gradient))

    def on_clock(self, work):
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    def on_gpu(self, work):
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        for _ in range(FLUSHES):
            self.flush.zero_()
        start.record()
        work()
        end.record()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end)


def answer(torch, state, request):
    if request["do"] == "run":
        return {"ms": state[request["id"]].run()}
    if request["do"] == "clear":
        state.clear()
        torch.compiler.reset()  # else its limit of versions ends in FlexAttention uncompiled
    else:
        state[request["id"]] = Case(torch, request)
    return {"ok": True}


def main():
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing else may write between the answers
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"reason": str(error)}), file=out, flush=True)
        return
    print(json.dumps({"ok": True, "torch": torch.__version__}), file=out, flush=True)
    state = {}
    for line in sys.stdin:
        try:
            reply = answer(torch, state, json.loads(line))
        except Exception as error:  # whatever torch raises is the reason that the table shows
            text = str(error).strip().splitlines() or [type(error).__name__]
            reply = {"reason": text[0][:200]}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
