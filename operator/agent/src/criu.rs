//! What CRIU and the runtimes say when a dump fails, made into a reason. Pure.
//!
//! The signatures are what users report and what the tests provoke; CRIU's own log wins over the runtime's words, of
//! which "criu failed: type NOTIFY errno 0" is the most common and says nothing.

use std::path::PathBuf;

use podcheckpoint_crds::Reason;

use crate::words;

/// Longest line that is copied into a status, in characters.
const LINE_LIMIT: usize = 300;
/// How many lines are copied.
const LINES: usize = 3;

/// Why a dump failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// The reason.
    pub reason: Reason,
    /// How far CRIU came, by its log.
    pub stage: Option<Stage>,
    /// The first lines that say what went wrong.
    pub lines: Vec<String>,
}

impl Diagnosis {
    /// The lines and the stage as one sentence.
    pub fn sentence(&self) -> String {
        let lines = self.lines.join(" | ");
        match self.stage {
            Some(stage) => format!("{lines} (CRIU stopped while {})", stage.doing()),
            None => lines,
        }
    }
}

/// How far a dump came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Finding out what the kernel can do.
    Start,
    /// Freezing and seizing the processes.
    Seize,
    /// Reading what a process has mapped.
    Collect,
    /// Putting its code into a process.
    Infect,
    /// Reading what a process has open.
    Files,
    /// Reading memory.
    Dump,
    /// Letting the processes go.
    Release,
}

impl Stage {
    fn doing(self) -> &'static str {
        match self {
            Self::Start => "finding out what the kernel can do",
            Self::Seize => "seizing the processes",
            Self::Collect => "reading what a process has mapped",
            Self::Infect => "putting its code into a process",
            Self::Files => "reading what a process has open",
            Self::Dump => "reading memory",
            Self::Release => "letting the processes go",
        }
    }
}

/// Parts of CRIU's log that show a stage, in the order in which they come.
const STAGES: [(&str, Stage); 8] = [
    ("Version: ", Stage::Start),
    ("Seized task", Stage::Seize),
    ("Unable to interrupt task", Stage::Seize),
    ("Dumping task (pid:", Stage::Collect),
    ("Putting parasite blob", Stage::Infect),
    ("Dumping opened files", Stage::Files),
    ("Dumping pages (type:", Stage::Dump),
    ("Unfreezing tasks", Stage::Release),
];

