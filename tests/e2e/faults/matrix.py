"""The rows of the fault matrix, and the tests that show them.

The numbers are those of `docs/reliability.md`. F34, an audit log that somebody has changed, is missing: there is no
such log yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
E2E = "tests/e2e"
HERE = f"{E2E}/faults"


@dataclass(frozen=True, slots=True)
class Row:
    """One fault."""

    number: str
    fault: str
    how: str
    """It is made."""
    promised: str
    tests: tuple[str, ...]
    """`FILE::TEST`, from the root."""
    command: str = ""
    """What shows it, or shows it for longer, and is no test."""


ROWS = (
    Row(
        "F1",
        "a backend is killed in the middle of its streams",
        "SIGKILL of an emulator with running and waiting requests",
        "requests without a token are served elsewhere; streams that have begun end in one error event; every "
        "token that was delivered is in the ledger",
        (
            f"{HERE}/test_backends_that_die.py::test_f01_a_killed_backend_costs_its_begun_streams_and_nothing_else",
        ),
    ),
    Row(
        "F2",
        "a backend resets behind its head, before the first token",
        "fault proxy",
        "another backend serves; the client sees nothing of it; both attempts are in the row",
        (
            f"{HERE}/test_networks.py::test_f02_a_reset_behind_the_head_is_not_noticed",
            f"{E2E}/test_failover.py::test_a_backend_that_fails_before_its_first_data_is_not_noticed",
        ),
    ),
    Row(
        "F3",
        "a backend closes an idle connection while a request is on its way",
        "connections that serve once; in the long form, ones that idle as long as clients pause",
        "once more on a fresh connection; no 502, and the backend is not blamed",
        (
            f"{HERE}/test_networks.py::test_f03_a_kept_connection_that_closes_costs_nobody_anything",
            f"{HERE}/test_networks.py::test_f03_ten_thousand_races_with_an_idle_timeout",
            f"{E2E}/test_failover.py::test_a_pooled_connection_that_died_meanwhile_costs_nothing",
        ),
    ),
    Row(
        "F4",
        "a backend accepts and never answers",
        "fault proxy that passes nothing back",
        "after `timeouts.first_token` another backend serves; after five such failures nothing is sent there",
        (
            f"{HERE}/test_networks.py::test_f04_a_backend_that_never_answers_is_left_out_after_five",
            f"{E2E}/test_failover.py::test_a_stream_that_never_begins_is_asked_for_elsewhere",
        ),
    ),
    Row(
        "F5",
        "a backend cannot be connected to",
        "a closed port; a listener whose queue is full; in the long form, packets that nftables drops in a network "
        "namespace",
        "another backend serves, after `timeouts.connect` at the latest; it is used again when its probes succeed",
        (
            f"{HERE}/test_networks.py::test_f05_handshakes_that_nobody_answers_cost_the_connect_timeout",
            f"{HERE}/test_networks.py::test_f05_a_backend_that_listens_again_is_used_again",
            f"{HERE}/test_namespaces.py::test_f05_packets_that_are_dropped_cost_the_connect_timeout",
            f"{E2E}/test_failover.py::test_a_dead_backend_costs_nothing_but_a_hop",
        ),
    ),
    Row(
        "F6",
        "a backend stalls in the middle of its streams",
        "SIGSTOP of an emulator",
        "its streams end in one error event within `timeouts.between_tokens` and a second; others go on",
        (f"{HERE}/test_backends_that_die.py::test_f06_a_stalled_backend_ends_its_streams_and_no_others",),
    ),
    Row(
        "F7",
        "a backend becomes ten times as slow",
        "fault `slow` of an emulator",
        "`least-load` gives it at most a fifth of its fair share; it is not taken out",
        (f"{HERE}/test_backends_that_die.py::test_f07_a_slow_backend_gets_little_and_stays",),
    ),
    Row(
        "F8",
        "a backend comes and goes",
        "a listener that is opened and closed over and over",
        "it is tried less and less often; clients see no error",
        (f"{HERE}/test_networks.py::test_f08_a_backend_that_flaps_is_tried_less_and_less_often",),
    ),
    Row(
        "F9",
        "all backends are down",
        "SIGKILL of all emulators, and a new start",
        "503 with `Retry-After` at once, nobody waits; the first 200 comes two probe intervals after the return",
        (
            f"{HERE}/test_backends_that_die.py::test_f09_without_any_backend_everybody_is_told_so_at_once",
            f"{E2E}/test_failover.py::test_all_down_is_no_backend_at_once",
        ),
    ),
    Row(
        "F10",
        "backends answer 429 and 5xx",
        "scripted backends",
        "retries stay inside their budget; `Retry-After` is kept and passed on",
        (
            f"{E2E}/test_failover.py::test_retries_stay_inside_their_budget",
            f"{E2E}/test_failover.py::test_full_is_not_down",
        ),
    ),
    Row(
        "F11",
        "a backend answers with garbage",
        "a table of malformed, ambiguous and endless answers",
        "502 or a cut stream; no bytes of it reach another request; nothing hangs",
        (
            f"{E2E}/test_conformance.py::test_replies_of_backends",
            f"{E2E}/test_failover.py::test_what_a_backend_says_unasked_reaches_nobody",
        ),
    ),
    Row(
        "F12",
        "a client sends hostile bytes",
        "a table of malformed and ambiguous requests, a canary behind each",
        "what is ambiguous is refused, and no canary reaches a backend",
        (f"{E2E}/test_conformance.py::test_requests",),
    ),
    Row(
        "F13",
        "slow heads, slow bodies, slow reading",
        "slowhttptest in its three modes at once",
        "closed by their deadlines; others are served all the time; no descriptor is left",
        (
            f"{HERE}/test_clients_that_harm.py::test_f13_slow_clients_are_in_nobodys_way",
            f"{E2E}/test_http_edge.py::test_slow_heads_and_bodies_meet_their_deadlines",
        ),
    ),
    Row(
        "F14",
        "clients that hardly read",
        "10 of them, in the long form 200, before backends that send 50 MiB each",
        "their backends are paused; memory grows by at most 1 MiB each and 20 MiB",
        (
            f"{E2E}/test_streams.py::test_slow_readers_do_not_fill_the_memory",
            f"{E2E}/test_streams.py::test_a_slow_reader_stops_its_backend_and_nobody_elses",
        ),
    ),
    Row(
        "F15",
        "clients leave in the middle of their streams",
        "a third of them, at any token",
        "no generation goes on 2 s later; the ledger has what was delivered, and not more than was generated",
        (
            f"{HERE}/test_clients_that_harm.py::test_f15_clients_that_leave_take_their_generations_with_them",
            f"{E2E}/test_streams.py::test_a_client_that_leaves_a_silent_stream_stops_the_engine",
        ),
    ),
    Row(
        "F16",
        "connections without a request",
        "1,000, in the long form 10,000, twice as many as may be",
        "never more than `limits.connections`: those without a request make room, and end after `timeouts.idle`",
        (f"{HERE}/test_clients_that_harm.py::test_f16_connections_without_requests_are_bounded",),
    ),
    Row(
        "F17",
        "no file descriptors are left",
        "a low limit of open files",
        "it waits without a busy loop, says so once, and goes on by itself",
        (
            f"{E2E}/test_floods.py::test_without_files_it_waits_says_so_once_and_goes_on_when_there_are_some",
            "tests/proxy/test_journal.py::test_a_process_without_file_descriptors_goes_on",
        ),
    ),
    Row(
        "F18",
        "memory runs short",
        "bodies of 2 MB for a backend that never answers, up to `limits.memory`",
        "503 with `Retry-After` in time; the process lives, its admin port answers, and it recovers",
        (f"{HERE}/test_overload.py::test_f18_memory_that_runs_short_is_shed_in_time",),
    ),
    Row(
        "F19",
        "more load than capacity",
        "an open loop at twice and five times the capacity",
        "goodput stays at 90 % of its peak; who is turned away hears it within 50 ms",
        (f"{HERE}/test_overload.py::test_f19_overload_costs_no_goodput",),
        command="python -m benchmarks.overload --check",
    ),
    Row(
        "F20",
        "the proxy is killed",
        "SIGKILL under load, and a new start",
        "no token that was read a second before is missing, none is there twice, none is invented",
        (
            f"{HERE}/test_proxies_that_die.py::test_f20_a_killed_proxy_loses_at_most_the_last_second",
            "tests/proxy/test_journal_kill.py::test_nothing_acknowledged_is_missing_and_nothing_is_double",
        ),
        command="python -m benchmarks.crash",
    ),
    Row(
        "F21",
        "the proxy is stopped with streams open",
        "SIGTERM",
        "it is not ready at once; streams end well within `timeouts.drain`, and in an error event after it",
        (
            f"{HERE}/test_proxies_that_die.py::test_f21_a_stop_lets_all_streams_end",
            f"{E2E}/test_reload_and_stop.py::test_what_does_not_end_in_time_is_ended_with_an_error",
        ),
    ),
    Row(
        "F22",
        "reloads and upgrades under load",
        "SIGHUP, also with a broken file; `tidegate upgrade` 3 times, in the long form 50 times",
        "no request fails, no stream is cut, no row is missing",
        (
            f"{E2E}/test_upgrade.py::test_upgrades_under_load_fail_no_request",
            f"{E2E}/test_reload_and_stop.py::test_reloads_by_signal_under_load_fail_no_request",
        ),
    ),
    Row(
        "F23",
        "power loss",
        "files are set back to what was synced, and the process is killed",
        "with `durability: strict`, every request that was answered has a row, and no row is there twice",
        (f"{HERE}/test_disks.py::test_f23_what_was_answered_survives_the_loss_of_all_that_was_not_synced",),
    ),
    Row(
        "F24",
        "the journal's disk fails or is full",
        "`strace` makes its syncs fail with EIO, its writes with ENOSPC",
        "new requests get 503 `ledger_unavailable`; all that were answered are in the ledger after the next start",
        (
            f"{HERE}/test_disks.py::test_f24_a_disk_that_fails_refuses_what_is_new_and_loses_nothing",
            f"{E2E}/test_ledger_failures.py::test_a_failed_disk_refuses_what_is_new_and_ends_what_runs",
        ),
    ),
    Row(
        "F25",
        "the ledger's database is locked or away",
        "an exclusive lock on SQLite; a PostgreSQL that is stopped, and one that crashes",
        "requests and streams go on; rows follow when it is back, each once",
        (
            f"{E2E}/test_postgres.py::test_a_server_that_stops_and_starts_holds_up_nobody",
            f"{E2E}/test_postgres.py::test_sqlite_locked_for_ten_seconds_holds_up_nobody",
            f"{E2E}/test_ledger_failures.py::test_a_locked_database_holds_up_nobody",
        ),
    ),
    Row(
        "F26",
        "the clock jumps by an hour",
        "libfaketime, forth and back, while streams run",
        "no key expires, nobody is refused, no duration is negative",
        (f"{HERE}/test_clocks.py::test_f26_a_clock_that_jumps_harms_nobody",),
    ),
    Row(
        "F27",
        "a backend's name moves, or cannot be resolved",
        "a resolver that says what the test wants; in the long form, `/etc/hosts` in a mount namespace",
        "it is followed within `resolve` and 5 s; the last good answer is kept",
        (
            f"{HERE}/test_namespaces.py::test_f27_a_name_that_moves_is_followed_and_one_that_is_lost_is_kept",
            f"{E2E}/test_backend_places.py::test_a_name_is_followed_and_idle_connections_to_the_old_address_end",
            f"{E2E}/test_backend_places.py::test_a_resolver_that_fails_costs_nothing_once_a_name_is_known",
        ),
    ),
    Row(
        "F28",
        "certificates that are expired, of another name, self-signed, unknown, or replaced",
        "an authority of the test's own",
        "never connected to, and the reason is said; what is replaced is taken up",
        (
            f"{E2E}/test_tls.py::test_why_a_certificate_was_refused_is_said_everywhere",
            f"{E2E}/test_tls.py::test_a_reload_sees_certificates_that_were_replaced",
            f"{E2E}/test_client_tls.py::test_a_renewed_certificate_is_shown_and_a_bad_one_is_not",
        ),
    ),
    Row(
        "F29",
        "a client sends a request again",
        "the same `Idempotency-Key`",
        "one generation, one charge",
        (
            f"{E2E}/test_repeats.py::test_a_client_that_asks_again_pays_once",
            f"{E2E}/test_repeats.py::test_a_key_is_known_after_a_restart",
        ),
    ),
    Row(
        "F30",
        "streams in odd pieces and forms",
        "recorded streams in any pieces; one byte at a time, CRLF, heartbeats, until close, cut",
        "the client gets the same events; usage is exact",
        (
            f"{HERE}/test_networks.py::test_f30_a_stream_in_single_bytes_is_the_same_stream",
            "tests/proxy/test_meter_captures.py::test_any_pieces_give_the_same",
            f"{E2E}/test_failover.py::test_a_stream_means_the_same_in_every_form",
            f"{E2E}/test_failover.py::test_a_stream_that_is_cut_says_so_once",
        ),
    ),
    Row(
        "F31",
        "a storm of bad keys",
        "wrong keys from one address",
        "401, and 429 after 20 in a minute; good keys from there pass",
        (
            f"{E2E}/test_keys_and_limits.py::test_a_storm_of_bad_keys_is_held_off_and_good_ones_pass",
            f"{E2E}/test_floods.py::test_a_storm_of_bad_keys_costs_little_and_good_ones_go_on",
        ),
    ),
    Row(
        "F32",
        "a key is revoked while it is in use",
        "`tidegate keys revoke`",
        "refused within a second; what runs goes on",
        (f"{E2E}/test_keys_and_limits.py::test_a_key_revoked_by_another_process_is_refused_within_a_second",),
    ),
    Row(
        "F33",
        "a body that takes long to read",
        "8 MB of JSON, over and over, beside the admin port's `/healthz`",
        "it is read beside the loop, which answers others within 50 ms (p99)",
        (
            f"{HERE}/test_overload.py::test_f33_large_bodies_hold_up_nobody",
            f"{E2E}/test_http_edge.py::test_a_large_body_is_read_beside_the_loop",
        ),
    ),
    Row(
        "F35",
        "everything, for half an hour",
        "mixed load and random faults",
        "memory, descriptors and tasks stay flat; the ledger is exact",
        (),
        command="python -m benchmarks.soak",
    ),
)

NUMBERS = tuple(row.number for row in ROWS)
