//! What holds for every verdict, whatever was seen, also what no kernel would ever answer.

use podcheckpoint_crds::Outcome;
use podcheckpoint_probe::observation::{
    Criu, End, FreezerState, Kernel, Observations, Process, Record, Sample, Stall, Step, Subject, Thread,
    Tracer, UserNamespace,
};
use podcheckpoint_probe::verdict::{Verdict, verdict};
use proptest::prelude::*;
use proptest::sample::select;

const PIDS: [i32; 3] = [7, 8, 9];

fn wchan() -> impl Strategy<Value = Option<String>> {
    let names = [
        "",
        "do_wait",
        "ptrace_attach",
        "begin_new_exec",
        "seccomp_do_user_notification",
        "do_signal_stop",
        "kernel_clone",
    ];
    prop::option::of(select(names.to_vec()).prop_map(str::to_owned))
}

fn sample() -> impl Strategy<Value = Sample> {
    let states = select(vec!['R', 'S', 'D', 'T', 't', 'Z', ' ']);
    let parts = (states, 0..9i32, wchan(), prop::option::of(0..500i64));
    parts.prop_map(|(state, tracer, wchan, syscall)| Sample {
        state,
        tracer,
        wchan,
        syscall,
        stack: Vec::new(),
    })
}

fn stall() -> impl Strategy<Value = End> {
    let parts = (sample(), sample(), any::<bool>(), any::<bool>());
    parts.prop_map(|(tracer, target, tracer_killed, target_untraced)| {
        End::Stalled(Box::new(Stall {
            tracer,
            target,
            tracer_killed,
            target_untraced,
            listeners: Vec::new(),
        }))
    })
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        4 => (0..200_000i64).prop_map(End::Done),
        3 => select(vec![1, 2, 3, 13, 16, 22, 38]).prop_map(End::Errno),
        1 => (1..32i32).prop_map(End::Killed),
        1 => stall(),
        1 => Just(End::Skipped("because".into())),
    ]
}

fn record() -> impl Strategy<Value = Record> {
    let subject = select(vec![Subject::Control, Subject::Own, Subject::Target]);
    let parts = (
        subject,
        select(Step::ALL.to_vec()),
        select(PIDS.to_vec()),
        0..2i32,
        end(),
    );
    parts.prop_map(|(subject, step, pid, other, end)| Record {
        subject,
        step,
        pid,
        tid: pid + other * 100,
        end,
        micros: 1,
    })
}

fn thread() -> impl Strategy<Value = Thread> {
    let states = select(vec!['S', 'D', 'T', 't', 'Z', 'X']);
    let parts = (
        select(vec![7, 8, 9, 107]),
        states,
        select(vec![0, 5]),
        0..3u8,
        any::<bool>(),
        wchan(),
    );
    parts.prop_map(|(tid, state, tracer, seccomp, trap_pending, wchan)| Thread {
        tid,
        state,
        tracer,
        tracer_comm: None,
        seccomp,
        trap_pending,
        wchan,
    })
}

fn freezer() -> impl Strategy<Value = FreezerState> {
    (1..3i32, any::<bool>()).prop_map(|(version, frozen)| FreezerState {
        version,
        path: "/c".into(),
        frozen,
        by: None,
    })
}

fn process() -> impl Strategy<Value = Process> {
    let namespace = select(vec![
        UserNamespace::Same,
        UserNamespace::Below,
        UserNamespace::Outside,
        UserNamespace::Unknown,
    ]);
    let who = (
        select(PIDS.to_vec()),
        any::<bool>(),
        any::<bool>(),
        0..2u32,
        any::<u64>(),
        any::<bool>(),
    );
    let what = (
        namespace,
        any::<bool>(),
        1..3usize,
        prop::collection::vec(thread(), 0..3),
        prop::collection::vec(freezer(), 0..3),
    );
    (who, what).prop_map(|(who, what)| Process {
        pid: who.0,
        kernel_thread: who.1,
        root: who.2,
        uid: who.3,
        capabilities: who.4,
        not_dumpable: who.5,
        user_namespace: what.0,
        session_outside: what.1,
        threads: what.2,
        notable: what.3,
        freezers: what.4,
        ..Process::default()
    })
}

fn criu() -> impl Strategy<Value = Criu> {
    let version = prop::option::of(select(vec!["3.17.1", "4.1.1", "4.2", "x"]).prop_map(str::to_owned));
    let lines = || {
        let line = select(vec![
            "Error (criu/cr-check.c:1): no x",
            "Warn  (criu/kerndat.c:2): no y",
        ]);
        prop::collection::vec(line.prop_map(str::to_owned), 0..3)
    };
    let status = || prop::option::of(0..128i32);
    let cached = prop::option::of((status(), lines(), any::<bool>()));
    let parts = (any::<bool>(), version, status(), any::<bool>(), lines(), cached);
    parts.prop_map(|(there, version, status, good, lines, cached)| Criu {
        path: there.then(|| "/usr/sbin/criu".into()),
        version,
        status,
        good: good && there,
        lines,
        with_cache: cached.map(|(status, lines, good)| {
            Box::new(Criu {
                status,
                lines,
                good,
                ..Criu::default()
            })
        }),
        ..Criu::default()
    })
}

