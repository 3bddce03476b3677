//! The probe's command line: by hand, from the agent, in a container, in a guest.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use podcheckpoint_crds::{Outcome, Reason, reasons};
use podcheckpoint_probe::criu::{LIMIT, PATIENT, Place};
use podcheckpoint_probe::ladder::{self, Event, Request};
use podcheckpoint_probe::observation::{End, Observations, Record};
use podcheckpoint_probe::verdict::{self, Finding, Verdict};
use podcheckpoint_probe::wire::Message;
use serde_json::json;

/// Proves that ptrace works on a process and everything below it, as CRIU needs it, and names the cause when it does
/// not. Never hangs: a verdict comes within two seconds. Changes nothing in the target, unless --inject asks for it.
#[derive(Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Exit status: 0 pass, 1 fail, 2 degraded or unknown, 3 the probe could not run."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    probe: ProbeArguments,
}

#[derive(Subcommand)]
enum Command {
    /// Say all that is known of a reason: what it means, how to see it, what to do.
    Explain {
        /// The word, as a verdict or a condition has it. Without one, all of them are listed.
        reason: Option<String>,
    },
    /// Judge observations that were recorded with --json.
    Replay {
        /// File with the line `{"event":"report",...}`.
        file: PathBuf,
    },
}

#[derive(Args)]
struct ProbeArguments {
    /// The process to prove, with everything below it; can be given several times.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Vec<i32>,
    /// Look only at the machine: the kernel, ptrace of an own child, and CRIU.
    #[arg(long, conflicts_with = "pid")]
    node: bool,
    /// Also execute system calls in the first thread of each PID, as CRIU does, and put everything back. This is the only
    /// thing that changes the target, for a fraction of a millisecond: kill the probe's child in that moment, and the
    /// target dies.
    #[arg(long, requires = "pid")]
    inject: bool,
    /// Run `criu check --all` too, with a deadline.
    #[arg(long)]
    criu: bool,
    /// The CRIU program; found in the usual folders when absent.
    #[arg(long, value_name = "FILE")]
    criu_program: Option<PathBuf>,
    /// Folders to look for CRIU in before the usual ones, separated by colons.
    #[arg(long, value_name = "FOLDERS", value_delimiter = ':')]
    criu_search: Vec<PathBuf>,
    /// Run CRIU in the namespaces of this process: 1 for the node's, from a container with hostPID.
    #[arg(long, value_name = "PID")]
    criu_namespaces_of: Option<i32>,
    /// One event a line, as JSON, as it happens; the last one is the report.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Explain { reason }) => explain(reason.as_deref()),
        Some(Command::Replay { file }) => replay(&file),
        None => probe(&cli.probe),
    }
}

fn probe(arguments: &ProbeArguments) -> ExitCode {
    if arguments.pid.is_empty() && !arguments.node {
        eprintln!("nothing to prove: give --pid PID or --node; --help says more");
        return ExitCode::from(3);
    }
    let request = Request {
        targets: arguments.pid.clone(),
        inject: arguments.inject,
        criu: (arguments.criu || arguments.node).then(|| Place {
            program: arguments.criu_program.clone(),
            limit: if arguments.node { PATIENT } else { LIMIT },
            cached: arguments.node,
            folders: arguments.criu_search.clone(),
            namespaces_of: arguments.criu_namespaces_of,
        }),
    };
    let json = arguments.json;
    let mut tell = |event: Event<'_>| {
        if json {
            print_event(&event);
        }
    };
    match ladder::climb(&request, &mut tell) {
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(3)
        }
        Ok(seen) => conclude(&seen, json),
    }
}

fn conclude(seen: &Observations, json: bool) -> ExitCode {
    let verdict = verdict::verdict(seen);
    if json {
        line(&json!({"event": "report", "observations": seen, "verdict": verdict}));
    } else {
        print!("{}", text(seen, &verdict));
    }
    exit_code(verdict.outcome)
}

fn exit_code(outcome: Outcome) -> ExitCode {
    ExitCode::from(match outcome {
        Outcome::Pass => 0,
        Outcome::Fail => 1,
        Outcome::Degraded | Outcome::Unknown => 2,
    })
}

fn print_event(event: &Event<'_>) {
    line(&match event {
        Event::Step(message) => step(message),
        Event::Stalled(record) => ended(record),
    });
}

fn step(message: &Message) -> serde_json::Value {
    let end = message
        .result
        .map(|result| result.map_or_else(End::Errno, End::Done));
    let event = if end.is_some() { "end" } else { "begin" };
    json!({"event": event, "on": message.subject, "step": message.step, "pid": message.pid, "tid": message.tid, "end": end, "micros": message.micros})
}

fn ended(record: &Record) -> serde_json::Value {
    json!({"event": "end", "on": record.subject, "step": record.step, "pid": record.pid, "tid": record.tid, "end": record.end})
}

/// Written at once: the reader wants to know where the probe stands when it says no more.
fn line(value: &serde_json::Value) {
    let mut out = std::io::stdout().lock();
    // A reader that is gone is no reason to stop in the middle.
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

fn text(seen: &Observations, verdict: &Verdict) -> String {
    let mut text = String::new();
    for (number, finding) in verdict.findings.iter().enumerate() {
        text.push_str(&describe(finding));
        let doc = finding.reason.doc();
        if number == 0 && finding.outcome != Outcome::Pass {
            for (name, words) in [
                ("meaning", doc.meaning),
                ("confirm", doc.confirm),
                ("remedy", doc.remedy),
                ("affects", doc.affects),
            ] {
                if !words.is_empty() {
                    text.push_str(&format!("  {name:8} {words}\n"));
                }
            }
        }
    }
    text.push_str(&format!(
        "{:?} in {:.1} ms\n",
        verdict.outcome,
        seen.micros as f64 / 1000.0
    ));
    text
}

fn describe(finding: &Finding) -> String {
    let process = finding
        .pid
        .map_or_else(String::new, |pid| format!(" [process {pid}]"));
    let follows = finding
        .follows_from
        .map_or_else(String::new, |cause| format!(" (a consequence of {cause})"));
    let outcome = format!("{:?}", finding.outcome).to_uppercase();
    format!(
        "{outcome} {}{process}{follows}\n  {}: {}\n",
        finding.reason, finding.check, finding.evidence
    )
}

fn explain(word: Option<&str>) -> ExitCode {
    let Some(word) = word else {
        for (section, all) in Reason::SECTIONS {
            println!("{section}");
            all.iter().for_each(|reason| println!("  {reason}"));
        }
        return ExitCode::SUCCESS;
    };
    match Reason::parse(word) {
        Some(reason) => {
            print!("{reason}\n\n{}", reasons::text(reason));
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("there is no reason {word}; `explain` without a word lists them");
            ExitCode::from(3)
        }
    }
}

fn replay(file: &std::path::Path) -> ExitCode {
    let report = std::fs::read_to_string(file).ok().and_then(|text| {
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut reports = lines.filter_map(|mut value| Some(value.get_mut("observations")?.take()));
        reports.next_back()
    });
    match report.map(serde_json::from_value::<Observations>) {
        Some(Ok(seen)) => conclude(&seen, false),
        _ => {
            eprintln!("{} has no report of the probe", file.display());
            ExitCode::from(3)
        }
    }
}