/// Texts and what they mean; the first that is found wins, so what is more exact stands first.
const SIGNATURES: &[(&str, Reason)] = &[
    ("rt vDSO area bounds", Reason::CriuKernelMismatch),
    (
        "Could not initialize kernel features detection",
        Reason::CriuKernelMismatch,
    ),
    ("suspending seccomp failed", Reason::SeccompSuspendDenied),
    ("Unable to interrupt task", Reason::PtraceDenied),
    ("found while seizing", Reason::ZombieInTree),
    (", state D", Reason::TargetUninterruptible),
    ("Timeout reached. Try to interrupt", Reason::TargetUninterruptible),
    ("Unseizable non-zombie", Reason::PtraceDenied),
    ("connect a transport socket: Permission denied", Reason::LsmDenied),
    ("connect a transport socket", Reason::ParasiteRejected),
    ("create memfd in victim", Reason::ParasiteRejected),
    ("Can't rmap memfd", Reason::ParasiteRejected),
    ("allocate memory for parasite", Reason::ParasiteRejected),
    ("session leader of", Reason::SessionLeaderOutsidePidns),
    ("Connected TCP socket", Reason::TcpEstablished),
    ("tcp-established", Reason::TcpEstablished),
    ("External socket is used", Reason::ExternalUnixSocket),
    ("--ext-unix-sk", Reason::ExternalUnixSocket),
    ("io_uring", Reason::IoUringUnsupported),
    ("Some file locks are hold", Reason::FileLockUnsupported),
    ("file-locks", Reason::FileLockUnsupported),
    ("Can't lookup mount", Reason::ExternalFile),
    ("No mapping for", Reason::ExternalFile),
    ("proper root mount", Reason::MountUnsupported),
    ("tty: ", Reason::TtyUnsupported),
    ("find a master", Reason::TtyUnsupported),
    ("Unsupported socket", Reason::SocketUnsupported),
    ("Unknown family", Reason::SocketUnsupported),
    ("unsupported address family", Reason::SocketUnsupported),
    ("Unsupported proto", Reason::SocketUnsupported),
    ("BUG! Unknown socket", Reason::SocketUnsupported),
    ("sk unix: Can't dump", Reason::SocketUnsupported),
    ("sockets: Can't get", Reason::SocketUnsupported),
    ("Diag module missing", Reason::KernelFeatureMissing),
    ("Can't dump file", Reason::DeviceUnsupported),
    ("No space left on device", Reason::StorageFull),
    // Go's words for the same.
    ("no space left on device", Reason::StorageFull),
    ("Read-only file system", Reason::StorageNotWritable),
    ("read-only file system", Reason::StorageNotWritable),
    ("criu support is disabled", Reason::RuntimeCheckpointDisabled),
    (
        "checkpoint/restore support not available",
        Reason::RuntimeCheckpointDisabled,
    ),
    ("criu binary not found", Reason::CriuMissing),
    ("\"criu\": executable file not found", Reason::CriuMissing),
    ("requires at least CRIU", Reason::CriuKernelMismatch),
    (
        "checkpointing not implemented for runtimeVM",
        Reason::OciRuntimeUnsupported,
    ),
    (
        "service Checkpoint: not implemented",
        Reason::OciRuntimeUnsupported,
    ),
    ("not compiled with CRIU support", Reason::OciRuntimeUnsupported),
    // crun that finds no CRIU to load.
    ("could not load `libcriu", Reason::OciRuntimeUnsupported),
    ("does not support checkpoint", Reason::OciRuntimeUnsupported),
    ("unknown method CheckpointContainer", Reason::RuntimeTooOld),
    (
        "method CheckpointContainer not implemented",
        Reason::RuntimeTooOld,
    ),
    ("cannot pause a paused", Reason::TargetFrozen),
    ("unable to freeze", Reason::TargetUninterruptible),
    ("container not running", Reason::SourcePodGone),
    ("process already finished", Reason::SourcePodGone),
    ("ttrpc: closed", Reason::SourcePodGone),
    ("@->@: EOF", Reason::CriuCrashed),
    ("unexpected EOF", Reason::CriuCrashed),
];

/// Finds the cause of a failed dump in the runtime's words and, if there is one, CRIU's log.
pub fn diagnose(runtime_error: &str, log: Option<&str>) -> Diagnosis {
    let errors = error_lines(log.unwrap_or_default());
    let from_log = signature(&errors.join("\n"));
    let reason = from_log
        .or_else(|| signature(runtime_error))
        .unwrap_or(Reason::DumpFailed);
    let lines = if errors.is_empty() {
        vec![shorten(runtime_error)]
    } else {
        errors
    };
    Diagnosis {
        reason,
        stage: log.and_then(stage),
        lines,
    }
}

fn signature(text: &str) -> Option<Reason> {
    SIGNATURES
        .iter()
        .find(|(pattern, _)| text.contains(pattern))
        .map(|(_, reason)| *reason)
}

/// The stage that the log shows last: each process of a container goes through them anew. A dump that failed lets the
/// processes go too, which is not how far it came.
pub fn stage(log: &str) -> Option<Stage> {
    let failed = log.contains("Dumping FAILED");
    let seen = STAGES
        .iter()
        .filter(|(_, stage)| !(failed && *stage == Stage::Release));
    let last = seen.filter_map(|(pattern, stage)| Some((log.rfind(pattern)?, *stage)));
    last.max().map(|(_, stage)| stage)
}

