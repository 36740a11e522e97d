"""What a short LoRA run on real weights should give, and whether it did: for lab/real.py.

    rows = judge(facts)     # a Row for each quantity: its range, what came out, where the range
    outside(rows)           # comes from, and what a deviation means

**No range was measured on SDXL or SD1.5**: they are computed, or come from what others publish, or
from the tiny model, and each Row says which. Where one is too narrow, the report that shows it is
what is wanted.
"""

import math
from dataclasses import dataclass
from statistics import fmean, median

from evaluation.published import PERCENT, PUBLISHED, PUBLISHED_PROMPTS, PUBLISHED_SCORERS, TITLES
from training.budget import GIB, SHARE

LOG2 = math.log(2)
BEST = 0.705  # accuracy of PickScore on Pick-a-Pic's test pairs; humans 0.680 (2305.01569, 5.1)
MEMORY = 0.25  # the plan leaves out context, workspaces and fragments; and it may count too much
SHARES = 0.1, 0.6  # of the rate of a large product, in what a step needs; published: 0.2
SEND = "please send this report"


@dataclass(frozen=True)
class Row:
    """A quantity: its range, low and high included, and what came out, None where it is unknown."""

    what: str
    low: float
    high: float
    found: float | None
    form: str  # of a value, as "{:.3f}"
    why: str  # where the range comes from
    below: str = ""  # what it means, in words
    above: str = ""
    unknown: str = "not measured"

    @property
    def inside(self) -> bool | None:
        """None where nothing is known. A value that is not finite is in no range."""
        if self.found is None:
            return None
        return self.low <= self.found <= self.high

    def range(self) -> str:
        if math.isnan(self.high):
            return ""
        low, high = self.form.format(self.low), self.form.format(self.high)
        if self.high == math.inf:
            return f"at least {low}"
        return low if low == high else f"{low} to {high}"

    def value(self) -> str:
        return self.unknown if self.found is None else self.form.format(self.found)

    def verdict(self) -> str:
        return {True: "yes", False: "NO", None: "not judged"}[self.inside]

    def words(self) -> str:
        """A sentence for a value outside."""
        said = self.below if self.found is not None and self.found < self.low else self.above
        by = f"{self.what} is {self.value()}, expected {self.range()}"
        return f"{by}: {said}; {SEND}." if said else f"{by}; {SEND}."


def outside(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.inside is False]


def half_width(n: int, share: float = 0.5) -> float:
    """Half of a 95 % interval of a share of n independent values."""
    return 1.96 * math.sqrt(share * (1 - share) / max(1, n))


# -------------------------------------------------------------------------------------------------
# The rows. facts: {lines: of metrics.jsonl, toy: whether the pairs are the tiny model's own,
# architecture, steps, batch, beta, memory (planned, bytes), flops (of training), all_flops (with
# the pictures), machine: of lab/machine, cost: cost.json, win_rates: of results.json, pictures:
# {drawn, flat, same}, seconds: {phase: s}}


def judge(facts: dict) -> list[Row]:
    return [*training(facts), *machine(facts), *pictures(facts)]