fn kernel() -> impl Strategy<Value = Kernel> {
    let parts = (prop::option::of(0..4i32), any::<bool>(), any::<bool>(), 0..2i32);
    parts.prop_map(|(yama, enforcing, restore, landlock_abi)| Kernel {
        release: "6.18.1".into(),
        yama,
        selinux_enforcing: Some(enforcing),
        landlock_abi,
        features: [("CHECKPOINT_RESTORE".to_owned(), restore)].into(),
        ..Kernel::default()
    })
}

fn tracer() -> impl Strategy<Value = Tracer> {
    let parts = (any::<u64>(), 0..3u8, any::<bool>());
    parts.prop_map(|(capabilities, seccomp, initial_user_namespace)| Tracer {
        capabilities,
        seccomp,
        initial_user_namespace,
        ..Tracer::default()
    })
}

fn observations() -> impl Strategy<Value = Observations> {
    let processes = prop::collection::vec(process(), 0..3).prop_map(|mut all| {
        all.sort_by_key(|process| process.pid);
        all.dedup_by_key(|process| process.pid);
        all
    });
    let steps = prop::collection::vec(record(), 0..24);
    let parts = (
        kernel(),
        tracer(),
        processes,
        steps,
        prop::option::of(criu()),
        any::<bool>(),
    );
    parts.prop_map(|(kernel, tracer, processes, steps, criu, gap)| Observations {
        kernel,
        tracer,
        targets: PIDS.to_vec(),
        processes,
        steps,
        criu,
        gaps: if gap { vec!["something".into()] } else { Vec::new() },
        ..Observations::default()
    })
}

/// Of the machine, or of a process that stays: what a verdict must not overlook.
fn is_bad(seen: &Observations, record: &Record) -> bool {
    let gone = |end: &End| matches!(end, End::Errno(2 | 3));
    let refused = matches!(record.end, End::Errno(_) | End::Killed(_) | End::Stalled(_));
    // Old kernels lack the one, and the others are judged with the target.
    let excused = matches!(
        record.step,
        Step::Rseq | Step::SuspendSeccomp | Step::SeccompFilter | Step::Breakpoint
    );
    let there =
        record.subject != Subject::Target || seen.processes.iter().any(|process| process.pid == record.pid);
    // A process that ended while it was looked at is a failure only if it is the target itself.
    let ended = record.subject == Subject::Target
        && seen
            .steps
            .iter()
            .any(|other| other.subject == Subject::Target && other.tid == record.pid && gone(&other.end));
    refused && !excused && there && !ended
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_failed_rung_is_never_called_a_pass(seen in observations()) {
        let bad = seen.steps.iter().any(|record| is_bad(&seen, record));
        prop_assert!(!bad || verdict(&seen).outcome != Outcome::Pass);
    }

    #[test]
    fn what_was_not_proved_is_never_called_a_pass(mut seen in observations()) {
        seen.steps.clear();
        prop_assert_ne!(verdict(&seen).outcome, Outcome::Pass);
    }

    #[test]
    fn the_verdict_does_not_depend_on_the_order_of_what_was_seen(seen in observations(), turn in 0..24usize) {
        let mut other = seen.clone();
        let places = other.steps.len().max(1);
        other.steps.rotate_left(turn % places);
        other.processes.reverse();
        let reasons = |v: &Verdict| v.findings.iter().map(|f| (f.reason, f.pid, f.outcome)).collect::<Vec<_>>();
        prop_assert_eq!(reasons(&verdict(&seen)), reasons(&verdict(&other)));
    }

    #[test]
    fn the_root_cause_comes_first_and_follows_from_nothing(seen in observations()) {
        let verdict = verdict(&seen);
        let root = verdict.root().expect("there is always a finding");
        prop_assert_eq!(root.outcome, verdict.outcome);
        if verdict.outcome == Outcome::Fail {
            prop_assert_eq!(root.follows_from, None);
        }
        for finding in &verdict.findings {
            prop_assert!(!finding.evidence.is_empty());
        }
    }

    #[test]
    fn a_cache_that_was_only_too_slow_to_be_compared_changes_no_verdict(seen in observations(), criu in criu()) {
        let slow = Criu { waiting: vec!["criu: state R".into()], status: None, ..criu.clone() };
        let with = |cached: Option<Criu>| {
            let criu = Some(Criu { with_cache: cached.map(Box::new), ..criu.clone() });
            verdict(&Observations { criu, ..seen.clone() })
        };
        prop_assert_eq!(with(Some(slow)), with(None));
    }

    #[test]
    fn observations_survive_being_recorded(seen in observations()) {
        let text = serde_json::to_string(&seen).expect("JSON");
        let again: Observations = serde_json::from_str(&text).expect("observations");
        prop_assert_eq!(seen, again);
    }
}
