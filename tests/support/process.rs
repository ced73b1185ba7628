//! Children that cannot outlive us: long-running programs with their output as searchable lines,
//! and short ones with their output as text. Takes a `Command` and a namespace; never leaves a
//! process or its group behind.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead as _, BufReader, Read, Write as _},
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use crate::{netns::Netns, sys, wait};

/// A program that runs until told otherwise. Dropping it kills its whole process group.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    exited: Option<ExitStatus>,
    log: Arc<Log>,
}

impl Running {
    /// Starts `command` in `netns` with both output streams collected in [`Running::log`].
    pub fn start(name: &str, netns: Option<&Netns>, command: Command) -> Result<Self> {
        Self::launch(name, netns, command, None)
    }

    /// The same, with its output written to the end of a file too, for a person to follow.
    pub fn start_with_file(
        name: &str,
        netns: Option<&Netns>,
        command: Command,
        file: &Path,
    ) -> Result<Self> {
        let file = File::options().create(true).append(true).open(file);
        Self::launch(
            name,
            netns,
            command,
            Some(file.context("open the log's file")?),
        )
    }

    /// The same with its output in a file only: for a program that says more than anybody reads.
    pub fn start_unheard(
        name: &str,
        netns: Option<&Netns>,
        mut command: Command,
        file: &Path,
    ) -> Result<Self> {
        let netns = netns.map(Netns::open).transpose()?;
        let file = File::options()
            .create(true)
            .append(true)
            .open(file)
            .context("open the log's file")?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = spawn_for_good(command, netns).with_context(|| format!("start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            exited: None,
            log: Arc::default(),
        })
    }

    fn launch(
        name: &str,
        netns: Option<&Netns>,
        mut command: Command,
        file: Option<File>,
    ) -> Result<Self> {
        let netns = netns.map(Netns::open).transpose()?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn_for_good(command, netns).with_context(|| format!("start {name}"))?;
        let log = Arc::new(Log {
            file,
            ..Log::default()
        });
        if let Some(stdout) = child.stdout.take() {
            Log::follow(&log, stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            Log::follow(&log, stderr);
        }
        Ok(Self {
            name: name.to_owned(),
            child,
            exited: None,
            log,
        })
    }

    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the program itself, not to its group.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)
            .with_context(|| format!("send {signal} to {}", self.name))
    }

    /// The exit status, if the program has ended by now.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.exited.is_none() {
            self.exited = self.child.try_wait()?;
        }
        Ok(self.exited)
    }

    /// Waits for the program to end, at most for `patience`.
    pub fn wait_exit(&mut self, patience: Duration) -> Result<ExitStatus> {
        let what = format!("{} (pid {}) to exit", self.name, self.pid());
        // The kernel tells an exit to a blocking wait only, and that takes no deadline.
        wait::until(&what, patience, || self.ended().transpose())?
    }

    /// Kills the process group and collects the child.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        let group = Pid::from_raw(i32::try_from(self.child.id())?);
        killpg(group, Signal::SIGKILL).with_context(|| format!("kill {}", self.name))?;
        let status = self.child.wait()?;
        self.exited = Some(status);
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing useful can be done about a child that will not die; its parent's death ends it.
        drop(self.kill());
    }
}

/// Lines that a program wrote, with a bell for each. Bounded: the oldest go first.
#[derive(Debug, Default)]
pub struct Log {
    state: Mutex<LogState>,
    bell: Condvar,
    file: Option<File>,
}

#[derive(Debug, Default)]
struct LogState {
    lines: VecDeque<String>,
    /// Lines that were dropped from the front.
    forgotten: usize,
    writers: usize,
}

impl Log {
    /// How many lines have come so far; a place to start [`Log::wait_since`] from.
    #[must_use]
    pub fn mark(&self) -> usize {
        let state = self.lock();
        state.forgotten + state.lines.len()
    }