/// The first lines that CRIU marks as errors, or as the warning that precedes a denied ptrace; each once, since a denied
/// ptrace is tried again for ten seconds.
fn error_lines(log: &str) -> Vec<String> {
    let telling = |line: &&str| line.contains("Error (") || line.contains("Unable to interrupt task");
    let mut lines: Vec<String> = Vec::new();
    for line in log
        .lines()
        .filter(telling)
        .filter(|line| !is_noise(line))
        .map(shorten)
    {
        if lines.len() < LINES && !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

/// What CRIU marks as an error and goes on from: it may not raise its own limits without CAP_SYS_RESOURCE.
fn is_noise(line: &str) -> bool {
    line.contains("Can't setup RLIMIT_NOFILE for self")
}

/// One line without its time, shortened, without control characters: it ends in a status that a terminal shows.
fn shorten(line: &str) -> String {
    let line = line.split_once(") ").map_or(
        line,
        |(time, rest)| if time.starts_with('(') { rest } else { line },
    );
    words::cut(line, LINE_LIMIT)
}

/// Where the log of a failed dump may lie on the node: containerd's shim copies it into the bundle, CRI-O leaves it in
/// the container's folder.
pub fn log_candidates(container: &str) -> Vec<PathBuf> {
    vec![
        format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{container}/criu-dump.log").into(),
        format!("/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/{container}/criu-dump.log").into(),
        format!("/run/containers/storage/overlay-containers/{container}/userdata/dump.log").into(),
    ]
}

/// Times of a dump, from CRIU's image stats-dump.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Microseconds until all processes stood still.
    pub freezing_micros: i64,
    /// Microseconds that they stood still.
    pub frozen_micros: i64,
    /// Microseconds of reading memory.
    pub memdump_micros: i64,
    /// Microseconds of writing memory.
    pub memwrite_micros: i64,
    /// Pages written.
    pub pages_written: i64,
}

/// Reads stats-dump: two magic numbers and a length of four bytes each, then the protobuf message stats_entry
/// (criu/images/stats.proto).
pub fn parse_stats(image: &[u8]) -> Option<DumpStats> {
    let entry = <StatsEntry as prost::Message>::decode(image.get(12..)?).ok()?;
    let dump = entry.dump?;
    Some(DumpStats {
        freezing_micros: dump.freezing_time.into(),
        frozen_micros: dump.frozen_time.into(),
        memdump_micros: dump.memdump_time.into(),
        memwrite_micros: dump.memwrite_time.into(),
        pages_written: i64::try_from(dump.pages_written).unwrap_or(i64::MAX),
    })
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatsEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DumpStatsEntry {
    #[prost(uint32, tag = "1")]
    freezing_time: u32,
    #[prost(uint32, tag = "2")]
    frozen_time: u32,
    #[prost(uint32, tag = "3")]
    memdump_time: u32,
    #[prost(uint32, tag = "4")]
    memwrite_time: u32,
    #[prost(uint64, tag = "7")]
    pages_written: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_wins_over_the_runtimes_empty_words() {
        let log = "(00.000100) Version: 4.1.1\n(00.02) Seized task 7, state 1\n\
            (00.024) Error (criu/files-reg.c:1803): Can't lookup mount=29 for fd=1 path=/out\n";
        let diagnosis = diagnose("criu failed: type NOTIFY errno 0", Some(log));
        assert_eq!(diagnosis.reason, Reason::ExternalFile);
        assert_eq!(
            diagnosis.lines,
            ["Error (criu/files-reg.c:1803): Can't lookup mount=29 for fd=1 path=/out"]
        );
        assert_eq!(diagnosis.stage, Some(Stage::Seize));
    }

    #[test]
    fn a_denied_ptrace_is_recognised_by_its_warning() {
        let log = "(00.01) Warn  (compel/src/lib/infect.c:129): Unable to interrupt task: 5 (Operation not permitted)\n\
            (00.01) Error (compel/src/lib/infect.c:365): Unseizable non-zombie 5 found, state S, err -1/10\n";
        assert_eq!(diagnose("", Some(log)).reason, Reason::PtraceDenied);
    }

    #[test]
    fn a_process_that_another_tracer_holds_is_a_denied_ptrace_and_not_a_zombie() {
        // CRIU 4.1.1 with the freezer, while strace was attached: CRIU takes the missing child for a zombie.
        let log = "(00.000012) Version: 4.1.1\n\
            (00.001) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
            (00.101) Warn  (compel/src/lib/infect.c:133): Unable to interrupt task: 4047 (Operation not permitted)\n\
            (00.102) Error (criu/seize.c:335): zombie 4047 (comm sh) found while seizing\n\
            (00.201) Warn  (compel/src/lib/infect.c:133): Unable to interrupt task: 4047 (Operation not permitted)\n\
            (00.202) Error (criu/seize.c:335): zombie 4047 (comm sh) found while seizing\n\
            (10.001482) Unfreezing tasks into 1\n\
            (10.001499) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        let diagnosis = diagnose("criu failed: type NOTIFY errno 0", Some(log));
        assert_eq!(
            (diagnosis.reason, diagnosis.stage),
            (Reason::PtraceDenied, Some(Stage::Seize))
        );
        assert_eq!(diagnosis.lines.len(), 3);
        assert!(diagnosis.lines[0].contains("Unable to interrupt task: 4047"));
    }

    #[test]
    fn a_socket_whose_options_cannot_be_read_is_named_and_so_is_the_stage() {
        // CRIU 4.1.1, a packet socket, a kernel without the option.
        let log = "(00.000012) Version: 4.1.1\n(00.010) Seized task 1252, state 1\n\
            (00.02) Putting parasite blob into 0x7f83d1420000->0x7f230a4b3000\n\
            (00.036191) Parasite 1252 has been switched to daemon mode\n\
            (00.036897) Dumping opened files (pid: 1252)\n\
            (00.070799) Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported\n\
            (00.070810) Error (criu/cr-dump.c:1681): Dump files (pid: 1252) failed with -1\n\
            (00.195183) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        let diagnosis = diagnose("criu failed: type NOTIFY errno 0", Some(log));
        assert_eq!(
            (diagnosis.reason, diagnosis.stage),
            (Reason::SocketUnsupported, Some(Stage::Files))
        );
    }

    #[test]
    fn the_stage_is_that_of_the_process_that_could_not_be_dumped() {
        let log = "(00.01) Dumping task (pid: 7 comm: sh)\n(00.02) Dumping opened files (pid: 7)\n\
            (00.03) Dumping pages (type: 59 pid: 7)\n(00.04) Dumping task (pid: 9 comm: nc)\n\
            (00.05) Dumping opened files (pid: 9)\n\
            (00.06) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.\n\
            (00.07) Unfreezing tasks into 1\n(00.08) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        assert_eq!(stage(log), Some(Stage::Files));
    }

    #[test]
    fn a_full_disk_is_recognised_in_gos_words_too() {
        let words = "copying checkpoint: write /a/b.tar: no space left on device";
        assert_eq!(diagnose(words, None).reason, Reason::StorageFull);
    }

    #[test]
    fn a_process_in_d_state_is_not_called_a_denial() {
        let log =
            "(10.0) Error (compel/src/lib/infect.c:365): Unseizable non-zombie 5 found, state D, err -1/4\n";
        assert_eq!(diagnose("", Some(log)).reason, Reason::TargetUninterruptible);
    }

    #[test]
    fn the_runtimes_words_count_when_there_is_no_log() {
        let words =
            "failed to checkpoint container \"a\": CRIU: criu binary not found in shim path or system PATH";
        assert_eq!(diagnose(words, None).reason, Reason::CriuMissing);
    }

    #[test]
    fn what_nobody_knows_is_called_a_failed_dump_and_quoted() {
        let diagnosis = diagnose("rpc error: something new", None);
        assert_eq!(
            (diagnosis.reason, diagnosis.sentence().as_str()),
            (Reason::DumpFailed, "rpc error: something new")
        );
    }

    #[test]
    fn escape_sequences_of_a_hostile_name_do_not_reach_the_status() {
        let log = "(00.1) Error (criu/x.c:1): Can't lookup mount=1 path=/\u{1b}[2Jx\n";
        assert!(!diagnose("", Some(log)).sentence().contains('\u{1b}'));
    }

    #[test]
    fn the_times_of_a_real_dump_are_read() {
        let image = [
            0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57, 0x22, 0, 0, 0, 0x0a, 0x20, 0x08, 0x98, 0x03,
            0x10, 0xc5, 0xef, 0x06, 0x18, 0xe4, 0x03, 0x20, 0x45, 0x28, 0x32, 0x30, 0x00, 0x38, 0x22, 0x40,
            0x00, 0x48, 0x00, 0x50, 0x08, 0x58, 0x08, 0x60, 0x00, 0x68, 0x00, 0x70, 0x00,
        ];
        let stats = parse_stats(&image).unwrap();
        assert_eq!(
            (stats.freezing_micros, stats.frozen_micros, stats.pages_written),
            (408, 112_581, 34)
        );
    }

    #[test]
    fn a_cut_off_image_has_no_times() {
        assert_eq!(parse_stats(&[1, 2, 3]), None);
    }
}
