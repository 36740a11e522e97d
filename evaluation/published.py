"""Names and numbers that stand fixed: the scorers, and the published win rates of InPO.

Imports nothing, so that flags can offer these names at once.
"""

# --------------------------------------------------------------------------------------------------
# The scorers of scorers.py, and what tables call them.

TITLES = {
    "preference": "preference",
    "faithfulness": "faithfulness",
    "aesthetic": "Aesthetic",
    "pickscore": "PickScore",
    "hps": "HPS v2.1",
    "hps-v2.0": "HPS v2.0",
    "clip": "CLIP",
}
TOY = ("preference", "faithfulness")  # judge toy captions alone
PERCENT = {"faithfulness"}  # 0 or 1 per image: reported as a mean in percent, not as a win rate

# --------------------------------------------------------------------------------------------------
# Published win rates of InPO in %, and how their images were drawn: one a prompt.

SOURCE = "Lu et al., CVPR 2025, arXiv 2503.18454"
NATIVE = {"sdxl": 1024, "sd15": 512}  # pixels
STEPS, GUIDANCE = 50, {"sdxl": 5.0, "sd15": 7.5}
PUBLISHED_PROMPTS = {"hpdv2": 3200, "parti": 1632}
PUBLISHED_SCORERS = ("aesthetic", "pickscore", "hps", "clip")
PUBLISHED = {  # model, against:  HPDv2                    Parti-Prompts
    ("sdxl", "base"): (56.37, 79.25, 85.38, 53.37, 61.70, 72.89, 78.31, 50.55),
    ("sdxl", "sft"): (66.66, 88.31, 89.91, 59.00, 69.70, 88.54, 88.91, 56.99),
    ("sdxl", "dpo"): (55.87, 59.28, 65.81, 46.91, 57.17, 56.92, 60.11, 42.28),
    ("sd15", "base"): (80.19, 85.84, 90.22, 66.44, 74.63, 73.16, 81.86, 61.89),
    ("sd15", "sft"): (56.63, 66.84, 58.91, 57.87, 52.27, 62.50, 58.03, 57.54),
    ("sd15", "dpo"): (70.50, 74.94, 84.06, 61.09, 68.01, 63.54, 75.31, 57.54),
    ("sd15", "kto"): (59.81, 67.41, 60.94, 60.03, 59.01, 62.25, 58.76, 57.60),
}
# The paper says HPS without a version; we compare it with v2.1.
HPS_CAVEAT = (
    "Which HPS that is the paper does not say: ours is v2.1, a guess; the default of hpsv2 and of "
    "Diffusion-DPO's script is v2.0."
)


def published_rate(
    model: str, against: str, prompt_set: str, scorer: str, info: dict
) -> float | None:
    """The published rate in % of a model named inpo against one named base, sft, dpo or kto.

    info: {"models": {name: {architecture, size}}, "sets": {name: {prompts, images, steps,
    guidance}}}. None unless both models have the same architecture at its native size, the prompt
    set is complete, and the images were drawn as the published ones."""
    ours, other = (info["models"][name] for name in (model, against))
    kind, size = ours["architecture"], ours["size"]
    drawn, n = info["sets"][prompt_set], PUBLISHED_PROMPTS.get(prompt_set)
    theirs = {"prompts": n, "images": n, "steps": STEPS, "guidance": GUIDANCE.get(kind)}
    if (other["architecture"], other["size"]) != (kind, size) or NATIVE.get(kind, 0) != size:
        return None
    if any(drawn.get(key) != value for key, value in theirs.items()):
        return None
    rates = PUBLISHED.get((kind, against.casefold()))
    if model.casefold() != "inpo" or rates is None or scorer not in PUBLISHED_SCORERS:
        return None
    column = len(PUBLISHED_SCORERS) * list(PUBLISHED_PROMPTS).index(prompt_set)
    return rates[column + PUBLISHED_SCORERS.index(scorer)]
