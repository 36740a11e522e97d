"""Judges of pairs: scorers whose margins are, or are not, a probability of preference."""

from collections.abc import Callable

from scipy.special import expit

from evaluation import own
from system.files import UserError, is_number

# Per unit of margin, the log-odds that the picture with the higher score is preferred.
#   pickscore           1: exp(logit_scale) is in the score, whose softmax the model was trained by
#   hps, hps-v2.0     100: likewise, but the score is the cosine alone; 100 is where CLIP's training
#                     caps exp(logit_scale), taken for both and not read from their files
#   preference         20: stated, not found; the toy's tie of 0.02 is 60 : 40, and 0.1 is 88 : 12
# CLIP was trained to tell which text belongs to an image, and the aesthetic predictor to guess mean
# ratings: the margins of both order pictures, and no published scale makes odds of them.
LOG_ODDS = {"pickscore": 1.0, "hps": 100.0, "hps-v2.0": 100.0, "preference": 20.0}


def log_odds(judge: str) -> float | None:
    """Of a judge; None where its margins only order pictures. Raises UserError."""
    return own.log_odds(judge) if own.is_own(judge) else LOG_ODDS.get(judge)


def probability(judge: str, margin: float, odds: float | None = None) -> float:
    """The judge's probability that the first picture is preferred, sigmoid(odds * margin), which is
    the softmax of its two scores; margin: the first one's score less the second's. odds: log-odds
    per unit of margin, the judge's own if not given.

    Limit: 0.5 where both score the same."""
    return float(expit((log_odds(judge) if odds is None else odds) * margin))


def check_probability(judge: str):
    """UserError for a judge that has none."""
    if log_odds(judge) is None:
        attribute = f"give it one as `{judge.split(':')[-1]}.log_odds = 1.0`, or "
        raise UserError(
            f"--judge {own.title(judge)} orders pictures, but gives no probability that one is "
            f"preferred; {attribute * own.is_own(judge)}take one of {', '.join(LOG_ODDS)}, or give "
            "--log-odds."
        )


def judged(judge: Callable, images: list, prompts: list[str], names: list[str]) -> list[float]:
    """A score per image; UserError for one that is not finite, by the image's name."""
    scores = judge(images, prompts)
    for name, value in zip(names, scores, strict=True):
        if not is_number(value):
            raise UserError(f"the score of {name} is {value}, no finite number.")
    return scores
