"""Break the code in many small ways, one at a time, and see whether the tests notice.

    python -m lab.breaks                      # all of them, about ten seconds each
    python -m lab.breaks "loss: sign" ...     # those of these names

Each break changes one place of one file in a copy of the tree, and runs the tests that should fail
there. A break that survives is a law that no test holds. First all of these tests run on an
unbroken copy, where they must pass. The exit code is 1 where a break survives.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

from system.files import ROOT, UserError
from system.program import Parser, reported


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.breaks", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of breaks (default: all of them)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

# The libraries are imported once, before the forks that test; with conftest.py's settings.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import diffusers  # noqa: F401
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import pytest
import transformers  # noqa: F401
from tqdm import tqdm

LIMIT = 400  # seconds for the tests of one break: a rank that waits for ever is caught as well


@dataclass(frozen=True)
class Break:
    """One change of one file: `old`, which stands in it exactly once, becomes `new`."""

    name: str
    file: str  # looked up by its name alone, wherever it lies
    old: str
    new: str
    tests: str  # pytest's ids, without the folder; some of these tests must fail


# fmt: off
BREAKS = [
    # ----- the inversion
    Break("step: without sqrt(abar_to)", "invert.py",
          "b.sqrt() * (_sigma(b) - _sigma(a)) * eps", "(_sigma(b) - _sigma(a)) * eps",
          "test_invert.py::test_step_equals_diffusers"),
    Break("inversion: tau weighted by sigma, not by its steps", "invert.py",
          "shift + (u - s) * eps", "shift + u * eps",
          "test_invert.py::test_constant_noise_without_injection_is_tau_and_recovery_loses_digits_at_small_t"),
    Break("inversion: tau divided by sqrt(1 - abar)", "invert.py",
          "shift / _sigma(a)", "shift / (1 - a).sqrt()",
          "test_invert.py::test_accumulated_tau_equals_implied_noise"),
    Break("inversion: first call at timestep -99", "invert.py",
          "before = torch.zeros_like(t), _per", "before = torch.zeros_like(t) - 99, _per",
          "test_invert.py::test_inversion_lands_on_every_t_by_the_edges_of_the_cells"),
    Break("inversion: starts at abar[0]", "invert.py",
          "torch.ones_like(abar[t])", "abar[0].expand_as(t)",
          "test_invert.py::test_constant_noise_without_injection_is_tau_and_recovery_loses_digits_at_small_t"),
    Break("inversion: overshoots t", "invert.py", "t.clamp(max=edge)", "torch.full_like(t, edge)",
          "test_invert.py::test_inversion_lands_on_every_t_by_the_edges_of_the_cells"),
    Break("inversion: variance of the injected noise", "invert.py",
          "(1 - a) / (1 - b) * (1 - b / a)", "(1 - b / a)",
          "test_invert.py::test_injected_noise_has_the_stated_variance"),
    Break("log-sigma: first move past t = 1", "invert.py",
          "sigma[t.clamp(max=1)]", "sigma[t.clamp(max=9)]",
          "test_invert.py::test_its_points_are_the_timesteps_nearest_to_even_levels_of_log_sigma"),
    Break("log-sigma: Euler's rule alone", "invert.py",
          "weight.where(s > r, 0)", "0 * weight.where(s > r, 0)",
          "test_invert.py::test_its_moves_from_the_third_on_are_exact_where_eps_is_linear_in_log_sigma"),
    Break("log-sigma: slope after a move of length zero", "invert.py",
          "weight.where(s > r, 0)", "weight",
          "test_invert.py::test_the_log_sigma_path_takes_as_many_calls_for_every_t_and_ends_on_it"),
    Break("log-sigma: pairs of a micro-step share a cell", "latents.py",
          "return args.strata or 1", "return args.strata or args.inversion_steps or 1",
          "test_methods.py::test_steps_of_each_method_equal_those_written_by_hand"),
    Break("inversion: images share a generator", "invert.py",
          "randn_like(image, g) for image, g in zip(x, generator, strict=True)",
          "randn_like(image, generator[0]) for image in x",
          "test_invert.py::test_batch_equals_one_by_one"),
    # ----- the losses
    Break("error: sum in place of mean", "loss.py", ".flatten(1).mean(1)", ".flatten(1).sum(1)",
          "test_loss.py::test_squared_error_is_one_mean_per_image"),
    Break("loss: sign", "loss.py", "-F.logsigmoid(margin)", "-F.logsigmoid(-margin)",
          "test_loss.py::test_loss_and_gradient_equal_the_formula"),
    Break("loss: beta in place of beta / 2", "loss.py",
          "0.5 * beta * (err_ref - err)", "beta * (err_ref - err)",
          "test_loss.py::test_gradient_is_beta_over_4_per_pair_when_policy_equals_reference"),
    Break("loss: losers first", "loss.py", "reward_w, reward_l = ", "reward_l, reward_w = ",
          "test_loss.py::test_loss_and_gradient_equal_the_formula"),
    Break("KTO: liked and disliked exchanged", "loss.py",
          "full_like(g, -1).masked_fill(liked, 1)", "full_like(g, 1).masked_fill(liked, -1)",
          "test_loss.py::test_kto_loss_and_gradient_equal_the_formula"),
    Break("KTO: reference point below 0", "loss.py", "g.mean().clamp(min=0)", "g.mean()",
          "test_loss.py::test_kto_kl_is_the_batch_mean_clamped_at_zero_unless_given"),
    Break("KTO: weights exchanged", "loss.py",
          "weight_disliked).masked_fill(liked, weight_liked)",
          "weight_liked).masked_fill(liked, weight_disliked)",
          "test_loss.py::test_kto_is_half_the_weight_when_policy_equals_reference"),
    Break("DMPO: forward in place of reverse", "loss.py",
          "losses = torch.sigmoid(margin) * (F", "losses = share * (F",
          "test_objectives_dmpo.py::test_dmpo_loss_and_gradient_equal_the_formula"),
    Break("DMPO: alpha of the winner", "loss.py", "torch.log1p(-share))", "share.log())",
          "test_objectives_dmpo.py::test_dmpo_pulls_every_margin_to_the_log_odds_of_alpha"),
    Break("DSPO: the pull held constant", "loss.py",
          "(pred.ndim - 1))", "(pred.ndim - 1)).detach()",
          "test_objectives_dspo.py::test_dspo_gives_the_numbers_of_its_release"),
    Break("DSPO: pulled to the reference", "loss.py",
          "pred_w - pull * (pred_w - ref_w)", "pred_w + pull * (pred_w - ref_w)",
          "test_objectives_dspo.py::test_dspo_loss_and_gradient_equal_the_formula"),
    Break("MaPO: exp - 1 without expm1", "loss.py",
          "* torch.exp(-x) / -torch.expm1(-x)", "/ (torch.exp(x) - 1)",
          "test_objectives_mapo.py::test_mapo_in_fp32_keeps_the_digits_of_a_small_error"),
    Break("MaPO: the loser is imitated", "loss.py",
          "err.chunk(2)[0] - beta", "err.chunk(2)[1] - beta",
          "test_objectives_mapo.py::test_mapo_gives_the_numbers_of_its_release"),
    Break("SmPO: the label of the first pair", "loss.py",
          "probability.detach().to(err) - 1", "probability[:1].detach().to(err) - 1",
          "test_objectives_smpo.py::test_loss_and_gradient_equal_the_formula"),
    Break("SmPO: an undecided label has a weight", "loss.py",
          "weight = gamma * (2 * prob", "weight = gamma * (1 + prob",
          "test_objectives_smpo.py::test_policy_equal_to_reference_or_an_undecided_label_gives_log2"),
    Break("safe loser: the loser's own norm", "loss.py",
          "r_w.square().sum(1) / along", "r_l.square().sum(1) / along",
          "test_objectives_safe.py::test_the_share_equals_the_formula"),
    Break("safe loser: kept where it agrees, dropped where not", "loss.py",
          "where(along > 0, 1)", "where(along > 0, 0)",
          "test_objectives_safe.py::test_limits_of_the_share"),
    Break("safe loser: more than all of it", "loss.py", "share.clamp(max=1)", "share",
          "test_objectives_safe.py::test_limits_of_the_share"),
    Break("safe loser: the value is scaled too", "loss.py",
          "fixed + share * (x_l - fixed)", "share * x_l",
          "test_objectives_safe.py::test_values_stay_and_the_losers_pass_on_their_share_of_the_gradient"),
    # ----- the pairs
    Break("data: label inverted", "data.py",
          'if pair["label_0"] == 1 else', 'if pair["label_0"] == 0 else',
          "test_data.py::test_winners_and_losers_are_not_swapped_from_source_to_batch"),
    Break("data: ties kept", "sources/rows.py",
          "(labels == labels) & (labels != 0.5)", "(labels == labels)",
          "test_data.py::test_ties_are_removed_and_counted"),
    Break("stream: rows of other groups", "streamed.py",
          "table.slice(row - (self.ends[group] - len(table)), 1)",
          "table.slice(row - (self.ends[group] - len(table)) - 1, 1)",
          "test_streamed.py::test_rows_are_those_of_a_copy_and_nothing_is_copied"),
    Break("stream: windows in the order of the files", "order.py",
          "rng.permutation(len(self.members)), self", "np.arange(len(self.members)), self",
          "test_streamed.py::test_orders_differ_by_epoch_and_seed_and_n_may_be_asked_in_any_order"),
    Break("sources: the worse rank wins", "sources/columns.py",
          "key=lambda row: ranks[row])", "key=lambda row: -ranks[row])",
          "test_sources.py::test_every_published_schema_gives_its_pairs"),
    Break("sources: fewer votes win", "sources/columns.py",
          "np.sign(first - second)", "np.sign(second - first)",
          "test_sources.py::test_every_published_schema_gives_its_pairs"),
    Break("sources: the columns of winner and loser swapped", "sources/columns.py",
          '("winner", "loser"),', '("loser", "winner"),',
          "test_sources.py::test_every_published_schema_gives_its_pairs"),
    Break("sources: words mean their contrary", "sources/columns.py",
          '{"first": 1.0, "second": 0.0, "tie": 0.5}', '{"first": 0.0, "second": 1.0, "tie": 0.5}',
          "test_sources.py::test_labels_are_numbers_booleans_or_words"),
    Break("sources: winner and loser of a tar swapped", "sources/named.py",
          "start, size = one[part]", 'start, size = one["loser" if part == "winner" else "winner"]',
          "test_sources.py::test_tars_are_read_at_the_places_of_their_members"),
    Break("sources: captions of other rows", "sources/named.py",
          'rows["txt"].append(_caption(one["txt"].read_bytes()))',
          'rows["txt"].insert(0, _caption(one["txt"].read_bytes()))',
          "test_sources.py::test_a_folder_of_winners_losers_and_captions"),
    Break("sources: a short row of CSV keeps its cells", "sources/tables.py",
          "cells if len(cells) == len(names) else [\"\"] * len(names)",
          "(cells + [\"\"] * len(names))[: len(names)]",
          "test_sources.py::test_a_row_of_another_length_never_shifts_its_cells"),
    Break("data: winner and loser flipped apart", "data.py",
          "(preprocess(image, size, crop_at, flip)",
          '(preprocess(image, size, crop_at, flip ^ (name == "jpg_1"))',
          "test_data.py::test_winner_and_loser_share_flip_crop_and_caption"),
    Break("data: every epoch in the same order", "order.py",
          "[self.seed, ORDER, epoch, *self.key]", "[self.seed, ORDER, *self.key]",
          "test_data.py::test_each_row_is_seen_once_an_epoch_in_an_order_of_its_own"),
    Break("data: all ranks get rank 0's pairs", "data.py",
          "accumulation + micro) * world + rank)", "accumulation + micro) * world)",
          "test_data.py::test_shards_are_disjoint_and_make_up_the_global_batch"),
    Break("data: a broken pair is tried again and again", "order.py",
          "self.rows[(a * own + int(rng.integers(size))) % size]", "self.rows[own]",
          "test_data.py::test_a_broken_image_drops_its_pair_and_all_others_still_match"),
    Break("data: resumes one step too late", "data.py",
          "for step in range(start_step, steps)", "for step in range(start_step + 1, steps)",
          "test_data.py::test_a_later_start_gives_what_would_have_come_then"),
    Break("data: deep grey is clipped as PIL does", "pictures.py",
          "scaled *= 255 / white", "scaled.clip(0, 255, out=scaled)",
          "test_data.py::test_grey_of_more_than_8_bits_is_scaled_by_its_type"),
    Break("data: a long picture is resized, whatever it takes", "data.py",
          "if math.prod(resized) > PIXELS", "if not resized",
          "test_data.py::test_a_picture_that_is_too_long_to_be_resized_drops_its_pair"),
    Break("data: an incomplete split is trained on", "parquet.py",
          "if missing and not partial", "if missing and partial",
          "test_data.py::test_a_file_of_a_split_that_lacks_others_is_taken_with_partial"),
    Break("data: the cache is named by names and times alone", "parquet.py",
          "return digest.hexdigest()", "return str(about.st_mtime_ns)",
          "test_data.py::test_rows_of_a_replaced_file_of_the_same_time_are_not_those_of_the_old_one"),
    Break("data: broken pairs are replaced by the next ones", "order.py",
          "self.rows[(a * own + int(rng.integers(size))) % size]",
          "self.rows[self._order[(place + k) % size]]",
          "test_data.py::test_what_takes_the_place_of_broken_pairs_is_fair"),
    Break("pictures: ink without black-point compensation", "pictures.py",
          "ImageCms.Flags.BLACKPOINTCOMPENSATION", "ImageCms.Flags.NONE",
          "test_pictures.py::test_the_black_of_a_press_is_black"),
    Break("pictures: profiles are ignored", "pictures.py",
          "if profile and len(profile)", "if not profile and len(profile)",
          "test_pictures.py::test_a_wide_picture_is_what_its_profile_says_in_srgb"),
    Break("buckets: by one picture of the two", "buckets.py", ".mean(1)", "[:, 0]",
          "test_buckets.py::test_a_pair_goes_where_the_mean_of_its_ratios_is_nearest_whoever_won"),
    Break("buckets: a small one stays alone", "buckets.py",
          "or counts.min() >= block", "or counts.min() >= 1",
          "test_buckets.py::test_a_bucket_that_cannot_fill_a_block_joins_the_nearest_and_none_is_lost"),
    Break("buckets: each epoch deals from the first row on", "order.py",
          "itertools.count(first) for first", "itertools.count(0) for first",
          "test_buckets.py::test_all_rows_are_seen_about_equally_often_and_none_is_dropped"),
    Break("buckets: broken pairs are replaced from any", "order.py",
          "self.decks[bucket].tries(place), OWN_TRIES", "self.decks[bucket].tries(place), 1",
          "test_buckets.py::test_what_takes_a_place_is_of_the_same_bucket_each_row_once_and_at_last_any"),
    Break("buckets: pictures are stretched", "data.py",
          "resized = height, height * image[1] // image[0]", "resized = height, width",
          "test_buckets.py::test_a_picture_covers_its_bucket_and_no_more"),
    Break("sizes: top and left exchanged", "data.py",
          "return [*image, top, left, *size]", "return [*image, left, top, *size]",
          "test_buckets.py::test_sdxl_is_told_of_the_size_before_and_of_the_crop_after_resizing_mirrored_first"),
    Break("sizes: of the loser are the winner's", "data.py",
          'item["sizes"][side] for side', 'item["sizes"][0] for side',
          "test_buckets.py::test_each_picture_of_a_pair_has_its_own_sizes_and_without_the_flag_those_of_what_is_left"),
    Break("sizes: the model is not told", "train_inpo.py",
          'cond = model.tell_sizes(cond, batch["sizes"][: len(noise)])', "cond = dict(cond)",
          "test_buckets.py::test_a_run_of_all_shapes_that_was_stopped_is_bitwise_the_unbroken_one"),
    Break("broken: no share of broken pairs is too large", "broken.py",
          "if share > self.limit:", "if share > 1:",
          "test_broken.py::test_too_many_broken_pairs_stop_a_run_which_resumes_with_a_larger_limit"),
    Break("workers: a batch that cannot be sent is waited for", "workers.py",
          "os._exit(1)", "return",
          "test_workers.py::test_a_worker_that_fails_ends_the_program_in_one_sentence"),
    Break("workers: one whose trainer is gone lives on", "workers.py",
          "os.getppid() != ", "None is ",
          "test_data.py::test_a_worker_ends_with_a_trainer_that_was_killed"),
    Break("toy: worse drawings are preferred", "toy.py", "(gap > 0) != wrong", "(gap < 0) != wrong",
          "test_toy.py::test_labels_agree_with_the_preference_of_the_stored_bytes"),
    # ----- the model
    Break("model: sign of v-prediction", "model.py",
          "signal.sqrt() * out + (1 - signal)", "signal.sqrt() * out - (1 - signal)",
          "test_model.py::test_a_v_model_that_is_right_predicts_the_true_noise"),
    Break("model: latents are not scaled", "model.py", "* vae.config.scaling_factor / std", "/ std",
          "test_model.py::test_latents_are_scaled_draws_from_the_posterior"),
    Break("model: pooled text of an empty caption", "model.py", "pooled * given[:, None]", "pooled",
          "test_model.py::test_conditioning_is_what_the_pipeline_feeds_its_unet"),
    # ----- single files
    Break("single file: levels of the VAE's decoder in the other order", "original.py",
          "levels - 1 - int(level)", "int(level)",
          "test_single_file.py::test_what_is_written_is_the_table_by_hand"),
    Break("single file: the text projection is not transposed", "original.py",
          'weights.pop("text_projection.weight").T', 'weights.pop("text_projection.weight")',
          "test_single_file.py::test_what_is_written_is_the_table_by_hand"),
    Break("single file: its markers are not read", "single.py",
          'predicts = "v_prediction" if "v_pred" in found else predicts', "pass",
          "test_single_file.py::test_the_markers_of_a_file_are_honoured_and_written"),
    Break("single file: --config is forgotten", "hub.py",
          'SAID.get(source, {}).get("config") or', "",
          "test_single_file.py::test_a_single_file_is_the_pipeline_that_it_was_made_of"),
    Break("single file: a weight too many is not noticed", "original.py", "!= held", "is held",
          "test_single_file.py::test_a_file_that_is_not_whole_is_refused_in_one_sentence"),
    Break("prediction: the two readings are confused", "prediction.py",
          "zip(TYPES, (found", "zip(TYPES[::-1], (found",
          "test_prediction.py::test_a_model_that_was_fine_tuned_to_v_is_recognized"),
    Break("prediction: v is read with the wrong sign", "prediction.py",
          "out + (1 - signal).sqrt() * xt", "out - (1 - signal).sqrt() * xt",
          "test_prediction.py::test_only_the_right_reading_of_the_tiny_model_beats_no_prediction"),
    # ----- the job
    Break("job: cells of timesteps are not visited equally often", "latents.py",
          ".permutation(cells)[place]", ".integers(cells)",
          "test_train.py::test_each_cycle_of_micro_steps_visits_every_cell_once"),
    Break("job: cells of timesteps differ between ranks", "train_inpo.py",
          "plan.world * args.micro_batch", "args.micro_batch",
          "test_methods.py::test_steps_of_each_method_equal_those_written_by_hand[kto-2-ranks]"),
    Break("job: timesteps repeat in every cycle of cells", "latents.py",
          "[seed, TIME, n]", "[seed, TIME, n % (at_once * cells)]",
          "test_train.py::test_the_marginal_of_t_is_uniform"),
    Break("job: DPO's noise is not shared", "latents.py",
          "tau.chunk(2)[0].repeat(2, 1, 1, 1)", "tau",
          "test_methods.py::test_steps_of_each_method_equal_those_written_by_hand[dpo]"),
    Break("job: the reference is trained", "train_inpo.py",
          "copy.deepcopy(unet) if needed", "unet if needed",
          "test_methods.py::test_the_reference_stays_where_the_policy_started"),
    Break("job: the other model inverts", "latents.py",
          'if args.inverter == "policy"', 'if args.inverter != "policy"',
          "test_methods.py::test_steps_of_each_method_equal_those_written_by_hand[inpo-by-reference]"),
    Break("job: the released inversion goes past an image's end", "latents.py",
          "(left < t)", "(left <= t)",
          "test_released.py::test_each_image_gets_what_the_script_makes_of_it_alone"),
    Break("job: the cache has no mirror images", "cache.py",
          "get_slice(str(row))[int(flip)]", "get_slice(str(row))[0]",
          "test_cache.py::test_with_the_cache_a_run_is_bitwise_the_run_without"),
    Break("job: warm-up begins one step late", "train_inpo.py",
          "(step + 1) / max(1, args.warmup)", "step / max(1, args.warmup)",
          "test_train.py::test_a_run_leaves_metrics_pictures_checkpoints_curves_and_a_card"),
    Break("job: KTO's reference point is of one rank", "methods.py",
          "dist.all_reduce(kl)", "kl.clone()",
          "test_methods.py::test_reference_point_is_the_weighted_mean_over_all_ranks_and_at_least_0"),
    Break("job: sum of losses in place of their mean", "train_inpo.py",
          "engine.backward(losses.mean())", "engine.backward(losses.sum())",
          "test_methods.py::test_steps_of_each_method_equal_those_written_by_hand[inpo]"),
    # ----- pairs
    Break("pairs: the worst picture wins", "make.py",
          "scores[:, :, None] - scores[:, None, :]", "scores[:, None, :] - scores[:, :, None]",
          "test_pairs_make.py::test_the_winner_is_the_best_picture_of_its_prompt_and_the_loser_the_worst"),
    Break("pairs: one judge of several is enough", "make.py", "(margins > 0).all(0)",
          "(margins > 0).any(0)",
          "test_pairs_make.py::test_of_several_judges_all_agree_and_the_first_ones_margin_is_the_largest"),
    Break("pairs: a group mixes prompts", "make.py",
          "range(start, start + prompts * per_prompt, prompts)",
          "range(first + prompt * per_prompt, first + (prompt + 1) * per_prompt)",
          "test_pairs_make.py::test_each_occurrence_of_a_prompt_and_each_round_has_a_pair_of_its_own_pictures"),
    Break("pairs: the label is always 1", "make.py",
          'row = {"label_0": float(first)', 'row = {"label_0": 1.0',
          "test_pairs_make.py::test_training_reads_the_file_as_any_other"),
    Break("pairs: strength of picture 0", "score.py",
          "if label == 1 else reversed(scores)", "if True else reversed(scores)",
          "test_pairs_score.py::test_strength_is_the_softmax_of_both_scores_at_the_winner"),
    Break("pairs: --log-odds is not heard", "judges.py",
          "log_odds(judge) if odds is None else odds", "log_odds(judge)",
          "test_pairs_score.py::test_log_odds_take_the_place_of_the_judges_own_and_give_one_to_any"),
    Break("pairs: parts of another command are taken", "parts.py",
          "differ := differences(read_json(kept, fix), about, 5)",
          "differ := differences(about, about, 5)",
          "test_pairs_make.py::test_scores_of_other_pictures_are_refused"),
    Break("pairs: every other part is left out", "parts.py",
          "[processes.rank() :: processes.world()]", "[processes.rank() :: 2 * processes.world()]",
          "test_pairs_score.py::test_killed_and_continued_by_two_ranks_it_writes_the_bytes_of_one"),
    Break("held out: captions recur in training", "held_out.py",
          'found = [b"caption " + caption.encode()] if caption else []', "found = []",
          "test_held_out.py::test_nothing_that_is_held_out_occurs_in_training_by_caption_or_picture"),
    Break("held out: the pairs are trained on as well", "held_out.py",
          "pairs, order = plan.pairs.select(trained), None", "pairs, order = plan.pairs, None",
          "test_held_out.py::test_a_share_is_kept_from_training_and_a_resumed_run_has_the_same"),
    Break("held out: what fills a batch up counts", "held_out.py",
          "yield places[np.where(counts, mine, 0)], counts",
          "yield places[np.where(counts, mine, 0)], counts | True",
          "test_held_out.py::test_ranks_share_the_places_and_are_in_one_cell_at_a_time"),
    Break("held out: looking draws from the noise of training", "held_out.py",
          "places, NOISE)[: len(t)]", "places)[: len(t)]",
          "test_held_out.py::test_what_is_logged_is_the_mean_over_places_taken_one_by_one"),
    Break("held out: a resumed run draws other prompts", "preview.py",
          'if recorded := record.get("prompts"):', 'if recorded := record.get("prompt"):',
          "test_held_out.py::test_prompts_are_captions_of_what_is_held_out_and_a_run_keeps_those_it_began_with"),
    # ----- checkpoints and folders
    Break("resume: one step too early", "checkpoint.py",
          'return state["step"]', 'return state["step"] - 1',
          "test_checkpoint.py::test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_used"),
    Break("resume: the optimizer begins anew", "checkpoint.py",
          '"load_module_strict": False}',
          '"load_module_strict": False, "load_optimizer_states": False}',
          "test_train.py::test_a_run_that_was_stopped_and_resumed_is_bitwise_the_undisturbed_one"),
    Break("checkpoint: checksums are not compared", "checkpoint.py",
          "if found != crc:", "if found < 0:",
          "test_checkpoint.py::test_every_flipped_bit_is_seen"),
    Break("checkpoint: written under its final name", "checkpoint.py",
          'scratch = path.with_suffix(".partial")', "scratch = path",
          "test_checkpoint.py::test_a_kill_at_any_instant_of_saving_leaves_a_whole_checkpoint"),
    Break("folder: a run with other flags is accepted", "folder.py",
          "differ := differences(there, settings)", "differ := differences(there, there)",
          "test_train.py::test_a_folder_with_another_run_is_refused_with_the_differing_keys"),
    Break("guard: a step that is not finite is applied", "guard.py",
          "engine.optimizer.check_grad_overflow = True",
          "engine.optimizer.check_grad_overflow = False",
          "test_guard.py::test_training_continues_after_a_skipped_step_as_if_it_had_not_been[1-fp32-zero12]"),
    Break("LoRA: alpha is ignored", "lora.py",
          "lora_alpha=alpha, target_modules=TARGETS", "lora_alpha=rank, target_modules=TARGETS",
          "test_lora.py::test_the_adapter_adds_alpha_over_r_b_a_and_without_it_the_model_is_the_base"),
    Break("LoRA for other programs: alpha = rank", "loras.py",
          "torch.tensor(layer.alpha)", "torch.tensor(float(layer.rank))",
          "test_lora_files.py::test_both_files_of_a_lora_give_the_same_pictures"),
    Break("LoRA for other programs: upsampler counted as attention", "names.py",
          "{2 if attends else 1}.conv", "1.conv",
          "test_lora_files.py::test_a_lora_in_kohyas_keys_is_merged_as_by_hand"),
    Break("LoRA of other programs: alpha is ignored", "loras.py",
          "self.alpha / self.rank * product", "product",
          "test_lora_files.py::test_a_lora_in_kohyas_keys_is_merged_as_by_hand"),
    Break("LoRA of other programs: one rank for all layers", "lora.py",
          '"rank_pattern": ranks', '"rank_pattern": {}',
          "test_lora_files.py::test_a_lora_in_kohyas_keys_is_trained_on_and_written_again"),
    Break("files are as safetensors makes them, 0600", "files.py", "| 0o666 & ~UMASK", "",
          "test_lora_files.py::test_files_have_the_mode_that_the_umask_asks_for"),
    Break("few bits: an engine rounds the scales", "quantized.py",
          "self.scale = scale.to(self.codes.device)", "pass",
          "test_quantized.py::test_an_engines_rounding_of_its_module_leaves_codes_and_scales"),
    Break("few bits: a checkpoint holds the codes", "quantized.py",
          '"codes", codes, persistent=False', '"codes", codes',
          "test_quantized.py::test_gradients_are_those_of_the_rounded_weights_and_none_of_them_is_kept"),
    Break("few bits: one scale for the whole matrix", "quantized.py",
          "weight.abs().amax(1, keepdim=True)", "weight.abs().amax().expand(len(weight), 1)",
          "test_quantized.py::test_policy_and_reference_are_adapters_on_and_off_a_base_in_few_bits"),
    Break("few bits: the flag changes nothing", "train_inpo.py",
          "quantized.quantize(unet, args.base_weights)", "pass",
          "test_quantized.py::test_a_run_is_that_on_rounded_weights_and_its_lora_is_for_the_models_own"),
    Break("AdamW8bit: loaded on other ranks", "checkpoint.py", '.lower() == "adamw8bit"',
          '.lower() == "none"', "test_adamw8bit.py::test_on_other_ranks_it_is_refused"),
    Break("LoRA: the reference has the adapters on", "lora.py",
          "self._switch(off=True)", "self._switch(off=False)",
          "test_lora.py::test_the_adapter_adds_alpha_over_r_b_a_and_without_it_the_model_is_the_base"),
    # ----- trackers
    Break("trackers: TensorBoard keeps the step that comes again", "trackers.py",
          "Event(step=start, session_log=begin)", "Event(step=start + 1, session_log=begin)",
          "test_trackers.py::test_steps_that_are_taken_again_take_the_place_of_those_of_the_kill"),
    Break("trackers: CSV keeps the rows of a kill", "trackers.py",
          "line[0].isdigit() and int(line[0]) < start", "line[0].isdigit()",
          "test_trackers.py::test_steps_that_are_taken_again_take_the_place_of_those_of_the_kill"),
    Break("trackers: W&B gets steps that it has", "trackers.py",
          "if step >= wandb.run.step:", "if step >= 0:",
          "test_trackers.py::test_wandb_gets_what_it_lacks_and_nothing_twice"),
    Break("trackers: another id at each start", "trackers.py",
          " or recorded or secrets", " or secrets",
          "test_trackers.py::test_the_id_is_the_folders_and_the_users_own_variables_win"),
    Break("trackers: DeepSpeed's own numbers too", "trackers.py",
          "monitor.enabled = False", "monitor.enabled = True",
          "test_trackers.py::test_zero3_starts_its_monitors_once_and_deepspeeds_own_numbers_are_off"),
    Break("trackers: the reference starts them again", "train_inpo.py",
          '("optimizer", *trackers.NAMES)', '("optimizer", "tensorboard")',
          "test_trackers.py::test_zero3_starts_its_monitors_once_and_deepspeeds_own_numbers_are_off"),

    # ----- what is shared
    Break("upload: all that a result has is sent", "upload.py",
          'if name not in ("cost.json", "curves.png")]', "]",
          "test_upload.py::test_a_finished_run_is_sent_as_it_is_and_nothing_else"),
    Break("upload: diffusers' notes of folders are sent", "upload.py",
          'if file.suffix == ".json" and', "if False and",
          "test_upload.py::test_nothing_that_is_sent_names_a_folder_of_this_machine"),
    Break("upload: pictures of later steps", "upload.py",
          "int(step[1]) <= model.step", "int(step[1]) >= 0",
          "test_upload.py::test_a_checkpoint_is_exported_and_sent_with_what_was_drawn_up_to_its_step"),
    Break("upload: a public repository gets what is to be private", "upload.py",
          "if private and not is_private:", "if False:",
          "test_upload.py::test_each_mistake_is_one_sentence_before_anything_is_loaded_or_made"),
    Break("upload: Xet where a server has none", "upload.py",
          ".status_code == 404", ".status_code == 0",
          "test_upload.py::test_git_lfs_takes_the_place_of_xet_where_a_server_has_none"),
    Break("public card: the command keeps its folders", "card.py",
          "*map(hide_value, filter(None, words))", "*filter(None, words)",
          "test_upload.py::test_of_a_path_the_public_card_has_the_last_part"),
    Break("card: relative folders are not noted at the start", "card.py",
          "sorted(filter(is_here, texts))", "[]",
          "test_upload.py::test_a_relative_folder_is_known_as_one_wherever_it_is_sent_from"),
    Break("card: a folder of this machine is named to the hub", "card.py",
          'text in record["local"] or is_here(text) or', "",
          "test_upload.py::test_only_what_is_on_the_hub_is_named_to_the_hub"),

    # ----- a test on real weights
    Break("real: memory far over the plan is inside its range", "expected.py",
          "MEMORY = 0.25", "MEMORY = 0.5",
          "test_real.py::test_each_fault_is_outside_its_own_range_alone_and_is_said_in_words"),
    Break("real: what is done is done again", "real.py",
          'if name not in state["done"]:', "if True:",
          "test_real.py::test_the_same_command_resumes_at_the_phase_that_failed"),
    Break("real: a token of the hub is sent", "sending.py",
          r"\bhf_\w{8,}", r"\bhf-\w{8,}",
          "test_real.py::test_a_text_loses_what_names_its_user_and_keeps_the_rest"),
    Break("real: names of the user's own files are sent", "sending.py",
          "secret.append(path or given[key])", "pass",
          "test_real.py::test_names_of_the_users_own_are_not_told"),
    Break("real: the first file is one of the test split", "taking.py",
          "(of_train or files)[0]", "files[0]",
          "test_real.py::test_of_a_set_on_the_hub_one_file_of_train_is_downloaded"),
    Break("real: the first pairs, not some of all", "taking.py",
          "for row in [*order.tolist(), *others.tolist()]:", "for row in range(len(rows)):",
          "test_real.py::test_pairs_are_spread_over_the_source_whole_and_as_many_as_the_steps_divide"),
    # ----- the book
    Break("playground: eps of Gaussians without width", "playground.py",
          "sigma / wide * (xbar", "1 / sigma * (xbar",
          "test_playground.py::test_eps_is_the_score_of_the_noised_mixture"),
    Break("playground: density as if the map kept areas", "playground.py",
          "log_det + (a * d - b * c).abs().log()", "log_det",
          "test_playground.py::test_the_flow_follows_how_each_step_stretches_the_plane"),
    Break("playground: KL of the best policy without log Z", "playground.py",
          "mean / strength - float(log_z)", "mean / strength",
          "test_playground.py::test_the_best_policy_is_the_tilted_reference_with_the_stated_reward_and_kl"),
    Break("playground: the worse point wins", "playground.py",
          "torch.sigmoid(reward(a) - reward(b))", "torch.sigmoid(reward(b) - reward(a))",
          "test_playground.py::test_the_better_point_wins_as_often_as_bradley_and_terry_say"),
    Break("playground: DPO with a noise for each image", "playground.py",
          'if method == "DPO":', 'if method == "dpo":',
          "test_playground.py::test_tau_explains_xt_and_only_dpo_shares_the_noise_of_a_pair"),
    Break("book: pictures outside the page", "book.py", "embed_images=True", "embed_images=False",
          "test_book.py::test_a_page_holds_its_pictures_and_loads_nothing"),
    # ----- processes
    Break("processes: an error of one rank is not told to the others", "processes.py",
          "if said := first(said):", "if said:",
          "test_ranks.py::test_a_mistake_of_another_rank_is_raised_on_this_one"),
    Break("processes: a signal to another rank is not seen", "processes.py",
          "dist.ReduceOp.MAX", "dist.ReduceOp.MIN",
          "test_ranks.py::test_a_signal_to_one_rank_asks_all"),
    # ----- the judgement
    Break("win rate: ties are wins", "winrate.py", "int((a > b).sum())", "int((a >= b).sum())",
          "test_winrate.py::test_wins_losses_and_ties_are_all_pairs_and_swap_with_the_models"),
    Break("win rate: the interval is over images", "winrate.py",
          "np.unique(np.asarray(prompts), return_inverse=True)", "None, np.arange(len(prompts))",
          "test_winrate.py::test_share_interval_knows_how_alike_the_images_of_a_prompt_are"),
    Break("win rate: of the other model", "winrate.py",
          "win_rate(values[name][rows], values[against][rows]",
          "win_rate(values[against][rows], values[name][rows]",
          "test_winrate.py::test_every_model_meets_each_one_named_before_it"),
    Break("HPS: crops in place of padding", "scorers.py",
          "size / max(image.size)", "size / min(image.size)",
          "test_scorers.py::test_padding_keeps_the_whole_image_in_the_middle_of_black"),
    Break("own scorers: a wrong count is taken", "own.py",
          "if len(values) != n:", "if not values:",
          "test_own.py::test_what_is_wrong_with_a_function_is_one_sentence_before_anything_is_drawn"),
    Break("own scorers: nan is taken", "own.py",
          "if not is_number(value) and", "if not isinstance(value, float) and",
          "test_own.py::test_what_is_wrong_with_a_function_is_one_sentence_before_anything_is_drawn"),
    Break("own scorers: scores of an earlier text are rivals", "preview.py",
          '[one.get("scorer"), one.get("function")] == who', 'one["scorer"] == who[0]',
          "test_own.py::test_previews_are_judged_by_it_and_an_earlier_text_is_no_rival"),
    Break("own scorers: pairs are continued by another text", "make.py",
          '{"judge": said} | own.digests([name]) |', '{"judge": said} |',
          "test_own.py::test_made_pairs_are_chosen_by_it_and_a_changed_one_is_refused"),
    Break("own scorers: not tried before anything is drawn", "scorers.py",
          "if is_main():", "if False:",
          "test_own.py::test_a_function_that_fails_is_told_of_before_a_model_draws"),
    Break("scorers: image features are not of unit length", "scorers.py",
          "return F.normalize(features, dim=-1)", "return features",
          "test_scorers.py::test_clip_is_the_cosine_of_text_and_cropped_image"),
    Break("gallery: all images of a model share a seed", "gallery.py",
          '"seed": first_seed + k}', '"seed": first_seed}',
          "test_evaluate.py::test_manifest_says_which_prompt_and_seed_and_weights_gave_each_image"),
    # ----- people
    Break("votes: left is right", "votes.py",
          '{"left": 1, "right": -1, "tie": 0}', '{"left": -1, "right": 1, "tie": 0}',
          "test_votes.py::test_a_vote_is_of_the_picture_wherever_it_stood"),
    Break("people: the other model's wins", "people.py",
          "wins, losses, n = counts[-1], counts[1]", "wins, losses, n = counts[1], counts[-1]",
          "test_votes.py::test_win_rates_are_shares_of_votes_and_swap_with_the_models"),
    Break("people: the interval is over prompts alone", "people.py",
          "for groups in (prompts, judges):", "for groups in (prompts,):",
          "test_votes.py::test_judges_who_differ_widen_the_interval_and_those_who_agree_hardly"),
    Break("people: alpha of pairs that one judge saw", "people.py",
          "if sum(row) > 1", "if sum(row) > 0", "test_votes.py::test_limits_of_alpha"),
    Break("people: a scorer that is against them agrees", "people.py",
          "math.copysign(1, gap) * vote.value", "math.copysign(1, -gap) * vote.value",
          "test_votes.py::test_agreement_of_a_scorer_is_the_share_of_votes_on_its_side"),
    Break("people: pictures that changed keep their scores", "written.py",
          "st_mtime > since", "st_mtime > since + 1e9",
          "test_page.py::test_changed_pictures_or_a_changed_scorer_are_scored_again"),
    Break("page: a prompt can end the script", "page.py",
          r'.replace("<", "\\u003c")', "",
          "test_page.py::test_prompts_are_text_whatever_they_hold"),
    Break("blind: the first model stands first", "blind.py",
          "pair = dice.sample(pair, 2)", "pair = list(pair)",
          "test_page.py::test_order_sides_and_names_tell_nothing_of_the_model"),
    Break("blind: names in the order of the models", "blind.py",
          'f"{digest(mark, key, model, k)}.png"',
          'f"{k:020x}{model.encode().hex()[:4]}.png"',
          "test_page.py::test_order_sides_and_names_tell_nothing_of_the_model"),
    Break("page: one that fails stops the run", "run.py",
          "except Exception as error:\n            said",
          "except OSError as error:\n            said",
          "test_page.py::test_a_page_that_fails_stops_no_run"),
    # ----- the leaderboard
    Break("toy: a wrong label is turned twice", "toy.py",
          "float((gap > 0) != wrong)", "float(gap > 0)",
          "test_toy.py::test_noisy_pairs_are_the_clean_ones_with_a_quarter_of_the_labels_turned"),
    Break("toy: strength of the right winner, not of the labelled", "toy.py",
          "* (-1 if wrong and not tied else 1)", "* 1",
          "test_toy.py::test_noisy_pairs_are_the_clean_ones_with_a_quarter_of_the_labels_turned"),
    Break("toy: the judge of red judges as the clean one", "toy.py",
          'RED_BONUS * (task == "red" and color == "red")', "0 * RED_BONUS",
          "test_toy.py::test_the_judge_of_red_prefers_red_and_some_pictures_are_red_against_their_caption"),
    Break("measure: another task is judged by the clean one", "study.py",
          'judge += ["--task", self.task]', 'judge += ["--task", "clean"]',
          "test_study.py::test_jobs_of_another_task_train_on_its_pairs_and_are_judged_by_it"),
    Break("study: tasks share their folders", "study.py",
          'runs = out / "runs" if study.task == "clean" else out / "runs" / study.task',
          'runs = out / "runs"',
          "test_study.py::test_jobs_of_another_task_train_on_its_pairs_and_are_judged_by_it"),
    Break("tuning: a setting that lost its captions is chosen", "tuning.py",
          ">= start[0] - LOST", ">= 0",
          "test_study.py::test_the_leaderboard_trains_with_the_flags_that_were_chosen"),
    Break("report: equal compute is the last step", "report.py",
          "self.equal.get(variant, self.steps(variant)[-1])", "self.steps(variant)[-1]",
          "test_study.py::test_scores_at_equal_drift_are_those_of_each_image_on_the_way"),
    Break("report: equal drift of the mean drift", "report.py",
          "share = (np.sqrt(level) - a) / (b - a)", "share = (level - a**2) / (b**2 - a**2)",
          "test_study.py::test_scores_at_equal_drift_are_those_of_each_image_on_the_way"),
    Break("figures: intervals of dots are swapped", "figures.py",
          "np.array([value - low, high - value])", "np.array([high - value, value - low])",
          "test_figures.py::test_dots_lie_at_their_values_in_the_order_of_the_rows"),
]
# fmt: on


# -------------------------------------------------------------------------------------------------
# Breaking a copy, and testing it.


def copy_tree(folder: Path):
    """Copy what git knows of the project, as it is now, into a new folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def apply(change: Break, folder: Path):
    """Break the copy in this folder. Raises UserError where the old text is not there once."""
    found = [path for path in folder.rglob(change.file) if path.parent.name != "tests"]
    if len(found) != 1:
        raise UserError(f"'{change.name}': there are {len(found)} files named {change.file}.")
    text = found[0].read_text("utf-8")
    if (times := text.count(change.old)) != 1:
        raise UserError(f"'{change.name}': {found[0].name} has {times} times: {change.old}")
    found[0].write_text(text.replace(change.old, change.new), "utf-8")