def training(facts: dict) -> list[Row]:
    lines, toy = [line for line in facts["lines"] if "loss" in line], facts["toy"]
    late = lines[len(lines) // 2 :]  # the second half of the steps
    pairs = len(late) * facts["batch"]
    known = 1.0 if toy else BEST
    entropy = 0.0 if toy else -BEST * math.log(BEST) - (1 - BEST) * math.log(1 - BEST)
    bad = [line for line in lines if None in (line["loss"], line.get("grad_norm"))]
    easier = "pairs that are seen for the first time are told apart better than PickScore tells "
    easier += "apart those of Pick-a-Pic, which is right where yours are easier"
    limit = f"published: PickScore tells {BEST:.1%} of Pick-a-Pic's pairs apart, and people 68 %"
    limit = "the tiny model's labels are exact, so there is no limit" if toy else limit
    return [
        Row(
            "Loss of the first step", LOG2 - 0.005, LOG2 + 0.005, first(lines, "loss"), "{:.4f}",
            "computed: policy and reference are equal, log 2; 0.005 is a difference of both errors "
            f"by {0.02 / facts['beta']:.0e}, for kernels that add in another order",
            *2 * ("policy and reference differ before anything was learnt",),
        ),
        Row(
            "Loss, second half", max(0.0, entropy - 0.06), LOG2 + 0.03, mean(late, "loss"),
            "{:.3f}", "computed: learning nothing gives log 2, and margins of 0.5 without any "
            "direction 0.03 more; each pair is seen once, so the loss stays above the entropy of "
            f"what can be told apart, less 0.06 for noise; {limit}",
            easier, "the model moves without learning what is preferred; the learning rate may be "
            "too large",
        ),
        Row(
            "Implicit accuracy, second half", 0.5 - half_width(pairs),
            min(1.0, known + half_width(pairs, BEST)), mean(late, "implicit_accuracy"), "{:.3f}",
            f"computed: chance is 0.5, to {half_width(pairs):.3f} with {pairs} pairs; {limit}",
            "the losers are preferred; are the labels the right way round?", easier,
        ),
        Row(
            "Steps without a finite loss or gradient", 0, 0, len(bad) if lines else None, "{:.0f}",
            "computed: bf16 does not overflow here", "", "something overflows",
        ),
        Row(
            "Steps skipped", 0, 0, first(lines[::-1], "skipped_steps"), "{:.0f}",
            "the same", "", "something overflows",
        ),
        Row(
            "Reference's error of the winners", 0, 1, mean(lines, "err_ref_winner"), "{:.3f}",
            "computed: predicting no noise at all has an error of about 1, the mean of tau^2",
            "", "the model predicts worse than nothing; model, prediction type, VAE or pictures do "
            "not fit together",
        ),
        Row(
            "Both errors over the reference's, second half", 0.9, 1.1, drift(late), "{:.3f}",
            "measured on the tiny model: 1.002 to 1.007, three seeds (docs/real.md)",
            "both errors fall, winners' and losers'", "both errors grow: the model falls apart",
        ),
        Row(
            "Share of a step that waits for pictures", 0, 0.1, mean(lines[1:], "waiting"),
            "{:.3f}", "measured on the tiny model: 0.003 (docs/real.md); a step of SDXL is longer",
            "", "the loader is too slow; are there few cores, or is the disk slow?",
        ),
    ]  # fmt: skip


def machine(facts: dict) -> list[Row]:
    gpu, plan = facts["machine"].get("rate"), facts["memory"]
    lines = [line for line in facts["lines"] if "seconds" in line]
    peak = facts["cost"].get("peak_memory") if gpu and plan else None
    plan = (plan or math.nan) / GIB
    needed = facts["flops"] / max(1, facts["steps"])  # FLOPs of a step
    seconds = median(line["seconds"] for line in lines[1:] or lines) if lines and gpu else None
    slow, fast = (needed / share / gpu if gpu else math.nan for share in SHARES)
    over = 0 if peak is None else peak / GIB / plan - 1
    share = needed / seconds / gpu if seconds else 0
    no_gpu = "not judged without a GPU"
    spent = sum(facts["seconds"].get(phase, 0) for phase in ("training", "pictures")) / 60
    computed = facts["all_flops"] / SHARE / gpu / 60 if gpu else 0
    return [
        Row(
            "Peak GPU memory, GiB", plan * (1 - MEMORY), plan * (1 + MEMORY),
            None if peak is None else peak / GIB, "{:.1f}",
            "computed: the plan (training/budget.py, docs/memory.md), which leaves out workspaces "
            f"and fragments, give or take {MEMORY:.0%}",
            f"the memory is {-over:.0%} under the plan", f"the memory is {over:.0%} over the plan",
            no_gpu,
        ),
        Row(
            "Seconds of a step, median", fast, slow, seconds, "{:.1f}",
            f"computed: {needed:.2e} FLOPs at {SHARES[0]:.0%} to {SHARES[1]:.0%} of what a large "
            "product reaches on this GPU; published scripts reach 20 % (docs/speed.md)",
            f"{share:.0%} of the product's rate is more than any program of this kind reaches; "
            "perhaps another job ran while that rate was measured",
            f"the step runs at {share:.1%} of the product's rate", no_gpu,
        ),
        Row(
            "Minutes of training and pictures", 0, max(60, 1.5 * computed),
            spent if gpu and lines else None, "{:.1f}",
            f"an hour, or on a slower GPU half as much again as the {computed:.0f} min computed at "
            f"{SHARE:.0%} of its rate; downloads and checks apart",
            "", "it takes longer than it should on this GPU", no_gpu,
        ),
    ]  # fmt: skip


def pictures(facts: dict) -> list[Row]:
    found, rates = facts["pictures"], facts["win_rates"]
    rows = [
        Row(
            "Pictures of one colour", 0, 0, found.get("flat"), "{:.0f}",
            "computed: black pictures are NaN, as of a VAE that overflows", "",
            "the VAE overflows, or the model draws nothing",
        ),
        Row(
            "Pictures that are the same before and after", 0, 0, found.get("same"), "{:.0f}",
            "computed: AdamW moves every weight in every step", "",
            "the LoRA does not reach the pictures",
        ),
    ]  # fmt: skip
    for rate in rates:
        n, title = rate["n"], TITLES.get(rate["scorer"], rate["scorer"])
        low, published = max(0.0, 0.5 - half_width(n)), most_published(facts, rate["scorer"])
        high = 1.0 if published is None else min(1.0, published + half_width(n, published))
        why = f"computed: no worse than the start, within what {n} pictures tell, 50 % +- "
        why += f"{half_width(n):.0%}"
        if published is not None:
            why += f"; published: InPO wins {published:.1%} after 400 steps of 1,024 pairs, give "
            why += f"or take {half_width(n, published):.0%}"
        elif facts["toy"]:
            why += "; measured: 100 % of 18 pictures, three seeds (docs/real.md)"
        rows.append(
            Row(
                f"Win rate by {title} over the start", low, high, rate["rate"], "{:.1%}", why,
                "the model has become worse by this judge",
                "more than the published model wins after hundreds of times as many pairs",
            )
        )  # fmt: skip
    return rows


def most_published(facts: dict, scorer: str) -> float | None:
    """The largest published win rate of InPO over the base by this scorer, 0 to 1."""
    rates = PUBLISHED.get((facts["architecture"], "base"))
    if facts["toy"] or rates is None or scorer not in PUBLISHED_SCORERS or scorer in PERCENT:
        return None
    at = PUBLISHED_SCORERS.index(scorer)
    return max(rates[at + i * len(PUBLISHED_SCORERS)] for i in range(len(PUBLISHED_PROMPTS))) / 100


# -------------------------------------------------------------------------------------------------
# Of metrics.jsonl. A value that is not finite stands there as null, and counts as NaN.


def first(lines: list[dict], key: str) -> float | None:
    return value(lines[0], key) if lines and key in lines[0] else None


def mean(lines: list[dict], key: str) -> float | None:
    found = [value(line, key) for line in lines if key in line]
    return fmean(found) if found else None


def value(line: dict, key: str) -> float:
    return math.nan if line[key] is None else line[key]


def drift(lines: list[dict]) -> float | None:
    """The errors of winners and losers over those of the reference."""
    ours = mean(lines, "err_winner"), mean(lines, "err_loser")
    theirs = mean(lines, "err_ref_winner"), mean(lines, "err_ref_loser")
    return None if None in (*ours, *theirs) or not sum(theirs) else sum(ours) / sum(theirs)
