"""Known mistakes, and the tests that must notice them.

Each is a patch in `patches/`, made against the current source. Most are mistakes of earlier ReLoRA
implementations; the rest are places where a distributed restart can go wrong on one rank only.
When a patch no longer applies, make it again: `git diff -U2 > tests/mutants/patches/NAME.patch`.
"""

from dataclasses import dataclass

ON_GPUS = "tests/emulated_cuda/test_engines.py::test_an_engine_from_its_building_to_its_release"
STEP_ON_GPUS = "tests/emulated_cuda/test_step.py::test_the_host_waits_for_nothing_but_deepspeeds_optimizer"
OWNERS = "tests/parity/test_owner.py::test_losses_and_weights_equal_plain_pytorch"
STEPS_OF_OWNERS = "tests/zero/test_owner_steps.py"
SWITCHES = "tests/zero/test_switching.py"
SWITCHES_IN_PLAIN = "tests/parity/test_switching.py::test_losses_and_weights_equal_plain_pytorch"
GUARD = "tests/training/test_guard.py"
RESUME = "tests/training/test_resume.py::test_resume_is_exact"
FORMATS = "tests/zero/test_formats.py"
RESTART = "tests/zero/test_restart.py::test_invariants"
REFRESH = "tests/zero/test_one_sided_refresh.py::test_the_second_refresh"
MOMENTS = "tests/zero/test_moments.py::test_split_moments_are_pruned_as_whole_ones"
NONFINITE = "tests/zero/test_nonfinite.py::test_one_bad_rank"
OWNER_UPDATES = "tests/zero/test_owner_updates.py"
FIRA = "tests/matrix/test_vectors.py::test_fira"
ALL_RULES = "tests/matrix/test_all_rules.py"
SST = "tests/matrix/test_sst.py"
CRNET, INVERSION = "tests/models/test_crnet.py", "tests/models/test_inversion.py"
MASKS = "tests/data/test_masks.py::test_a_step_is_that_of_the_documents_alone"
RETURN, VECTORS = "tests/exchange/test_return.py", "tests/exchange/test_vectors.py"
WRITTEN = "test_masters_and_stored_copies_get_the_change"


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: of the patch file.
        tests: pytest node ids; at least one must fail.
        says: a part of the failure's text, so that a patch that merely breaks the code does not count.
    """

    name: str
    tests: tuple[str, ...]
    says: str


MUTANTS = [
    # Updates between restarts.
    Mutant("residual_not_projected", (f"{OWNER_UPDATES}::{WRITTEN}[1-bf16-frozen1]",), "inside <"),
    Mutant(
        "residual_not_published",
        (f"{OWNER_UPDATES}::{WRITTEN}[1-bf16-frozen1]",),
        "assert torch.equal(frozen.quantize(",
    ),
    Mutant(
        "residual_shares_old_weights",
        (f"{OWNER_UPDATES}::test_a_run_resumes_to_the_bit[1-bf16-[2, 4]]",),
        'assert found["losses"] == expected',
    ),
    Mutant(
        "residual_of_a_skipped_step",
        (f"{OWNER_UPDATES}::test_a_bad_step_on_one_rank_gives_up_what_the_period_has[1-bf16-inf-1]",),
        "engine.residual.steps == 0",
    ),
    Mutant(
        "residual_ignores_decay",
        (f"{OWNER_UPDATES}::test_under_weight_decay_w_gets_more_than_forward_sees",),
        "not close",
    ),
    Mutant(
        "residual_sums_not_saved",
        (f"{OWNER_UPDATES}::test_a_run_resumes_to_the_bit[1-bf16-[4]]",),
        "residual/",
    ),
    # Update rules of whole matrices.
    Mutant("matrix_signs_as_they_come", (f"{FIRA}[code_right]",), "not close"),
    Mutant("matrix_limiter_keeps_the_unlimited_norm", (f"{FIRA}[code_right]",), "not close"),
    Mutant("matrix_code_of_fira_with_the_papers_scale", (f"{FIRA}[code_left]",), "not close"),
    Mutant(
        "matrix_state_moves_without_a_gradient",
        (f"{ALL_RULES}::test_a_matrix_without_a_gradient_keeps_w_and_its_state",),
        "torch.equal(state[key][missing], before[key][missing])",
    ),
    Mutant(
        "matrix_projection_of_any_weight",
        (f"{ALL_RULES}::test_the_key_decides_projections_and_nothing_else_is_random",),
        'updates(rule(), gradients, key="another")',
    ),
    # Sparse spectral training.
    Mutant(
        "sst_gradients_with_sigma", (f"{SST}::test_the_rule_of_w_is_training_of_its_factors[shape0-3]",), "not close"
    ),
    Mutant("sst_columns_of_any_length", (f"{SST}::test_one_step",), "not close"),
    Mutant(
        "sst_moments_of_other_columns",
        (f"{SST}::test_moments_begin_again_with_other_columns_and_those_of_sigma_with_a_decomposition",),
        "kept == [new",
    ),
    Mutant("sst_sigma_below_0", (f"{SST}::test_sigma_ends_at_0_and_columns_keep_their_length",), ">= 0"),
    Mutant(
        "sst_samples_the_largest", (f"{SST}::test_sampling_is_without_replacement_and_by_probability",), "not close"
    ),
    Mutant(
        "factors_draw_alike_for_all_weights", ("tests/parity/test_sst.py::test_one_rank_alone",), 'one["losses"] =='
    ),
    Mutant(
        "factors_move_without_a_gradient",
        ("tests/zero/test_sst.py::test_a_weight_without_a_gradient_waits_on_all_ranks[4-1]",),
        "(not on_all, True)",
    ),
    Mutant(
        "factors_not_followed",
        ("tests/parity/test_sst.py::test_losses_and_weights_equal_plain_pytorch[1-1]",),
        "losses differ by",
    ),
    Mutant(
        "factors_not_summed_over_ranks",
        ("tests/parity/test_sst.py::test_losses_and_weights_equal_plain_pytorch[1-1]",),
        "losses differ by",
    ),
    Mutant(
        "factors_with_the_loss_scale",
        ("tests/emulated_cuda/test_factors.py::test_losses_and_norms_are_those_of_fp32[1]",),
        "assert norms ==",
    ),
    Mutant(
        "factors_get_earlier_gradients_again", ("tests/parity/test_sst.py::test_one_rank_alone",), 'one["losses"] =='
    ),
    Mutant("sst_decomposes_once", (f"{SST}::test_the_rule_of_w_is_training_of_its_factors[shape0-3]",), "not close"),
    # Networks of other architectures.
    Mutant("crnet_adds_up_to_gate", (f"{CRNET}::test_the_network_is_what_its_equations_say",), "not close"),
    Mutant("crnet_beta_of_0_is_dead", (f"{CRNET}::test_no_beta_is_dead",), "not close"),
    Mutant(
        "crnet_carries_what_is_rounded",
        (f"{CRNET}::test_sums_over_layers_are_in_fp32_where_weights_are_in_bf16",),
        "== {torch.float32}",
    ),
    Mutant(
        "crnet_inverts_in_another_order", (f"{INVERSION}::test_a_projection_of_the_vectors_is_inverted",), "not close"
    ),
    Mutant(
        "crnet_growth_of_one_division",
        (f"{INVERSION}::test_where_errors_would_grow_more_is_kept",),
        "== [5, 8, 11]",
    ),
    Mutant("cola_activates_after_B", ("tests/models/test_cola.py::test_a_projection_and_its_gradients",), "not close"),
    # Writing a value: master and forward's copy.
    Mutant("stale_master", (f"{RESTART}[1-fp32]",), "the ranks do not agree on"),
    Mutant("stale_forward_copy", (f"{RESTART}[1-fp32]",), "the ranks do not agree on"),
    Mutant(
        "truncated_masters",
        ("tests/zero/test_masters.py::test_masters_are_the_models_fp32_values[1-False]",),
        "the master is not the model's fp32 value",
    ),
    # Merging.
    Mutant("unscaled_merge", (f"{RESTART}[0-fp32]",), "assert (masters[name] - intended)"),
    Mutant(
        "decay_of_the_factors_only",
        ("tests/zero/test_weight_decay.py::test_the_merged_weights_decay_as_in_plain_pytorch[1-True]",),
        "W does not decay",
    ),
    Mutant("repeated_rounding", (f"{RESTART}[1-bf16]",), "assert (masters[name] - intended)"),
    Mutant("masters_not_kept", (f"{RESTART}[1-bf16]",), "(masters[name] - intended).abs().max()"),
    Mutant(
        "update_quantized_twice",
        (f"{FORMATS}::test_twenty_restarts_with_and_without_masters[int8]",),
        'assert max(kept["master"]) <= 1e-6',
    ),
    Mutant(
        "resume_forgets_merges",
        ("tests/zero/test_checkpoint.py::test_resume_is_exact_in_bf16_also_in_an_engine_that_has_trained[1]",),
        "saved differs",
    ),
    Mutant(
        "ledger_forgotten",
        (f"{FORMATS}::test_resume_is_exact_through_the_next_restart[1-auto-int8]",),
        "merge_loss_total differs",
    ),
    Mutant(
        "buffers_not_restored",
        (f"{FORMATS}::test_resume_without_masters_is_exact[3-replicated]",),
        "the same to begin with",
    ),
    # Reinitialising.
    Mutant("zero_A_at_wrapping", ("tests/lowrank/test_wrap.py::test_gradient_reaches_B_at_once",), "lora_B.grad"),
    # Pruning.
    Mutant("prunes_one_shard", (f"{RESTART}[1-fp32]",), "AssertionError: model.layers."),
    Mutant("threshold_of_one_shard", (f"{MOMENTS}[1-magnitude]",), "AssertionError: model.layers."),
    Mutant("ties_on_every_rank", (f"{MOMENTS}[1-magnitude_joint]",), "AssertionError: model.layers."),
    Mutant("full_reset_keeps_some", (f"{MOMENTS}[1-zero]",), "AssertionError: model.layers."),
    Mutant("pruning_keeps_one_less", ("tests/lowrank/test_pruning.py",), "num_kept"),
    Mutant("pruning_keeps_all_ties", ("tests/lowrank/test_pruning.py",), "magnitude_mask"),
    # One-sided chains.
    Mutant("basis_of_each_rank", (f"{REFRESH}[1-bf16-none]",), "the ranks do not agree on"),
    Mutant("basis_not_rounded_before_the_merge", (f"{REFRESH}[1-bf16-none]",), "- merged).abs().max()"),
    Mutant(
        "moments_of_a_chain_dropped",
        ("tests/parity/test_one_sided_engine.py::test_the_vectors_of_galore[1-1]",),
        "not close",
    ),
    # Schedule and merge on one counter.
    Mutant("restart_off_by_one", (f"{NONFINITE}[0-fp32-nan]",), "[3, 7] == [4]"),
    Mutant("trough_one_step_early", (f"{RESTART}[0-fp32]",), "assert engine.get_lr() =="),
    Mutant("schedule_misses_restarts", (f"{RESTART}[0-fp32]",), "assert engine.get_lr() =="),
    Mutant("lr_not_set_at_restart", (f"{RESTART}[0-fp32]",), "assert engine.get_lr() =="),
    # What one rank does and the others do not.
    Mutant("one_dropout_mask", ("tests/zero/test_dropout.py",), "the same mask on every rank"),
    # The step that it applies is one at which a restart is due, and that refuses to merge the NaN.
    Mutant("applies_nan", (f"{NONFINITE}[0-fp32-nan]",), "merged into W would not be finite"),
    # Checkpoints.
    Mutant("moments_not_restored", (f"{RESUME}[deepspeed=zero1-precision=bf16]",), "a loss differs"),
    Mutant("base_written_once_a_run", (f"{RESUME}[deepspeed=zero1-precision=bf16]",), "a loss differs"),
    Mutant(
        "master_overwritten_while_saved",
        ("tests/checkpoint/test_writing.py::test_a_restart_while_it_is_written_does_not_tear_it[precision=bf16]",),
        "assert",
    ),
    Mutant(
        "flipped_bits_unseen", ("tests/checkpoint/test_damage.py::test_every_file_of_the_newest_checkpoint",), "assert"
    ),
    Mutant(
        "old_checkpoint_deleted_first",
        (
            "tests/checkpoint/test_own_loop_damage.py::"
            "test_killed_in_the_middle_of_a_save_the_one_before_is_left[same_name_old_one]",
        ),
        "assert [0] == [1]",
    ),
    # The link between islands.
    Mutant(
        "islands_later_contribution_counts",
        ("tests/islands/test_membership.py::test_the_first_complete_contribution_counts",),
        "assert not",
    ),
    Mutant(
        "islands_told_before_they_are_written",
        ("tests/islands/test_relay.py::test_what_an_answer_tells_is_on_the_disk",),
        'assert island in json.loads((tmp_path / "state.json")',
    ),
    Mutant(
        "islands_admit_any_key",
        ("tests/islands/test_door.py::test_who_knows_the_servers_key_but_not_the_secret_is_refused",),
        "assert event == zmq.EVENT_HANDSHAKE_FAILED_AUTH",
    ),
    # What islands exchange.
    Mutant(
        "islands_product_of_means",
        (f"{VECTORS}::test_products_are_averaged[mean_of_products-False]",),
        "assert close(merged",
    ),
    Mutant("islands_errors_not_fed_back", (f"{VECTORS}::test_what_4_bits_leave_out_arrives_later",), "rounds * update"),
    Mutant("islands_errors_not_saved", (f"{RETURN}::test_a_resume_is_exact[relora]",), "assert torch.equal"),
    Mutant("islands_momenta_not_saved", (f"{RETURN}::test_a_resume_is_exact[relora]",), "assert torch.equal"),
    Mutant(
        "islands_rounds_made_good_twice",
        (f"{RETURN}::test_from_a_checkpoint[3-relora-stages0-how0]",),
        "the islands train different models",
    ),
    # Owners' steps of whole weights.
    Mutant("owners_clip_apart", (f"{OWNERS}[muon-1-1]",), "assert"),
    Mutant("owners_not_published", (f"{OWNERS}[muon-1-1]",), "losses differ by"),
    Mutant("owners_state_not_saved", (f"{STEPS_OF_OWNERS}::test_a_resume_to_the_bit[1-bf16-muon]",), "assert"),
    Mutant(
        "owners_step_of_a_skipped_one",
        (f"{STEPS_OF_OWNERS}::test_a_step_that_is_not_finite_on_one_rank_changes_nothing[1-bf16-inf]",),
        "assert",
    ),
    # Switches of vectors.
    Mutant("switches_keep_moments", ("tests/lowrank/test_switching.py::test_steps_after_a_freeze",), "not close"),
    Mutant(
        "switches_column_against_the_old_row",
        ("tests/lowrank/test_switching.py::test_many_switches_keep_the_function[rows1-columns1-dtype1-1e-06]",),
        "not close",
    ),
    Mutant("switches_reset_what_is_switched", (f"{SWITCHES_IN_PLAIN}[1-1]",), "losses differ by"),
    Mutant("switches_candidates_of_each_rank", (f"{SWITCHES_IN_PLAIN}[0-1]",), "assert"),
    Mutant(
        "switches_of_a_skipped_step",
        (f"{SWITCHES}::test_a_step_that_is_not_finite_on_one_rank_changes_nothing[1-bf16-inf]",),
        "assert",
    ),
    Mutant(
        "switches_counts_not_restored", (f"{SWITCHES}::test_a_resume_to_the_bit_within_a_freeze[1-bf16]",), "assert"
    ),
    # The training step.
    Mutant(
        "logits_kept_alive",
        ("tests/training/test_step.py::test_a_step_takes_the_bytes_of_one_micro_batch_of_logits",),
        "< 12.5",
    ),
    Mutant(
        "state_of_the_batch_ahead",
        ("tests/data/test_prefetch.py::test_batches_and_states_are_those_of_the_loader[True]",),
        "assert",
    ),
    # On GPUs.
    Mutant("gathers_not_ordered", ("tests/zero/test_streams.py",), "['gather'"),
    Mutant(
        "fp8_operand_by_columns",
        ("tests/lowrank/test_formats.py::test_fp8_operands_lie_in_memory_as_cuda_wants_them[by columns]",),
        "must be row_major",
    ),
    Mutant(
        "packed_rows_see_each_other",
        ("tests/zero/test_attention_mask.py::test_results_are_the_models_own[packed, by name]",),
        "torch.equal",
    ),
    Mutant(
        "mixture_of_drawn_corpora",
        ("tests/data/test_order.py::test_a_mixture_is_never_a_whole_row_away_from_its_proportions",),
        "assert np.float64(",
    ),
    Mutant(
        "mixture_of_one_permutation",
        ("tests/data/test_order.py::test_corpora_of_one_size_have_permutations_of_their_own",),
        "assert list(rows[rows < 50])",
    ),
    Mutant(
        "mixture_loss_of_means",
        (
            "tests/training/test_mixture_run.py::test_the_loss_of_a_mixture_is_that_of_all_its_corpora_and_each_has_its_own",
        ),
        'assert summary["val_',
    ),
    Mutant("masks_predict_first_tokens", (f"{MASKS}[llama-sdpa]",), "assert_same"),
    Mutant("masks_positions_run_on", (f"{MASKS}[llama-sdpa]",), "assert_same"),
    Mutant(
        "masks_mean_of_each_rank",
        ("tests/data/test_masks.py::test_the_mean_is_over_the_predicted_tokens_of_all_ranks[2-3]",),
        "the same for every micro-batch",
    ),
    Mutant(
        "masks_bounds_of_rows",
        ("tests/models/test_attention.py::test_flash_attention_keeps_the_documents_of_all_rows_apart[3-llama]",),
        "assert_same",
    ),
    Mutant("merges_in_tf32", ("tests/lowrank/test_precision.py",), "products.are_exact()"),
    # Guards.
    Mutant("non_finite_merge_goes_on", (f"{GUARD}::test_a_merge_that_is_not_finite_is_refused[1-fp32]",), "in 1 of"),
    Mutant("spike_applied", (f"{GUARD}::test_skip[1]",), "assert"),
    Mutant("spike_window_not_saved", (f"{GUARD}::test_the_window_goes_with_the_checkpoint",), "IndexError"),
    Mutant(
        "rollback_rewinds_the_data",
        (f"{GUARD}::test_rollback_is_a_resume_with_later_data",),
        "times back to step 40",
    ),
    # What only GPUs refuse, on emulated ones.
    Mutant("gpu_gather_on_the_host", (f"{ON_GPUS}[stage 1]",), "on the host: No backend type"),
    Mutant("gpu_flags_on_the_host", (f"{ON_GPUS}[stage 1]",), "on the host: No backend type"),
    Mutant("gpu_merge_on_the_host", (f"{ON_GPUS}[stage 1]",), "could not merge"),
    Mutant("gpu_batch_on_the_host", (f"{ON_GPUS}[stage 1]",), "on the same device, but aten.embedding"),
    Mutant("gpu_numpy", (f"{ON_GPUS}[stage 1]",), "can't convert cuda device type tensor to numpy"),
    Mutant("gpu_current_one_not_set", (f"{ON_GPUS}[stage 1]",), "FAILED"),  # the rank dies before it can say why
    Mutant("gpu_int16_flags", (f"{ON_GPUS}[stage 1]",), "of a dtype that it lacks, torch.int16"),
    Mutant("gpu_host_generator", (f"{ON_GPUS}[stage 2, no masters, A from gradients]",), "could not merge"),
    Mutant("gpu_sketch_on_the_host", (f"{ON_GPUS}[stage 2, no masters, A from gradients]",), "on the same device"),
    Mutant("gpu_offloaded_moments", (f"{ON_GPUS}[optimizer offloaded]",), "on the same device"),
    Mutant("gpu_state_left_there", (f"{ON_GPUS}[stage 1]",), 'result["collected on the GPU"] == []'),
    Mutant("gpu_optimizer_state_kept", (f"{ON_GPUS}[stage 1]",), 'result["left"] <= 64'),
    Mutant("gpu_strided_broadcast", (f"{ON_GPUS}[stage 3, A random]",), "that is not contiguous"),
    Mutant("gpu_fp8_codes_by_rows", (f"{ON_GPUS}[fp8, which multiplies]",), "mat2 must be col_major"),
    Mutant("gpu_buffers_kept", (f"{ON_GPUS}[int8, replicated]",), 'result["left"] <= 64'),
    Mutant("gpu_masters_in_powers_of_two", (f"{ON_GPUS}[stage 1]",), '"page-locked a weight"'),
    Mutant("gpu_waited_for_each_micro_step", (STEP_ON_GPUS,), "WAITS.get(place, 0)"),
    Mutant("gpu_mask_searched", (STEP_ON_GPUS,), "WAITS.get(place, 0)"),
    Mutant("gpu_batch_waited_for", (STEP_ON_GPUS,), "WAITS.get(place, 0)"),
]
