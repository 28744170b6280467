"""Tests that ``make test`` leaves to ``make test-wide``: the rest of cross products, and what takes long to show.

``make test`` is what everybody runs before each commit: of a row with parameters it shows the kinds that differ most. A
row without any is shown only where it is decided whether a change goes in (``.ci/run``), some with nothing like it by
day: pytest's plugin for stores, broken invariants, huge bodies, signals under load,
examples. A row is a test, and which of its parameters (a regular expression that must match the whole id; none: all).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

IDLE = pytest.StashKey[list[str]]()
"""Where whole files were collected: what :func:`idle_rows` found; ``tests/test_house.py`` looks at it."""

WIDE: dict[str, dict[str, str]] = {
    "cache/test_adaptive.py": {
        "test_it_is_near_the_best_fixed_policy_whatever_that_is": "shared-prompts",
    },
    "cache/test_cost.py": {
        "test_evicting_one_leaf_costs_the_same_among_many": "python",
    },
    "cache/test_fuzz.py": {
        "test_both_cores_do_the_same": "1",
        "test_thousands_of_steps_by_seed": "[13]",
    },
    "cache/test_limits.py": {
        "test_evictions_beyond_what_is_remembered": "",
        "test_samples_beyond_what_a_shadow_remembers": "",
    },
    "cache/test_mutations.py": {
        "test_a_broken_invariant_is_noticed": "",
        "test_the_same_calls_give_the_same_states_in_every_process": "",
    },
    "cache/test_native_core.py": {
        "test_a_prompt_that_never_changes_is_not_copied_and_is_held_as_long_as_it_is_cached": "",
        "test_memory_is_a_token_id_a_token": "",
        "test_what_comes_and_goes_takes_no_memory_in_the_end": "",
        "test_what_runs_when_memory_is_let_go_may_use_the_cache": "",
    },
    "cache/test_peers.py": {
        "test_pieces_learned_in_order_leave_what_one_event_a_kind_would": "python-.*",
    },
    "demo/test_model.py": {
        "test_answers_after_a_long_manual": "",
        "test_knows_nearly_every_fact": "",
    },
    "engine/test_accelerator_backends.py": {
        "test_it_goes_on_with_what_a_cpu_cached": "",
        "test_recurrent_states_go_through_its_steps_where_they_lie": "",
    },
    "engine/test_control.py": {
        "test_an_engine_that_was_not_closed_ends_with_the_program_and_says_nothing": "",
        "test_no_compilation_in_steady_state": "",
    },
    "engine/test_engine.py": {
        "test_a_bias_forces_and_bans_and_compiles_nothing_new": "",
    },
    "engine/test_equivalence.py": {
        "test_every_family_answers_as_transformers": "llama3.*|llama2.*",
        "test_page_size_chunk_and_batch": "1-64-16-2-auto|64-64-16-4-auto|16-(256-16-16|7-16-2)-auto|64-16-1-1-xla",
    },
    "engine/test_grammar.py": {
        "test_a_json_schema_is_followed": "sampling1",
        "test_after_a_warm_up_grammars_compile_nothing": "",
    },
    "engine/test_host_tier.py": {
        "test_a_host_smaller_than_the_device_keeps_what_fits": "",
        "test_what_the_device_evicted_is_loaded_and_gives_the_same_tokens": "llama4|deepseek3|bamba",
        "test_whatever_breaks_between_the_tiers_no_token_is_wrong_and_nothing_is_left_behind": "llama4|deepseek3",
    },
    "engine/test_hybrid.py": {
        "test_a_window_or_chunk_holds_what_its_rule_says": "(llama4|gpt-oss).*",
        "test_after_only_windows_chunks_or_states_were_evicted": "",
        "test_cold_and_from_the_cache": ".*llama4",
        "test_other_families_cold_and_from_the_cache": "gemma2",
        "test_latents_cold_and_from_the_cache": "",
    },
    "engine/test_routing.py": {
        "test_a_decode_node_has_those_that_the_prefill_node_computed": "",
        "test_over_http_and_refused_where_they_are_not_kept": "",
        "test_they_are_those_of_a_plain_forward_wherever_the_prompt_was_cached": "",
        "test_they_survive_retraction_and_end_with_what_was_computed": "",
    },
    "models/test_absurd_configs.py": {
        "test_an_absurd_field_is_refused_or_makes_a_model": "qwen[23]-moe|olmo2|glm4.*|smollm3|llama2|mistral",
    },
    "models/test_golden.py": {
        "test_greedy_tokens_and_prompt_logprobs_equal_transformers": "qwen[23]-moe|olmo2|glm4.*|smollm3",
    },
    "engine/test_identity.py": {
        "test_weights_without_a_name_are_one_runs_and_one_updates": "",
    },
    "engine/test_lifecycle.py": {
        "test_drop_and_rebuild_the_cache": "False",
        "test_many_cycles_under_load": "",
        "test_release_with_work_in_flight": "wait",
    },
    "engine/test_invariance.py": {
        "test_logprobs_of_a_prompt_are_those_that_it_had_as_an_answer": "gemma3",
        "test_random_schedules_change_no_bit": "",
    },
    "engine/test_logprobs_mode.py": {
        "test_a_warm_up_compiles_all_of_it": "",
        "test_they_are_of_the_distribution_after_temperature_and_truncation": "0.6--1|0--1",
    },
    "engine/test_memory.py": {
        "test_never_beyond_the_budget_and_never_a_refusal_of_what_fits": "",
        "test_over_a_mesh_no_device_gathers_the_vocabulary": "",
        "test_packed_weights_are_written_out_one_after_the_other": "",
        "test_the_bound_is_above_what_the_compiler_says": "bfloat16",
    },
    "engine/test_everything.py": {
        "test_whatever_is_drawn_answers_as_one_plain_engine": "0-3",
    },
    "engine/test_narrow_kv.py": {
        "test_answers_are_the_same_wherever_the_pages_came_from": "(?!qwen2-int8).*",
        "test_the_plan_is_what_the_engine_allocates": "(?!k8v4).*",
    },
    "engine/test_nodes_that_fail.py": {
        "test_a_kill_a_stop_or_a_cut_at_any_moment": "",
        "test_nodes_of_unlike_numbers_of_devices": "",
    },
    "engine/test_overlap.py": {
        "test_under_little_memory_and_with_few_rows_the_answers_are_the_same": "",
    },
    "engine/test_overlap_models.py": {
        "test_after_an_abort_and_a_retraction_the_others_go_on": "",
        "test_answers_and_logprobs_are_equal": "",
        "test_nothing_compiles_that_steps_without_overlap_had_not_compiled": "",
    },
    "engine/test_pictures.py": {
        "test_a_decode_node_encodes_nothing_where_text_goes_on_for_a_page": "",
        "test_answers_are_the_same_from_every_tier": "qwen3-5",
        "test_answers_equal_transformers_cold_and_cached": "(gemma3-seeing|qwen3-5)-.*",
        "test_after_warming_up_nothing_compiles_for_an_image": "",
        "test_vectors_that_leave_the_device_come_from_host_memory": "",
    },
    "engine/test_partial_rollouts.py": {
        "test_a_pause_changes_no_token": "in_place",
        "test_answers_while_weights_are_pushed": "",
    },
    "engine/test_quantization.py": {
        "test_integers_take_less_and_answer_as_the_weights_that_they_stand_for": "w4-.*",
    },
    "engine/test_ranks.py": {
        "test_a_rank_that_follows_refuses_callers_and_ends_with_rank_0": "",
        "test_a_rank_whose_store_fails_costs_hits_and_nothing_else": "",
        "test_grammars_stop_strings_and_draws_are_the_same_on_all_ranks": "",
        "test_ranks_that_are_not_alike_do_not_start": "",
        "test_ranks_with_stores_of_their_own_the_least_counts_and_a_slow_rank_is_waited_for": "",
        "test_two_processes_answer_as_one_and_share_its_store": "",
    },
    "engine/test_recurrent.py": {
        "test_the_same_tokens_cold_cached_and_without_the_states": "qwen3-next.*",
        "test_the_same_tokens_where_they_are_guessed": "qwen3-next.*",
        "test_the_same_tokens_with_the_cache_off": "",
    },
    "engine/test_repacking.py": {
        "test_every_familys_tensors_become_its_params": "(?!qwen2|gpt-oss).*",
    },
    "engine/test_shared_pool.py": {
        "test_a_long_request_takes_the_room_that_windows_leave": "",
        "test_answers_do_not_depend_on_the_arena": "",
        "test_dropped_and_rebuilt": "",
        "test_the_map_and_the_occupancy_are_those_of_the_pool": "",
    },
    "engine/test_speculation.py": {
        "test_windows_chunks_and_latents_verify_guesses": "",
    },
    "engine/test_storage_backend.py": {
        "test_a_server_started_again_on_its_store_hits_what_was_cached_before": "(?!gemma3).*",
        "test_at_the_end_what_only_the_device_has_is_saved_where_that_is_asked_for": "",
        "test_what_one_attention_backend_wrote_another_reads": "",
        "test_whatever_a_store_does_no_token_is_wrong_and_nothing_is_left_behind": "",
    },
    "engine/test_tensor_parallel.py": {
        "test_answers_equal_transformers": "gpt-oss.*",
        "test_guesses_are_verified_with_states_that_are_whole_on_each_device": "",
        "test_latents_are_whole_on_each_device_and_no_expert_is_gathered": "",
        "test_recurrent_layers_are_whole_on_each_device_and_attention_beside_them_is_split": "",
        "test_what_one_number_of_devices_stored_another_reads": "",
        "test_what_one_number_of_devices_stored_in_few_bits_another_reads": "",
    },
    "engine/test_trace_log.py": {
        "test_a_recorded_trace_replays_to_the_same_hit_rate_and_holds_no_text": "",
    },
    "engine/test_two_nodes.py": {
        "test_a_prefill_node_that_ends_meanwhile": "",
        "test_after_one_that_does_not_fit_another_is_waited_for_and_no_longer_than_a_dead_one": "",
        "test_a_prompts_first_chunks_have_come_when_its_last_one_is_computed": "",
        "test_a_step_that_fails_ends_what_was_offered_and_nothing_else": "",
        "test_every_family_cold_cached_and_a_turn_later": "",
        "test_logprobs_and_streams_are_the_decode_nodes_own": "",
        "test_nodes_of_unlike_attention_and_cached_in_few_bits": "",
        "test_nodes_that_are_not_alike_refuse_with_both_values": "",
        "test_prompts_about_as_long_as_a_page": "1|2|16",
        "test_of_a_conversation_each_node_has_the_turns_before_from_their_store": "",
        "test_whatever_the_wire_does_no_token_is_wrong_and_the_next_request_works": "",
        "test_who_is_retracted_comes_back_without_prefill_and_who_runs_is_not_retracted": "",
        "test_whoever_waits_too_long_is_told": "",
    },
    "engine/test_warmup.py": {
        "test_a_first_request_finds_its_programs_and_the_rest_follows": "",
        "test_logprobs_compile_nothing_after_warm_up": "",
    },
    "grammars/test_attempts.py": {
        "test_random_grammars_never_end_the_process": "",
    },
    "integrations/test_tunix_trees.py": {
        "test_a_tree_of_tunix_becomes_ours": "(?!qwen2).*",
    },
    "misses/test_log.py": {
        "test_the_three_habits_are_the_costliest": "1000",
    },
    "ops/test_attention.py": {
        "test_matches_reference": "xla-(1|64)-.*",
        "test_step_memory_does_not_grow_with_the_pool": "(sliding_window-4-1|full-1-1)-xla",
        "test_windows_chunks_and_sinks_match_reference": "xla-1-.*",
    },
    "ops/test_paged.py": {
        "test_each_kind_matches_reference": "(?!bfloat16|window-prefill).*",
        "test_latents_match_reference": "tpu",
    },
    "ops/test_state_ops.py": {
        "test_a_packed_batch_equals_the_recurrence": "Ssd-lengths[0124]-.*|Delta-lengths[5679]-.*",
        "test_step_memory_does_not_grow_with_the_pool": "(Ssd|Delta|Conv)-[14]-1|.*InOrder-1-1",
    },
    "plan/test_sizing.py": {
        "test_never_beyond_the_budget_and_never_a_refusal_of_what_fits": "",
        "test_states_get_their_share_but_no_more": "",
    },
    "pools/test_copying.py": {
        "test_images_do_not_depend_on_the_devices": "",
        "test_pages_come_back_as_they_were": ".*(float16-Blocks|-fp._.*|-int8-.*)|states-k8v4.*",
    },
    "pools/test_narrow.py": {
        "test_a_token_is_read_where_it_was_written_and_nothing_else_is_touched": "heads-(?!k8v4).*|latents-fp8.*",
        "test_attention_is_that_over_what_was_read": ".*-heads-(?!k8v4).*|xla-latents-fp8.*",
    },
    "runner/test_sampler.py": {
        "test_processed_logprobs_are_those_of_what_tokens_are_drawn_from": "params[0134]",
    },
    "server/test_access.py": {
        "test_every_route_by_every_spelling": "none-None|(admin_)?api_key-None|both-.",
    },
    "server/test_connections.py": {
        "test_a_byte_now_and_then_wins_no_time": "",
        "test_all_who_ask_for_health_share_one_check": "",
        "test_who_does_not_read_is_given_up": "",
    },
    "server/test_docs.py": {
        "test_every_curl_line_works": "",
    },
    "server/test_messages.py": {
        "test_what_is_to_be_kept_outlasts_a_flood_and_no_longer_than_it_should": "",
    },
    "server/test_native.py": {
        "test_a_pinned_prefix_stays_and_its_time_ends": "",
    },
    "server/test_observe.py": {
        "test_the_page_brings_all_it_needs": "/docs-4",
    },
    "server/test_page.py": {
        "test_a_narrow_window_is_readable": "",
        "test_a_page_that_is_opened_later_shows_the_minutes_before": "",
        "test_a_server_with_a_key_is_asked_for_it_once": "",
        "test_numbers_move_while_requests_run": "",
        "test_the_report_shows_what_was_computed_again_and_why": "",
        "test_what_goes_between_nodes_is_shown_as_bytes_a_second": "",
        "test_the_tree_is_walked_by_keyboard": "",
        "test_two_chats_share_the_system_message_and_the_tree_shows_it": "",
    },
    "server/test_process.py": {
        "test_a_crowd_of_clients_of_which_a_third_goes_away_and_the_last_is_answered_before_the_end": "",
        "test_sigterm_under_load_leaves_nobody_without_an_answer": "",
        "test_the_banner_is_written_once_requests_are_taken_and_a_second_signal_ends_the_drain": "",
    },
    "server/test_responses.py": {
        "test_a_conversation_that_may_go_on_is_pinned_and_a_later_turn_takes_its_place": "",
    },
    "server/test_safety.py": {
        "test_a_full_queue_says_when_to_come_back": "",
        "test_a_slow_reader_holds_up_nobody_and_misses_nothing": "",
        "test_one_wrong_thing_anywhere_in_a_body": "",
        "test_what_the_schema_allows_and_what_it_does_not": "",
    },
    "server/test_sampling_defaults.py": {
        "test_the_embedded_models_recommendation_is_one_that_it_can_bear": "",
    },
    "server/test_sizes.py": {
        "test_one_huge_thing_anywhere_in_a_body": "",
    },
    "server/test_starting.py": {
        "test_a_signal_while_loading_is_obeyed_at_once": "",
        "test_progress_is_told_and_first_requests_are_taken_before_all_is_compiled": "",
    },
    "server/test_storage_crash.py": {
        "test_a_server_that_is_killed_while_it_writes": "",
    },
    "server/test_two_servers.py": {
        "test_a_client_that_goes_away_frees_both_nodes": "",
        "test_a_url_needs_a_decode_node": "",
        "test_every_route_is_answered_with_what_the_other_node_computed": "",
        "test_one_timeline_shows_a_request_on_both_nodes": "",
        "test_routers_may_say_where_a_prompt_is_computed": "",
        "test_two_commands_are_a_system_that_outlives_either_node": "",
        "test_what_the_prefill_node_refuses_is_said": "",
    },
    "server/test_tenants.py": {
        "test_keys_may_share_the_cache_and_nothing_else": "",
        "test_what_is_shown_is_ones_own": "False",
    },
    "sim/test_replay.py": {
        "TestCommand::test_figure_and_table": "",
        "test_the_optimum_is_the_best_of_all_choices": "",
    },
    "test_benchmarks.py": {
        "test_the_cache_benchmark_measures_every_row": "",
        "test_the_file_store_is_measured_beside_its_medium": "",
        "test_what_auto_takes_is_not_the_slow_one": "",
    },
    "test_examples.py": {
        "test_http_rollout": "",
        "test_rl_rollout": "",
    },
    "test_house.py": {
        "test_the_wheel_builds_with_and_without_a_compiler": "",
    },
    "test_site.py": {
        "test_python_of_the_guides_runs": "",
    },
    "text/test_tokenizer.py": {
        "test_the_pieces_equal_the_whole": "sentencepiece",
    },
    "tiers/test_aibrix_store.py": {
        "test_it_is_started_again_and_leaves_nothing_open": "",
        "test_one_that_hangs_while_it_opens_ends_with_whoever_started_it": "",
    },
    "tiers/test_store_conformance.py": {
        "test_a_users_own_store_is_tried_by_one_command": "",
    },
    "tiers/test_store_crash.py": {
        "test_a_writer_that_is_killed": "True",
    },
    "tiers/test_store_settings.py": {
        "test_nothing_of_a_store_is_imported_before_it_is_chosen": "",
    },
    "tiers/test_store_traffic.py": {
        "test_whatever_a_store_does_no_request_reads_other_bytes_and_everything_is_reported_once": ".*-1|python-.*",
    },
    "server/test_weight_updates.py": {
        "test_a_trainer_in_another_process_pushes_from_its_devices": "",
    },
    "transfer/test_events.py": {
        "test_an_engine_tells_of_what_it_caches": "",
    },
    "transfer/test_rooms.py": {
        "test_a_wire_that_breaks_ends_rooms_and_never_gives_other_bytes": ".*-[123]",
    },
    "transfer/test_wires.py": {
        "test_one_process_lends_and_another_fetches_by_jax": "",
    },
}  # fmt: skip


def is_wide(nodeid: str) -> bool:
    """Whether ``make test`` leaves out the test of this id, as pytest writes it."""
    path, name, parameters = _parts(nodeid)
    which = WIDE.get(path, {}).get(name)
    return which == "" or (which is not None and re.fullmatch(which, parameters) is not None)


def idle_rows(nodeids: Iterable[str]) -> list[str]:
    """Rows that leave out none of these, though all of their files' tests are among them."""
    seen = [(_parts(nodeid), is_wide(nodeid)) for nodeid in nodeids]
    files = {path for (path, _, _), _ in seen}
    used = {(path, name) for (path, name, _), wide in seen if wide}
    return [f"{path}::{name}" for path in WIDE if path in files for name in WIDE[path] if (path, name) not in used]


def _parts(nodeid: str) -> tuple[str, str, str]:
    test, _, parameters = nodeid.removeprefix("tests/").partition("[")
    path, _, name = test.partition("::")
    return path, name, parameters.removesuffix("]")
