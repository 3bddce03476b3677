//! The story that started the project: strace, gdb and CRIU hang in silence or say that all is well, and the probe names
//! the cause. On node1, which has all of these tools.
#![cfg(feature = "cluster")]

use anyhow::{Context, Result, ensure};
use podcheckpoint_e2e::{on_node, put_program};

/// Where the test programs are on the node.
const PROGRAMS: &str = "/run/podcheckpoint-test";
/// Seconds after which a tool is said to hang.
const PATIENCE: &str = "5";

/// Runs every tool on one target, which is made unprobeable by `cause`, and prints a line for each:
/// `NAME|EXIT STATUS|MILLISECONDS|WHAT IT PRINTED`. `under` is what the tools are run by.
fn compare(name: &str, under: &str, cause: &str, remedy: &str) -> Result<Vec<Row>> {
    let script = format!(
        r#"cd {PROGRAMS}; work=$(mktemp -d); mkdir $work/images; cgroup=/sys/fs/cgroup/freezer/{name}
        setsid ./probe-fixture target $work/progress plain > /dev/null 2>&1 < /dev/null & target=$!
        sleep 0.3; {cause}
        try() {{
          tool=$1; shift; begun=$(date +%s%N)
          timeout -s KILL {PATIENCE} "$@" > $work/out 2>&1 < /dev/null; status=$?
          echo "$tool|$status|$((($(date +%s%N) - begun) / 1000000))|$(cat $work/out $work/log 2> /dev/null | tr '\n|' '  ')"
          rm -f $work/log
        }}
        try 'strace -p' {under} $(command -v strace) -p $target
        try 'gdb -p' {under} $(command -v gdb) -nx -batch -p $target
        try 'criu check' {under} $(command -v criu) check
        try 'criu dump' {under} $(command -v criu) dump -t $target -D $work/images --leave-running --shell-job -o $work/log
        try 'podcheckpoint-probe' {under} ./podcheckpoint-probe --pid $target
        {remedy}
        sleep 0.3; before=$(cat $work/progress); sleep 0.3
        [ "$(cat $work/progress)" != "$before" ] && grep -q '^TracerPid:.0$' /proc/$target/status; echo "target|$?|0|"
        kill -KILL $target; wait $target 2> /dev/null; rmdir $cgroup 2> /dev/null; rm -rf $work; true"#
    );
    let printed = on_node("node1", &script)?;
    printed.lines().map(Row::parse).collect()
}

/// What one tool did.
#[derive(Debug)]
struct Row {
    tool: String,
    succeeded: bool,
    hung: bool,
    milliseconds: u64,
    said: String,
}

impl Row {
    fn parse(line: &str) -> Result<Self> {
        let mut fields = line.splitn(4, '|');
        let mut next = || fields.next().with_context(|| format!("not a row: {line}"));
        let (tool, status, milliseconds, said) = (next()?, next()?, next()?, next()?);
        Ok(Self {
            tool: tool.to_owned(),
            // timeout(1) ends with the signal that it sent.
            succeeded: status == "0",
            hung: status == "137",
            milliseconds: milliseconds.parse()?,
            said: said.trim().to_owned(),
        })
    }
}

fn row<'a>(rows: &'a [Row], tool: &str) -> Result<&'a Row> {
    let found = rows.iter().find(|row| row.tool == tool);
    found.with_context(|| format!("no row of {tool} in {rows:#?}"))
}

/// The tools hang, none says the cause, and the probe does within two seconds.
fn assert_told_apart(rows: &[Row], silent: &[&str], reason: &str, evidence: &str) -> Result<()> {
    let target = row(rows, "target")?;
    ensure!(target.succeeded, "the target does not go on untraced: {rows:#?}");
    for row in rows {
        let end = if row.hung {
            "hangs".to_owned()
        } else {
            format!("{} ms", row.milliseconds)
        };
        eprintln!("{:<20} {end:<8} {:.100}", row.tool, row.said);
    }
    for tool in silent {
        ensure!(row(rows, tool)?.hung, "{tool} did not hang: {rows:#?}");
    }
    let probe = row(rows, "podcheckpoint-probe")?;
    for tool in rows.iter().filter(|row| row.tool != probe.tool) {
        let words = tool.said.to_lowercase();
        for telling in ["seccomp listener", "frozen", "user_notif"] {
            ensure!(
                !words.contains(telling),
                "{} knows the cause: {}",
                tool.tool,
                tool.said
            );
        }
    }
    ensure!(!probe.hung && probe.milliseconds < 2000, "{probe:#?}");
    ensure!(
        probe.said.contains(reason) && probe.said.contains(evidence),
        "{probe:#?}"
    );
    Ok(())
}

fn programs() -> Result<()> {
    put_program("node1", "probe-fixture", PROGRAMS)?;
    put_program("node1", "podcheckpoint-probe", PROGRAMS)
}

#[test]
fn under_a_silent_seccomp_listener_every_tool_hangs_and_the_probe_names_who_holds_it() -> Result<()> {
    programs()?;
    let rows = compare("listener", "./probe-fixture under silent-listener", "", "")?;
    let silent = ["strace -p", "gdb -p", "criu check", "criu dump"];
    assert_told_apart(&rows, &silent, "SeccompNotifyUnanswered", "(probe-fixture)")
}

#[test]
fn on_a_frozen_target_every_tracer_hangs_criu_says_looks_good_and_the_probe_names_the_cgroup() -> Result<()> {
    programs()?;
    let freeze = "mkdir -p $cgroup; echo $target > $cgroup/cgroup.procs; echo FROZEN > $cgroup/freezer.state; sleep 0.1";
    // PTRACE_ATTACH of gdb begins with a SIGSTOP, which is left pending when gdb is killed: the target would stand still.
    let thaw = "echo THAWED > $cgroup/freezer.state; sleep 0.2; grep State /proc/$target/status >&2; kill -CONT $target";
    let rows = compare("frozen", "", freeze, thaw)?;
    ensure!(row(&rows, "criu check")?.said.contains("Looks good"), "{rows:#?}");
    let silent = ["strace -p", "gdb -p", "criu dump"];
    assert_told_apart(
        &rows,
        &silent,
        "TargetFrozen",
        "/sys/fs/cgroup/freezer/frozen is frozen",
    )
}
