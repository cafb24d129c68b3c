"""How long cards wait when rollout and update take turns on them: a simulation, which needs no card.

    python bench/idle.py

A card decodes up to --slots responses at once, each at the same rate however many there are: decoding is
bound by reading the weights. A group stays on its card. When the longest response of all has ended, all
cards update together, in a time that falls with their number. Lengths are lognormal and cut at L; half the
variance of their logarithm is the prompt's, half the response's.
"""
import argparse
import heapq
import math
import random
import statistics

PROMPTS, N, L = 128, 8, 3072  # of a step, the defaults for real models
MEDIAN = 800                  # tokens of a response
STEPS = 20


def group(sigma: float, rng: random.Random) -> list[int]:
    """Lengths of the responses to one prompt."""
    part = sigma / math.sqrt(2)
    prompt = math.log(MEDIAN) + rng.gauss(0, part)
    return [min(L, max(1, round(math.exp(prompt + rng.gauss(0, part))))) for _ in range(N)]


def last_end(lengths: list[int], slots: int) -> int:
    """When the last of a card's responses ends, in decode steps; the next begins where a slot is free."""
    ends = [0] * slots
    for length in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


def step(groups: list[list[int]], cards: int, slots: int, update: float) -> tuple[float, float]:
    """(seconds of a step, idle share of its card time), a second being a decode step.

    update: seconds of the update on one card, as a share of the seconds in which all its slots, never empty,
    would sample the step. An empty slot counts as idle.
    """
    hands = [[length for lengths in groups[card::cards] for length in lengths] for card in range(cards)]
    sampling = max(last_end(lengths, slots) for lengths in hands)
    at_work = sum(map(sum, hands)) / slots / cards
    seconds = sampling + update * at_work
    return seconds, (sampling - at_work) / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slots", type=int, default=128, help="responses that a card decodes at once")
    parser.add_argument("--update", type=float, default=1.0, help="its time, in that of sampling at work")
    args = parser.parse_args()
    print("spread (standard deviation of the logarithm of lengths), longest / mean; "
          "then for numbers of cards: idle share of the step, times as fast as one card")
    for sigma in (0.0, 0.3, 0.6, 0.9):
        rng = random.Random(0)
        batches = [[group(sigma, rng) for _ in range(PROMPTS)] for _ in range(STEPS)]
        ratios = [max(map(max, groups)) / statistics.mean(map(statistics.mean, groups)) for groups in batches]
        cells, alone = [], 0.0
        for cards in (1, 2, 4, 8, 16, 64):
            steps = [step(groups, cards, args.slots, args.update) for groups in batches]
            seconds, idle = map(statistics.mean, zip(*steps))
            alone = alone or seconds
            cells.append(f"{cards}: {idle:.2f}, {alone / seconds:.1f}")
        print(f"{sigma:.1f}, {statistics.mean(ratios):.1f}   " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