    /// All lines still held.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.since(0)
    }

    /// The lines that came after `mark`.
    #[must_use]
    pub fn since(&self, mark: usize) -> Vec<String> {
        let state = self.lock();
        let skip = mark.saturating_sub(state.forgotten);
        state.lines.iter().skip(skip).cloned().collect()
    }

    /// The first value that `pick` makes of any line, past or coming.
    pub fn wait_for<T>(
        &self,
        what: &str,
        patience: Duration,
        pick: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        self.wait_since(0, what, patience, pick)
    }

    /// The first value that `pick` makes of a line after `mark`.
    pub fn wait_since<T>(
        &self,
        mark: usize,
        what: &str,
        patience: Duration,
        mut pick: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        let mut next = mark;
        let mut state = self.lock();
        loop {
            let skip = next.saturating_sub(state.forgotten);
            if let Some(found) = state.lines.iter().skip(skip).find_map(|line| pick(line)) {
                return Ok(found);
            }
            next = state.forgotten + state.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.writers == 0 {
                let why = if state.writers == 0 {
                    "the program ended"
                } else {
                    "time is up"
                };
                let tail: Vec<_> = state.lines.iter().rev().take(TAIL).rev().cloned().collect();
                bail!(
                    "no line with {what}: {why}; its last lines:\n{}",
                    tail.join("\n")
                );
            }
            state = self
                .bell
                .wait_timeout(state, left)
                .map(|(state, _)| state)
                .unwrap_or_else(|poisoned| poisoned.into_inner().0);
        }
    }

    fn lock(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(log: &Arc<Self>, stream: impl Read + Send + 'static) {
        log.lock().writers += 1;
        let log = Arc::clone(log);
        thread::spawn(move || log.collect(stream));
    }

    fn collect(&self, stream: impl Read) {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if let Some(mut file) = self.file.as_ref() {
                // The copy is a convenience: a full disk must not stop the reading.
                drop(file.write_all(&line));
            }
            line.clear();
            let mut state = self.lock();
            if state.lines.len() == LOG_LINES {
                state.lines.pop_front();
                state.forgotten += 1;
            }
            state.lines.push_back(text);
            drop(state);
            self.bell.notify_all();
        }
        self.lock().writers -= 1;
        self.bell.notify_all();
    }
}

/// Runs a short program to its end, optionally in a namespace and with `input` on its standard
/// input, and gives its standard output. A failure carries what it said.
pub fn output(netns: Option<&Netns>, program: &str, args: &[&str], input: &str) -> Result<String> {
    run(netns, Command::new(program).args(args), input)
}

/// [`output`] for a command that is already made, without input.
pub fn finish(netns: Option<&Netns>, command: &mut Command) -> Result<String> {
    run(netns, command, "")
}

fn run(netns: Option<&Netns>, command: &mut Command, input: &str) -> Result<String> {
    let args: Vec<_> = command
        .get_args()
        .map(|arg| arg.to_string_lossy())
        .collect();
    let shown = format!(
        "{} {}",
        command.get_program().to_string_lossy(),
        args.join(" ")
    );
    let mut go = || -> Result<Output> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        sys::adopt(command, netns.map(Netns::open).transpose()?);
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        Ok(child.wait_with_output()?)
    };
    let out = go().with_context(|| shown.clone())?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("{} ({}; {shown})", said.trim(), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Spawns on a thread that never ends: a child's parent-death signal comes when the *thread* that
/// made it ends, and tests run on threads that come and go.
fn spawn_for_good(mut command: Command, netns: Option<File>) -> Result<Child> {
    type Job = Box<dyn FnOnce() + Send>;
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Job>>> = LazyLock::new(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || queue.into_iter().for_each(|job| job()));
        Mutex::new(jobs)
    });
    let (reply, answer) = mpsc::sync_channel(1);
    let job: Job = Box::new(move || {
        sys::adopt(&mut command, netns);
        // The receiver waits below and cannot be gone.
        drop(reply.send(command.spawn()));
    });
    SPAWNER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send(job)
        .ok()
        .context("the spawning thread is gone")?;
    Ok(answer.recv().context("the spawning thread is gone")??)
}

/// Lines kept per program: enough for every test, small against a runaway one.
const LOG_LINES: usize = 200_000;
/// Lines shown when a wait fails.
const TAIL: usize = 25;