def run_tests(folder: Path, tests: list[str], limit: float | None = None) -> str:
    """The first of these tests that fails in the copy, "" where all pass. Raises UserError.

    limit: seconds until they count as failed."""
    log = folder / "pytest.log"
    child = multiprocessing.get_context("fork").Process(target=pytest_in, args=(folder, tests, log))
    child.start()
    child.join(limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # with the ranks that it has left behind
    if child.exitcode is None:
        return f"no end within {limit} s"
    said = log.read_text()
    failed = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if child.exitcode not in (0, 1) or bool(child.exitcode) != bool(failed):
        print(said[-3000:], file=sys.stderr)
        raise UserError(f"pytest could not run {' '.join(tests)}; it is quoted above.")
    return failed[0].split(" - ")[0].split("::", 1)[-1] if failed else ""


def pytest_in(folder: Path, tests: list[str], log: Path):
    """Run the tests of a copy in this process, a fork of the one that has imported the libraries.

    What it has of the original project's modules is forgotten."""
    os.setsid()
    os.chdir(folder)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    for name in [name for name in sys.modules if name.split(".")[0] in ("lab", "system")]:
        del sys.modules[name]
    sys.modules["__main__"] = types.ModuleType("__main__")  # spawned processes would import it
    sys.path[0] = str(folder)
    flags = ["-x", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    sys.exit(int(pytest.main([*flags, *(f"tests/{test}" for test in tests)])))


def try_break(change: Break | None, tests: list[str]) -> tuple[str, float]:
    """(first failing test or "", seconds) of the tests on a copy with this break, or with none."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="break-") as name:
        folder = Path(name)
        copy_tree(folder)
        if change:
            apply(change, folder)
        failed = run_tests(folder, tests, LIMIT if change else None)
        return failed, time.monotonic() - begin


# -------------------------------------------------------------------------------------------------
# The program.


def main(argv: list[str] | None = None) -> int:
    names = parse(argv).names
    known = {change.name: change for change in BREAKS}
    survivors, rows = 0, []
    with reported("lab.breaks"):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"There is no break '{unknown[0]}'; they are: {', '.join(known)}.")
        chosen = [known[name] for name in names] or BREAKS
        every = list(dict.fromkeys(test for change in chosen for test in change.tests.split()))
        failed, seconds = try_break(None, every)
        if failed:
            raise UserError(f"{failed} fails without any break; mend that first.")
        print(f"Without a break all tests named below pass, in {seconds:.0f} s.", flush=True)
        for change in (bar := tqdm(chosen, unit="break", desc="breaks")):
            bar.set_postfix_str(change.name)
            failed, seconds = try_break(change, change.tests.split())
            survivors += not failed
            rows.append(f"| {change.name} | {failed or 'SURVIVED'} | {seconds:.0f} |")
    print("\n| break | caught by | seconds |\n|---|---|---|", *rows, sep="\n")
    print(f"\n{len(rows) - survivors} of {len(rows)} breaks were caught.")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
