"""One-line faults in reductions, losses and loops, most of them of the methods that learn from rewards, each with the
tests of which one must fail. None of them raises an error by itself."""

from __future__ import annotations

import dataclasses

LOSSES, CALIBRATE = "tests/test_losses.py", "tests/test_calibrate.py"
STAGES = "tests/methods/test_reward_stages.py"
BRIDGE = "tests/models/test_bridge.py"
BLOCKS = "tests/models/test_block_diffusion.py"
PRODUCTS = "tests/models/test_products.py"


def of(method: str) -> str:
    return f"tests/methods/test_{method}.py"


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old`, a text that a file of the package holds once, becomes `new`; `tests` are node ids of pytest."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.file}: {self.new}"


def fault(file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(f"ctg_jax/{file}", old, new, tests)


PPO, GDC, CLICK = f"{of('ppo')}::test", f"{of('gdc')}::test", f"{of('click')}::test"
WEIGHTS = "methods/weights"

FAULTS = [
    # reductions
    fault("learn/losses.py", "jnp.sum(values), jnp.sum(mask, dtype=jnp.float32)",
          "jnp.sum(values), jnp.float32(mask.size)", f"{LOSSES}::test_masked_total_by_hand"),
    fault("learn/losses.py", "return total / jnp.maximum(jnp.sum(mask, axis=-1, dtype=jnp.float32), 1.0)",
          "return total / mask.shape[-1]", f"{CLICK}_the_gradient_by_hand"),
    fault("learn/losses.py", "gap = jnp.where(removed(p), 0.0, p - q)", "gap = jnp.where(removed(p), 0.0, q - p)",
          f"{LOSSES}::test_kl_by_hand_in_both_directions"),
    fault("learn/losses.py", "jnp.sum(jnp.where(allowed, rest, 0.0), axis=-1)", "jnp.sum(rest, axis=-1)",
          f"{of('quark')}::test_unlikelihood_by_hand"),
    fault("learn/losses.py", "(tokens[:, None] != target)", "(tokens[:, None] == target)",
          f"{of('quark')}::test_unlikelihood_by_hand"),
    fault("learn/losses.py", "jnp.ones((starts, starts), bool), -1)", "jnp.ones((starts, starts), bool), 0)",
          f"{of('unlikelihood')}::test_repeated_n_grams_by_hand"),
    fault("learn/losses.py", "(1.0 + jnp.cos(jnp.pi * jnp.exp(-nll)))", "(1.0 - jnp.cos(jnp.pi * jnp.exp(-nll)))",
          f"{LOSSES}::test_reweighted_by_hand"),
    fault("learn/calibrate.py", "permutation(len(rewards)), rewards))", "permutation(len(rewards)), -rewards))",
          f"{CALIBRATE}::test_bins_by_hand"),
    fault("learn/calibrate.py", "np.random.default_rng(seed).permutation(len(rewards))", "np.arange(len(rewards))",
          f"{CALIBRATE}::test_ties_are_broken_at_random_and_again_alike"),
    fault("learn/calibrate.py", "/ (2 * len(base))", "/ len(base)", f"{CALIBRATE}::test_ranks_by_hand"),
    fault("learn/calibrate.py", "-rewards, groups))", "rewards, groups))", f"{CALIBRATE}::test_best_of_n"),
    fault("learn/calibrate.py", "np.exp(t * (u - 1.0))", "np.exp(t * (1.0 - u))", f"{CALIBRATE}::test_transformed"),
    fault("learn/critics.py", "carry = d + gamma * lam * carry", "carry = d + gamma * carry",
          f"{PPO}_advantages_by_hand"),
    fault("learn/critics.py", "rewards + gamma * after - values", "rewards + gamma * after + values",
          f"{PPO}_advantages_by_hand"),
    fault("learn/rounds.py", 'seen if pool == "all" else seen[-1:]', 'seen if pool == "all" else seen[:1]',
          "tests/test_rounds.py::test_the_last_samples_or_none"),
    fault("learn/rounds.py", "coefficient * (1 + min(", "coefficient * (1 - min(",
          "tests/test_experience.py::test_the_kl_coefficient_follows_the_samples"),
    fault("learn/experience.py", "logp = -nats", "logp = nats",
          f"{STAGES}::test_the_pool_is_ragged_and_its_texts_end"),
    fault("learn/fitting.py", "if number > 1:", "if number > 2:",
          "tests/test_rounds_of_training.py::test_two_rounds_with_one_optimizer_are_one_run_of_twice_the_length"),
    # PPO, GRPO and RLOO
    fault(f"{WEIGHTS}/ppo.py", "-beta * (old - base), 0.0)", "beta * (old - base), 0.0)",
          f"{PPO}_token_rewards_by_hand"),
    fault(f"{WEIGHTS}/ppo.py", "gain = jnp.minimum(", "gain = jnp.maximum(", f"{PPO}_the_objective_by_hand"),
    fault(f"{WEIGHTS}/ppo.py", 'value = value + o.value * terms["value_error"]', "value = value",
          f"{PPO}_the_objective_by_hand"),
    fault(f"{WEIGHTS}/ppo.py", "jnp.exp(apart) - apart - 1", "jnp.exp(apart) + apart - 1",
          f"{PPO}_options_of_the_objective_by_hand"),
    fault(f"{WEIGHTS}/ppo.py", "error = jnp.maximum(error,", "error = jnp.minimum(error,",
          f"{PPO}_options_of_the_objective_by_hand"),
    fault(f"{WEIGHTS}/ppo.py", "away * (count / (count - 1))[at]", "away * ((count - 1) / count)[at]",
          f"{PPO}_relative_advantages_by_hand"),
    fault(f"{WEIGHTS}/ppo.py", 'if o.advantage == "group" else by_row', 'if o.advantage == "values" else by_row',
          f"{PPO}_a_text_counts_by_its_tokens_or_as_one"),
    fault(f"{WEIGHTS}/ppo.py", "reward - beta * np.where(mask", "reward + beta * np.where(mask",
          f"{PPO}_what_a_text_is_credited_with_by_hand"),
    fault(f"{WEIGHTS}/ppo.py", "samples.with_(reward=reward.astype(", "samples.with_(reward=-reward.astype(",
          f"{STAGES}::test_ppo_credits_what_the_pool_gives"),
    fault(f"{WEIGHTS}/ppo.py", "(reward - reward.mean()) / reward.std()", "(reward.mean() - reward) / reward.std()",
          f"{STAGES}::test_ppo_credits_what_the_pool_gives"),
    # Quark
    fault(f"{WEIGHTS}/quark.py", "kl * far - entropy * free", "kl * far + entropy * free",
          f"{of('quark')}::test_the_loss_by_hand"),
    fault(f"{WEIGHTS}/quark.py", 'pair = (base, z) if direction == "reference_policy"',
          'pair = (base, z) if direction != "reference_policy"', f"{of('quark')}::test_the_loss_by_hand"),
    fault(f"{WEIGHTS}/quark.py", 'samples.column("bin") == tokens - 1)', 'samples.column("bin") == 0)',
          f"{STAGES}::test_quark"),
    fault(f"{WEIGHTS}/quark.py", 'samples.column("reward"), tokens, seed)', '-samples.column("reward"), tokens, seed)',
          f"{STAGES}::test_quark"),
    fault(f"{WEIGHTS}/quark.py", 'calibrate.finite(rewards), side="right")', 'calibrate.finite(rewards), side="left")',
          f"{of('quark')}::test_classes_by_hand"),
    fault(f"{WEIGHTS}/quark.py", "{prompt}\" if words else prompt", "{prompt}\" if not words else prompt",
          f"{STAGES}::test_feedback_precedes_the_prompt_while_learning"),
    fault("learn/experience.py", "self.rows[self.ends[i] - len(states) : self.ends[i]]",
          "self.rows[self.ends[i - 1] - len(states) : self.ends[i - 1]]",
          f"{STAGES}::test_scoring_keeps_the_states_that_an_update_would_read"),
    # GDC
    fault(f"{WEIGHTS}/gdc.py", "gap = np.asarray(log_p, np.float64) - log_q",
          "gap = log_q - np.asarray(log_p, np.float64)", f"{GDC}_weights_by_hand"),
    fault(f"{WEIGHTS}/gdc.py", "    return found.x\n", "    return -found.x\n",
          f"{GDC}_multipliers_of_two_features_by_hand"),
    fault(f"{WEIGHTS}/gdc.py", "value += total / len(parts)", "value += total",
          f"{GDC}_multipliers_where_every_prompt_has_its_own_normaliser"),
    fault(f"{WEIGHTS}/gdc.py", "log_p + next(rest) * phi", "log_p - next(rest) * phi", f"{STAGES}::test_gdc"),
    fault(f"{WEIGHTS}/gdc.py", 'policy if policy.spec["closer"] else turn.proposal',
          'turn.proposal if policy.spec["closer"] else policy',
          f"{STAGES}::test_gdc_moves_its_proposal_to_a_closer_policy_alone"),
    fault(f"{WEIGHTS}/gdc.py", "run.record(closer=gap < 0", "run.record(closer=gap > 0", f"{STAGES}::test_gdc"),
    fault(f"{WEIGHTS}/gdc.py", "learned = chosen.take(np.flatnonzero(~held_back))", "learned = chosen",
          f"{STAGES}::test_gdc"),
    fault(f"{WEIGHTS}/gdc.py", "losses.masked_sum(weight * nll, rows)", "losses.masked_sum(nll, rows)",
          f"{STAGES}::test_gdc"),
    fault(f"{WEIGHTS}/gdc.py", "weight = weight - jnp.exp", "weight = weight + jnp.exp",
          f"{GDC}_the_baseline_changes_the_gradient_of_single_texts_and_not_its_mean"),
    # Click and preferences
    fault(f"{WEIGHTS}/click.py", "gap = jnp.sum(negative, axis=1) - jnp.sum(positive, axis=1)",
          "gap = jnp.sum(positive, axis=1) - jnp.sum(negative, axis=1)", f"{CLICK}_the_gradient_by_hand"),
    fault(f"{WEIGHTS}/click.py", 'samples.take(good).with_(negative=samples.column("tokens")[bad])',
          'samples.take(bad).with_(negative=samples.column("tokens")[good])', f"{STAGES}::test_click"),
    fault("learn/preferences.py", "good = rewards >= threshold", "good = rewards < threshold",
          f"{CLICK}_pairs_by_hand"),
    fault("learn/preferences.py", "np.argsort(-rewards[order]", "np.argsort(rewards[order]",
          f"{of('preference')}::test_pairs_by_hand"),
    fault("learn/improving.py", "alpha * gain + beta", "-alpha * gain + beta",
          f"{of('preference')}::test_pairs_by_hand"),
    fault(f"{WEIGHTS}/preference.py", "m, target = o.beta * (up - down)", "m, target = o.beta * (down - up)",
          f"{of('preference')}::test_the_losses_by_hand"),
    fault(f"{WEIGHTS}/preference.py", "up - o.negative * down", "up + o.negative * down",
          f"{of('preference')}::test_the_loss_of_edits_by_hand"),
    fault(f"{WEIGHTS}/preference.py", 'for name in ("tokens", "other")]', 'for name in ("other", "tokens")]',
          f"{STAGES}::test_preference[logistic]"),
    # unlikelihood, control codes, distillation, fine-tuning, experts
    fault(f"{WEIGHTS}/unlikelihood.py", '-batch["advantage"] * w * logp', 'batch["advantage"] * w * logp',
          f"{STAGES}::test_unlikelihood_of_samples"),
    fault(f"{WEIGHTS}/unlikelihood.py", "out = rewards - np.where(", "out = rewards + np.where(",
          f"{of('unlikelihood')}::test_advantages_by_hand"),
    fault(f"{WEIGHTS}/ctrl.py", 'coded = params.replace(cond="label")', "coded = params",
          f"{of('ctrl')}::test_the_loss_reads_the_code_of_each_row"),
    fault(f"{WEIGHTS}/ctrl.py", "code / (count - 1)", "code / count",
          f"{of('ctrl')}::test_the_source_of_a_text_by_hand"),
    fault(f"{WEIGHTS}/distil.py", "losses.kl(wanted, z)", "losses.kl(z, wanted)",
          f"{of('distil')}::test_the_student_is_its_teacher[False]"),
    fault(f"{WEIGHTS}/finetune.py", "0.5 * (nats + scale * far)", "0.5 * (nats - scale * far)",
          f"{LOSSES}::test_earth_mover_by_hand"),
    fault("controls/experts.py", 'found["expert"] - found["anti"], 0.0)', 'found["anti"] - found["expert"], 0.0)',
          f"{of('dexperts')}::test_three_tokens_by_hand"),
    # bridges, plans, published masked models, blanks, choices without a reward
    fault("models/bridge.py", "(1 - share) * z0 + share * zT, (t - t0)", "share * z0 + (1 - share) * zT, (t - t0)",
          f"{BRIDGE}::test_moments_and_the_contrast_by_hand"),
    fault("models/bridge.py", "share * (last - first - path[:, -1])", "share * (last - first)",
          f"{BRIDGE}::test_drawn_bridges_have_the_moments_of_a_bridge_at_every_step"),
    fault("learn/sentence_bridge.py", "(t * (n - 1 - t) / (n - 1))", "(t * (n - 1 - t))",
          f"{BRIDGE}::test_the_variance_of_the_latents_of_documents"),
    fault("methods/hidden/time_control.py", "place = pos - jnp.reshape(first, (-1, 1))", "place = pos",
          f"{of('time_control')}::test_each_latent_is_held_for_its_span_and_the_last_one_to_the_end"),
    fault("control.py", "dtype=jnp.int32) - hidden", "dtype=jnp.int32)",
          "tests/controls/test_selection.py::test_where_the_prompt_begins"),
    fault("controls/vectors.py", "pos - placed.first[:, None]", "pos - (placed.end - placed.size)[:, None]",
          f"{of('self_control')}::test_a_shift_moves_tokens_of_the_prompt_alone"),
    fault("models/hf/masked.py", "* (1 + moves[at + 1])", "* moves[at + 1]",
          "tests/models/test_hf_masked.py::test_a_model_in_the_layout_of_mdlm_equals_the_authors_arithmetic"),
    fault("learn/infilling.py", "~tokenizer.known(vocab) | constraints.marks(tokenizer.ends, vocab)",
          "~tokenizer.known(vocab)",
          f"{of('infilling')}::test_one_missing_token_is_drawn_from_what_the_network_predicts"),
    fault("learn/whole_rows.py", "(size == 1) & (tokens[:, :1] == start)", "size < 0",
          f"{of('mdlm')}::test_an_empty_prompt_gives_no_token_of_a_row"),
    fault("models/pattern.py", "part[:, None] > part[None]", "part[:, None] >= part[None]",
          f"{BLOCKS}::test_one_reading_is_every_block_read_after_those_before_it[3]"),
    fault("models/masked.py", "weight(t, schedule)[:, :, part] * found", "weight(t, schedule)[:, :, :1] * found",
          f"{BLOCKS}::test_smaller_blocks_are_nearer_to_an_autoregressive_model"),
    fault("methods/diffusion/mdlm.py", "whole=control.net.block > 0", "whole=False",
          f"{BLOCKS}::test_a_small_network_of_blocks_learns_a_distribution"),
    fault("learn/masked_classifier.py", "(count - 1 - jnp.arange(tokens.shape[1]) // size)",
          "(jnp.arange(tokens.shape[1]) // size)",
          f"{BLOCKS}::test_its_classifier_reads_rows_as_they_are_while_they_are_written"),
    fault("learn/consensus.py", "int(np.argmax(means))", "int(np.argmin(means))",
          f"{of('consensus')}::test_the_text_most_like_the_others_is_chosen"),
    fault("methods/diffusion/dglm.py", "read, lm=lm, data=written)", "read, lm=lm, data=data)",
          f"{of('dglm')}::test_networks_learn_from_what_the_language_model_writes"),
    fault("learn/pretrain.py", 'stage(root, load_data, settings["texts"]) if "texts" in settings else data', "data",
          f"{of('proxy')}::test_a_small_model_may_have_texts_of_its_own"),
    fault("models/layers.py", "by(w[count * size :])", "by(w[count * size - 1 : -1])",
          f"{PRODUCTS}::test_a_few_rows_are_the_product_and_a_row_alone_is_the_row_among_others[shape1-odd]"),
    fault("models/layers.py", "// 8 * 8)", ")",
          f"{PRODUCTS}::test_a_few_rows_are_the_product_and_a_row_alone_is_the_row_among_others"),
]  # fmt: skip
