"""Memory and time of policy.token_logprobs against the plain formula, forward and backward, as ratios.

    python bench/logprobs.py         # 1 x 4,096 tokens, vocabulary 151,936, hidden 256: needs 12 GB

Each measurement is a process of its own; both run in turn, so that the machine's noise meets both.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def measure(kind: str, tokens: int, vocabulary: int, hidden_size: int):
    """Prints processor seconds and peak megabytes above what stood before."""
    import torch
    from runtime import policy

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden_size) / hidden_size ** 0.5)
    targets = torch.randint(vocabulary, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()  # of all threads: on a busy machine the clock on the wall says little
    if kind == "plain":
        logp = (hidden @ weight.T).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    else:
        logp, _ = policy.token_logprobs(hidden, weight, None, targets)
    logp.mean().backward()
    print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", choices=("plain", "chunked"), help="measure this one here")
    args = parser.parse_args()
    sizes = [args.tokens, args.vocabulary, args.hidden]
    if args.kind:
        return measure(args.kind, *sizes)
    seconds, megabytes = [], []
    for _ in range(args.repeats):
        figures = {}
        for kind in ("plain", "chunked"):
            command = [sys.executable, __file__, "--kind", kind, "--tokens", str(args.tokens),
                       "--vocabulary", str(args.vocabulary), "--hidden", str(args.hidden)]
            figures[kind] = [float(figure) for figure in subprocess.check_output(command, text=True).split()]
            print(f"{kind}: {figures[kind][0]:.1f} processor seconds, {figures[kind][1]:.0f} MB", flush=True)
        seconds.append(figures["chunked"][0] / figures["plain"][0])
        megabytes.append(figures["chunked"][1] / figures["plain"][1])
    print(f"chunked / plain: time {statistics.median(seconds):.2f} "
          f"({', '.join(f'{s:.2f}' for s in seconds)}), memory {statistics.median(megabytes):.2f}")


if __name__ == "__main__":
    main()
