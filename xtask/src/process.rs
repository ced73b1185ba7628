//! Child processes: runs a command to its end or to its deadline, hands on its output line by line, and leaves none of
//! its descendants behind, also when we are killed; it never touches a process that it did not start.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Success,
    /// The exit code, or none when a signal ended it.
    Failure(Option<i32>),
    TimedOut,
}

impl End {
    fn of(status: ExitStatus) -> Self {
        if status.success() {
            Self::Success
        } else {
            Self::Failure(status.code())
        }
    }

    pub(crate) fn is_success(self) -> bool {
        self == Self::Success
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Success => f.write_str("success"),
            Self::Failure(Some(code)) => write!(f, "exit code {code}"),
            Self::Failure(None) => f.write_str("ended by a signal"),
            Self::TimedOut => f.write_str("time limit reached"),
        }
    }
}

/// The standard output of a short command; what it wrote to standard error becomes the error.
pub(crate) fn capture(mut command: Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", show(&command)))?;
    if !output.status.success() {
        bail!(
            "{}: {}",
            show(&command),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command whose output goes straight to ours.
pub(crate) fn run(command: Command, limit: Duration) -> Result<End> {
    lines(command, limit, |line| println!("{line}"))
}

/// Runs a command that must succeed.
pub(crate) fn must(command: Command, limit: Duration) -> Result<()> {
    let shown = show(&command);
    match run(command, limit)? {
        End::Success => Ok(()),
        end @ (End::Failure(_) | End::TimedOut) => bail!("{shown}: {end}"),
    }
}

/// Runs a command, handing on each line of its standard output as it comes; standard error is ours.
pub(crate) fn lines(
    mut command: Command,
    limit: Duration,
    mut on_line: impl FnMut(&str),
) -> Result<End> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0);
    let mut child = command
        .spawn()
        .with_context(|| format!("start {}", show(&command)))?;
    let guard = Guard::over(&child)?;
    let output = child.stdout.take().context("standard output is piped")?;
    let (events, happened) = mpsc::channel();
    let exits = events.clone();
    thread::spawn(move || send_lines(output, &events));
    thread::spawn(move || exits.send(Event::Exited(child.wait())));

    let mut deadline = Instant::now() + limit;
    let mut end = End::TimedOut;
    loop {
        match happened.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Line(line)) => on_line(&line),
            Ok(Event::Exited(status)) => {
                end = End::of(status?);
                // A grandchild may hold the pipe for ever: what it still says is not ours to wait for.
                deadline = deadline.min(Instant::now() + LAST_WORDS);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if end == End::TimedOut => {
                guard.strike()?;
                // The line that it was in the middle of often names the culprit.
                while let Ok(Event::Line(line)) = happened.recv_timeout(LAST_WORDS) {
                    on_line(&line);
                }
                return Ok(end);
            }
            Err(RecvTimeoutError::Timeout) => break,
        }
    }
    guard.stand_down()?;
    Ok(end)
}

/// A command as a person would type it.
pub(crate) fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

enum Event {
    Line(String),
    Exited(std::io::Result<ExitStatus>),
}

fn send_lines(output: ChildStdout, events: &Sender<Event>) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    while matches!(output.read_until(b'\n', &mut line), Ok(read) if read > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if events.send(Event::Line(text)).is_err() {
            return;
        }
    }
}

/// A shell beside the command's process group that ends the group when it is told to, or when we are gone: its
/// standard input closes with us, however we die.
struct Guard(Child);

impl Guard {
    fn over(child: &Child) -> Result<Self> {
        let mut guard = Command::new("sh");
        guard
            .args(["-c", GUARD, &child.id().to_string()])
            .stdin(Stdio::piped())
            .process_group(0);
        Ok(Self(guard.spawn().context("start sh")?))
    }

    /// The command has ended by itself.
    fn stand_down(mut self) -> Result<()> {
        if let Some(mut stdin) = self.0.stdin.take() {
            stdin.write_all(b"done\n")?;
        }
        self.0.wait()?;
        Ok(())
    }

    /// Ends the group: asks first, so that tests can clean up, then insists.
    fn strike(mut self) -> Result<()> {
        drop(self.0.stdin.take());
        self.0.wait()?;
        Ok(())
    }
}

/// How long output may trickle in after the command has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

const GUARD: &str = "\
    read -r word && [ \"$word\" = done ] && exit 0
    kill -s TERM -- \"-$0\" 2>/dev/null
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        kill -s 0 -- \"-$0\" 2>/dev/null || exit 0
        sleep 0.3
    done
    kill -s KILL -- \"-$0\" 2>/dev/null";

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_exit_code_arrive() {
        let mut seen = Vec::new();
        let end = lines(
            sh("echo one; echo two; exit 3"),
            Duration::from_secs(20),
            |line| {
                seen.push(line.to_owned());
            },
        );
        assert_eq!(end.unwrap(), End::Failure(Some(3)));
        assert_eq!(seen, ["one", "two"]);
    }

    #[test]
    fn a_hung_command_is_ended_with_its_children() {
        let mut child = String::new();
        let end = lines(
            sh("sleep 600 & echo $!; wait"),
            Duration::from_millis(300),
            |line| {
                child = line.to_owned();
            },
        );
        assert_eq!(end.unwrap(), End::TimedOut);
        let alive = std::fs::read_to_string(format!("/proc/{child}/stat"));
        assert!(
            alive.is_err() || alive.unwrap().contains(") Z "),
            "{child} still runs"
        );
    }

    #[test]
    fn a_grandchild_that_keeps_the_pipe_does_not_hold_us() {
        let start = Instant::now();
        let end = lines(sh("sleep 60 & echo up"), Duration::from_secs(120), |_| {});
        assert_eq!(end.unwrap(), End::Success);
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = capture(Command::new("no-such-program-here")).unwrap_err();
        assert!(error.to_string().contains("no-such-program-here"));
    }
}
