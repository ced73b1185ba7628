//! The box under the benchmark: what it is, how busy it is, and who else uses it. Reads `/proc`; gives facts, seconds
//! of CPU and strangers; never changes a setting.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// What every output says about where its numbers come from.
pub(crate) fn facts() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let field = |text: &str, name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cpu": field(&cpu, "model name"),
        "cpus": thread::available_parallelism().map_or(1, usize::from),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "virtual_machine": cpu.contains(" hypervisor"),
        "tools": {
            "iperf3": first_line("iperf3", &["--version"]),
            "wrk": first_line("wrk", &["--version"]),
            "sockperf": first_line("sockperf", &["--version"]),
            "nginx": first_line("nginx", &["-v"]),
        },
    })
}

/// What a program says first when it is asked who it is.
pub(crate) fn first_line(program: &str, args: &[&str]) -> String {
    let Ok(said) = Command::new(program).args(args).output() else {
        return String::from("not there");
    };
    let text = [said.stdout, said.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// CPU seconds so far: of the whole machine, of some processes, and of everybody who is not ours.
#[derive(Debug)]
pub(crate) struct Usage {
    at: Instant,
    busy: f64,
    of_processes: f64,
    strangers: BTreeMap<i32, Stranger>,
}

#[derive(Clone, Debug)]
struct Stranger {
    name: String,
    seconds: f64,
}

/// What happened between two looks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spent {
    /// By everybody, with interrupts.
    pub(crate) machine_seconds: f64,
    /// By the processes that were named.
    pub(crate) processes_seconds: f64,
    /// The busiest foreign process, if it used more than its share of a core.
    pub(crate) disturber: Option<String>,
}

impl Usage {
    /// Looks now. `processes` are those whose own use counts.
    pub(crate) fn now(processes: &[u32]) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let columns: Vec<f64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .filter_map(|word| word.parse().ok())
            .collect();
        let [user, nice, system, _, _, irq, softirq, ..] = columns.as_slice() else {
            bail!("/proc/stat is not as expected");
        };
        let mut of_processes = 0.0;
        for pid in processes {
            of_processes += Process::read(i32::try_from(*pid)?)
                .with_context(|| format!("process {pid} has ended"))?
                .own_seconds;
        }
        Ok(Self {
            at: Instant::now(),
            busy: (user + nice + system + irq + softirq) / TICKS,
            of_processes,
            strangers: strangers()?,
        })
    }

    /// What was spent since `self`.
    pub(crate) fn until(&self, now: &Self) -> Spent {
        let took = (now.at - self.at).as_secs_f64();
        let busiest = now
            .strangers
            .iter()
            .map(|(pid, stranger)| {
                let before = self.strangers.get(pid).map_or(0.0, |s| s.seconds);
                (pid, stranger, stranger.seconds - before)
            })
            .max_by(|(_, _, a), (_, _, b)| a.total_cmp(b));
        let disturber = busiest
            .filter(|(_, _, seconds)| *seconds > FOREIGN_SHARE * took + TICK_SECONDS)
            .map(|(pid, stranger, seconds)| {
                let percent = seconds / took * 100.0;
                format!(
                    "{} (pid {pid}) used {percent:.0} % of a core",
                    stranger.name
                )
            });
        Spent {
            machine_seconds: now.busy - self.busy,
            processes_seconds: now.of_processes - self.of_processes,
            disturber,
        }
    }
}

/// Waits until nobody else works here, at most for `patience`.
pub(crate) fn wait_quiet(patience: Duration, mut say: impl FnMut(&str)) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let before = Usage::now(&[])?;
        thread::sleep(LISTEN);
        let Some(disturber) = before.until(&Usage::now(&[])?).disturber else {
            return Ok(());
        };
        if Instant::now() > deadline {
            bail!(
                "the machine is not quiet: {disturber}; end it, or measure all the same with --noisy"
            );
        }
        say(&format!("waiting for quiet: {disturber}"));
    }
}

/// Resident memory of a process, in MB of 10^6 bytes.
pub(crate) fn resident_mb(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} has ended"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|word| word.parse::<f64>().ok())
        .context("no VmRSS")?;
    Ok(kib * 1024.0 / 1e6)
}

/// User processes that we did not start.
fn strangers() -> Result<BTreeMap<i32, Stranger>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok())
            && let Some(process) = Process::read(pid)
        {
            all.insert(pid, process);
        }
    }
    let mut ours = BTreeSet::from([i32::try_from(std::process::id())?]);
    let mut before = 0;
    while ours.len() != before {
        before = ours.len();
        let children: Vec<i32> = all
            .iter()
            .filter(|(_, process)| ours.contains(&process.parent))
            .map(|(pid, _)| *pid)
            .collect();
        ours.extend(children);
    }
    Ok(all
        .into_iter()
        // Kernel threads work for us too, and their parent is number 2.
        .filter(|(pid, process)| !ours.contains(pid) && process.parent != 2 && *pid != 2)
        .map(|(pid, process)| {
            let seconds = process.own_seconds + process.children_seconds;
            let name = process.name;
            (pid, Stranger { name, seconds })
        })
        .collect())
}

struct Process {
    name: String,
    parent: i32,
    own_seconds: f64,
    /// Of children that have ended: a compiler's work shows in the one that started it.
    children_seconds: f64,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let path = Path::new("/proc").join(pid.to_string()).join("stat");
        let stat = fs::read_to_string(path).ok()?;
        let (head, tail) = stat.rsplit_once(')')?;
        let columns: Vec<&str> = tail.split_whitespace().collect();
        let ticks = |at: usize| columns.get(at)?.parse::<f64>().ok();
        Some(Self {
            name: head.split_once('(')?.1.to_owned(),
            parent: columns.get(1)?.parse().ok()?,
            own_seconds: (ticks(11)? + ticks(12)?) / TICKS,
            children_seconds: (ticks(13)? + ticks(14)?) / TICKS,
        })
    }
}

/// USER_HZ, which is 100 wherever we run.
const TICKS: f64 = 100.0;
const TICK_SECONDS: f64 = 0.02;
/// A foreign process that uses more of a core than this spoils a measurement.
const FOREIGN_SHARE: f64 = 0.12;
const LISTEN: Duration = Duration::from_millis(500);
