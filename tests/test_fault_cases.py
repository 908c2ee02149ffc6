"""Where each fault of trainer, rewards, data, settings and command line is made to happen: case number -> tests.

A case is a promise; its tests inject the fault and look at what is left. The cases of single ops (wrong ids, odd shapes, extreme
numbers, fork, threads, missing libraries) stand with the ops.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

CASES: dict[int, dict[str, tuple[str, ...]]] = {
    # kill -9 at points of a save, and within a step
    27: {
        "train/test_resume.py": (
            "test_case_27_at_least_ten_points_of_a_save_are_covered",
            "test_case_27_28_a_killed_run_resumes_to_the_same_bits",
        ),
        "train/test_checkpoint.py": (
            "test_kill_at_any_point_of_a_save_leaves_the_previous_or_the_new_checkpoint",
            "test_kill_while_saving_the_first_checkpoint_again_loses_nothing",
            "test_kill_between_the_two_renames_of_a_replacement_puts_the_old_one_back",
        ),
    },
    28: {
        "train/test_resume.py": ("test_case_27_28_a_killed_run_resumes_to_the_same_bits",),
        "train/test_every_trainer_resumes.py": (
            "test_case_28_37_38_every_trainer_goes_on_bit_for_bit_after_a_kill_and_does_so_twice",
        ),
    },
    # disk full; folder read-only or deleted
    29: {
        "train/test_checkpoint_disk.py": (
            "test_full_disk_is_a_warning_once_and_an_error_the_second_time",
            "test_file_size_limit_of_the_system_behaves_like_a_full_disk",
            "test_too_little_free_space_is_noticed_before_writing",
        ),
        "train/test_run_faults.py": ("test_case_29_a_full_disk_costs_one_checkpoint_and_two_in_a_row_stop_the_run",),
    },
    30: {
        "train/test_checkpoint_disk.py": (
            "test_read_only_folder_is_a_warning_once_and_an_error_the_second_time",
            "test_folder_deleted_at_run_time_is_made_again_with_a_warning",
        ),
        "train/test_run_faults.py": ("test_case_30_a_folder_deleted_at_run_time_is_made_again",),
    },
    # damaged, foreign and pickled checkpoints
    31: {
        "train/test_checkpoint_damage.py": (
            "test_damaged_newest_checkpoint_is_passed_over_with_a_warning",
            "test_every_flipped_bit_of_the_manifest_is_noticed",
            "test_no_whole_checkpoint_left_is_an_error_that_lists_why",
        ),
        "train/test_run_faults.py": (
            "test_case_31_a_resume_passes_over_a_damaged_checkpoint_and_never_starts_from_scratch",
        ),
    },
    32: {
        "train/test_checkpoint_damage.py": (
            "test_differing_field_is_refused_by_its_name_and_nothing_older_is_tried",
            "test_newer_format_is_refused_by_its_version",
        ),
        "train/test_run_faults.py": (
            "test_case_32_38_53_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs",
        ),
    },
    33: {
        "train/test_checkpoint_damage.py": (
            "test_pickle_offered_as_a_checkpoint_is_refused_unopened",
            "test_nothing_in_the_package_loads_pickles",
        ),
    },
    # signals, numbers that are not finite, memory
    34: {
        "train/test_resume.py": ("test_case_34_a_signal_saves_and_ends_with_its_status",),
        "train/test_run_faults.py": (
            "test_case_34_39_a_second_run_is_refused_and_a_second_signal_ends_the_first_with_a_whole_checkpoint",
        ),
    },
    35: {
        "train/test_run_faults.py": (
            "test_case_35_an_update_that_is_not_finite_changes_nothing_and_names_its_records",
            "test_case_35_too_many_in_a_row_stop_the_run_with_their_records_written",
        ),
    },
    36: {
        "train/test_run_faults.py": (
            "test_case_36_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient",
            "test_case_36_where_it_cannot_be_halved_the_run_stops_with_a_checkpoint",
            "test_case_36_memory_that_the_system_refuses_is_told_from_other_errors",
            "test_case_36_ppo_halves_too",
        ),
    },
    # exact resume, one run a folder, clocks, sinks
    37: {
        "train/test_run_faults.py": ("test_case_37_twenty_losses_after_a_resume_in_mid_epoch_are_the_same_bits",),
        "train/test_every_trainer_resumes.py": (
            "test_case_28_37_38_every_trainer_goes_on_bit_for_bit_after_a_kill_and_does_so_twice",
        ),
        "train/test_resume.py": ("test_a_resumed_run_logs_every_step_once_with_the_same_numbers",),
    },
    38: {
        "train/test_every_trainer_resumes.py": (
            "test_case_28_37_38_every_trainer_goes_on_bit_for_bit_after_a_kill_and_does_so_twice",
        ),
        "train/test_run_faults.py": (
            "test_case_32_38_53_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs",
            "test_case_38_changed_code_is_told_at_resume",
            "test_case_38_a_changed_reward_function_is_told_at_resume",
        ),
    },
    39: {
        "train/test_run_folder.py": (
            "test_second_run_on_a_folder_is_refused_with_the_process_id",
            "test_lock_of_a_killed_run_is_taken_over_with_a_warning",
            "test_lock_does_not_outlive_the_run_in_a_forked_worker",
        ),
        "train/test_run_faults.py": (
            "test_case_34_39_a_second_run_is_refused_and_a_second_signal_ends_the_first_with_a_whole_checkpoint",
        ),
    },
    40: {
        "train/test_run_faults.py": ("test_case_40_jumps_of_the_clock_and_of_the_time_zone_change_nothing",),
        "train/test_checkpoint.py": ("test_newest_two_are_kept_by_number_not_by_name_or_time",),
        "train/test_monitor.py": ("test_jumps_of_the_wall_clock_do_not_matter",),
    },
    41: {
        "train/test_monitor.py": (
            "test_failing_sink_is_dropped_with_one_warning_and_the_others_go_on",
            "test_closed_pipe_on_standard_output_ends_no_run",
            "test_full_device_on_standard_output_ends_no_run",
        ),
        "train/test_run_faults.py": ("test_case_41_a_sink_that_fails_costs_the_sink_alone",),
    },
    # reward functions
    42: {
        "train/test_reward_workers.py": (
            "test_case_42_what_raises_costs_its_own_completion_and_is_logged_once",
            "test_case_42_over_the_limit_the_search_ends_and_the_run_stops",
            "test_case_42_functions_that_compare_a_batch_are_not_asked_again",
        ),
        "train/test_run_faults.py": ("test_case_42_a_run_that_stops_for_its_rewards_keeps_every_step_before",),
    },
    43: {
        "train/test_reward_workers.py": (
            "test_case_43_48_a_hang_or_a_crash_costs_its_completion_and_the_worker_is_replaced",
            "test_case_43_what_the_function_started_is_ended_too",
            "test_case_43_nothing_is_left_when_the_pool_goes",
            "test_case_43_the_trainer_ends_at_once_and_takes_its_workers_along",
            "test_case_43_a_worker_that_nothing_can_interrupt_does_not_outlive_a_killed_trainer_for_long",
        ),
        "train/test_reward_server.py": (
            "test_what_may_pass_is_tried_again_after_growing_pauses",
            "test_retries_are_bounded_and_the_failure_says_why",
        ),
    },
    44: {
        "train/test_reward_workers.py": (
            "test_case_44_numbers_of_every_kind_count_and_none_nan_and_inf_are_unscorable",
            "test_case_44_45_what_is_no_list_of_one_number_each_is_refused_with_both_counts",
        ),
        "train/test_reward_server.py": ("test_null_is_unscorable",),
    },
    45: {
        "train/test_reward_workers.py": (
            "test_case_44_45_what_is_no_list_of_one_number_each_is_refused_with_both_counts",
            "test_case_45_a_refused_result_does_not_cost_the_calls_that_ran_beside_it",
        ),
        "train/test_reward_server.py": ("test_an_answer_that_breaks_the_contract_stops_the_run",),
        "train/test_process_rewards.py": ("test_what_is_no_list_of_one_number_for_each_step_is_refused_and_named",),
    },
    46: {
        "train/test_reward_workers.py": (
            "test_case_46_the_function_gets_lists_of_its_own",
            "test_case_46_megabytes_of_output_are_taken_and_cut",
            "test_case_46_there_is_nothing_to_read_for_it",
        ),
    },
    47: {
        "train/test_scoring_faults.py": (
            "test_case_47_a_batch_with_unscorable_completions_is_the_smaller_batch",
            "test_case_47_a_batch_without_any_score_moves_nothing",
            "test_case_47_a_group_without_any_score_is_dropped_and_leaves_the_others_alone",
        ),
        "train/test_reward_workers.py": (
            "test_case_47_scores_beyond_fp32_are_unscorable_and_a_mix_needs_all_its_parts",
        ),
    },
    48: {
        "train/test_reward_workers.py": (
            "test_case_43_48_a_hang_or_a_crash_costs_its_completion_and_the_worker_is_replaced",
            "test_case_48_the_last_words_of_a_crash_are_logged",
        ),
    },
    49: {
        "train/test_scoring_faults.py": (
            "test_case_49_every_way_a_completion_can_end_has_a_length_a_mask_and_a_reward",
        ),
        "rollout/test_generate.py": ("test_item_5_a_completion_ends_with_its_first_eos_and_the_rest_is_padding",),
    },
    # data
    50: {
        "test_data.py": (
            "test_malformed_line_stops_with_place_or_is_counted",
            "test_bom_crlf_and_missing_last_line_end_are_accepted_without_loss",
            "test_other_encodings_are_refused_in_both_modes",
        ),
    },
    51: {
        "test_data.py": ("test_malformed_line_stops_with_place_or_is_counted",),
        "test_data_records.py": (
            "test_malformed_prompt_says_what_is_expected",
            "test_malformed_chat_says_what_is_expected",
            "test_malformed_pair_says_what_is_expected",
        ),
    },
    52: {
        "test_data_records.py": ("test_malformed_prompt_says_what_is_expected",),
        "test_data_encode.py": (
            "test_overlong_policies_stop_skip_or_cut_and_count",
            "test_pairs_cut_the_prompt_from_the_left_then_the_answers_from_the_right",
        ),
    },
    53: {
        "test_data.py": ("test_empty_file_is_an_error", "test_file_that_changes_while_read_is_an_error"),
        "train/test_run_faults.py": (
            "test_case_32_38_53_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs",
        ),
    },
    54: {
        "test_data.py": (
            "test_line_over_16_mb_is_refused_in_bounded_memory",
            "test_malformed_line_stops_with_place_or_is_counted",
        ),
    },
    55: {"test_data_records.py": ("test_pairs_without_a_preference_are_skipped_and_counted_in_both_modes",)},
    # settings and command line
    56: {
        "test_config.py": (
            "test_wrong_override_is_one_line_naming_key_got_and_expected",
            "test_wrong_file_is_one_line_naming_file_line_and_key",
            "test_alias_bomb_is_refused_before_expansion",
            "test_every_spelling_of_a_small_number_is_a_float",
        ),
    },
    57: {
        "test_cli.py": ("test_case_57_a_used_folder_is_refused_and_one_that_no_run_made_is_never_emptied",),
        "train/test_run_folder.py": (
            "test_used_output_folder_needs_resume_or_overwrite",
            "test_overwrite_waits_for_no_living_run_and_follows_no_link",
        ),
        "train/test_checkpoint_damage.py": ("test_manifest_cannot_lead_out_of_the_folder",),
    },
    58: {
        "test_cli.py": (
            "test_case_58_an_output_without_a_reader_ends_quietly",
            "test_case_58_an_output_that_cannot_spell_a_name_fails_no_run",
        ),
        "train/test_monitor.py": (
            "test_closed_pipe_on_standard_output_ends_no_run",
            "test_real_terminal_shows_bar_and_table_in_its_locale",
        ),
    },
    59: {
        "test_cli.py": (
            "test_case_59_a_run_that_is_done_exits_with_0_and_tells_where",
            "test_case_59_what_cannot_be_understood_exits_with_2_and_one_line",
            "test_case_59_a_run_that_fails_exits_with_1_and_one_line_or_a_traceback_if_asked",
            "test_case_59_every_end_has_its_status",
        ),
        "train/test_resume.py": ("test_case_34_a_signal_saves_and_ends_with_its_status",),
    },
    # several ranks: one that dies or hangs, without rows, with NaN, of another run, with another number of them, slow
    60: {
        "train/test_ranks.py": (
            "test_case_60_a_rank_that_dies_ends_the_others_by_its_name_and_leaves_a_whole_checkpoint",
            "test_case_60_what_a_rank_raises_is_told_by_the_others",
            "test_case_60_a_rank_that_never_comes_is_named_after_the_timeout",
            "test_case_60_a_rank_that_hangs_ends_the_run_after_the_timeout",
        ),
    },
    61: {
        "train/test_ranks.py": ("test_case_61_ranks_without_rows_hang_nobody_and_the_numbers_are_those_of_one",),
    },
    62: {"train/test_ranks.py": ("test_case_62_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all",)},
    63: {"train/test_ranks.py": ("test_case_63_ranks_that_are_not_of_one_run_stop_at_the_start",)},
    64: {"train/test_ranks.py": ("test_case_64_a_run_goes_on_with_another_number_of_ranks",)},
    65: {"train/test_ranks.py": ("test_case_65_a_slow_rank_is_named_and_waited_for",)},
}

OPEN: dict[int, str] = {}
"""Cases without a test, and why."""


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_case_has_tests_or_a_reason():
    assert sorted([*CASES, *OPEN]) == list(range(27, 66))


@pytest.mark.parametrize("case", CASES)
def test_the_tests_of_a_case_are_there(case):
    assert CASES[case] and all(CASES[case].values())
    for file, names in CASES[case].items():
        assert set(names) <= names_in(file), f"{file} has no {set(names) - names_in(file)}"


def test_a_test_that_names_a_case_is_listed_under_it():
    for file in {file for files in CASES.values() for file in files}:
        for name in names_in(file):
            if not name.startswith("test_case_"):
                continue
            words = name.removeprefix("test_case_").split("_")
            for word in words[: next(i for i, w in enumerate(words) if not w.isdigit())]:
                assert name in CASES[int(word)].get(file, ()), f"{file}: {name}"
