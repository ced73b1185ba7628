//! `cargo xtask test kernels`: boots Debian's other kernels in a software-emulated machine, runs the test programs inside
//! and counts what its console says; takes kernels from the package mirror and installs none of them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::house::{self, House};
use crate::process::{self, End};
use crate::tally::{Stage, Tally};

/// Builds the test programs and runs them on every kernel.
pub(crate) fn run(house: &House, tally: &mut Tally) -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the machine's kernels are for x86_64"
    );
    let programs = build_programs(house)?;
    let plan = plan(house, &programs)?;
    for series in SERIES {
        let began = Instant::now();
        let outcome = Kernel::get(house, series).and_then(|kernel| {
            let initrd = pack(house, &kernel, &programs, &plan)?;
            boot(house, &kernel, &initrd, &plan, tally)
        });
        match outcome {
            Ok(()) => println!("kernels: {series} took {} s", began.elapsed().as_secs()),
            Err(error) => tally.fail(format!("kernels {series}: {error:#}")),
        }
    }
    Ok(())
}

/// A program that cargo built: its target's name and where it is.
struct Program {
    name: String,
    path: PathBuf,
}

/// What runs inside: a test program and, if not all of them, the names of its tests.
struct Run {
    program: String,
    path: PathBuf,
    only: Vec<String>,
}

/// The node process and the test programs.
fn build_programs(house: &House) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for args in [
        &["build", "--locked", "--package=ztunnel"][..],
        &[
            "test",
            "--locked",
            "--no-run",
            "--package=ztunnel-tests",
            "--tests",
        ],
    ] {
        let mut build = house.cargo();
        build
            .args(args)
            .arg("--message-format=json-render-diagnostics");
        let end = process::lines(build, BUILD_LIMIT, |line| programs.extend(built(line)))?;
        ensure!(end.is_success(), "cargo {}: {end}", args.join(" "));
    }
    Ok(programs)
}

/// The program that a line of cargo's JSON announces.
fn built(line: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(line).ok()?;
    let path = message.get("executable")?.as_str()?.into();
    let name = message.get("target")?.get("name")?.as_str()?.to_owned();
    Some(Program { name, path })
}

/// Reads the list of what runs inside, and refuses a name that no test has.
fn plan(house: &House, programs: &[Program]) -> Result<Vec<Run>> {
    let text = fs::read_to_string(house.root.join(PLAN)).context(PLAN)?;
    let mut runs: Vec<Run> = Vec::new();
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
    {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let program = programs
            .iter()
            .find(|program| program.name == name)
            .with_context(|| format!("{PLAN}: no test program is called `{name}`"))?;
        let only = words.map(str::to_owned).collect();
        if let Some(run) = runs.iter_mut().find(|run| run.program == name) {
            run.only.extend(only);
        } else {
            runs.push(Run {
                program: name.to_owned(),
                path: program.path.clone(),
                only,
            });
        }
    }
    for run in &runs {
        let mut list = house.program(&run.path);
        list.args(["--list", "--format=terse"]);
        let said = process::capture(list)?;
        let tests: BTreeSet<&str> = said
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .collect();
        if let Some(gone) = run.only.iter().find(|name| !tests.contains(name.as_str())) {
            bail!("{PLAN}: {} has no test `{gone}`", run.program);
        }
    }
    Ok(runs)
}

/// A kernel, unpacked.
struct Kernel {
    series: &'static str,
    dir: PathBuf,
}

impl Kernel {
    /// The newest of the series that the mirror has; a kernel fetched earlier is as good.
    fn get(house: &House, series: &'static str) -> Result<Self> {
        let home = house.target.join("kernels");
        let dir = home.join(series);
        if dir.join("boot").is_dir() {
            return Ok(Self { series, dir });
        }
        let mut search = house.program("apt-cache");
        search.args(["pkgnames", &format!("linux-image-{series}.")]);
        let said = process::capture(search)?;
        let mut names: Vec<&str> = said
            .lines()
            .filter(|name| name.ends_with("-cloud-amd64"))
            .collect();
        names.sort_by_key(|name| numbers(name));
        // A name may outlive its package in the lists, so ask from the newest down.
        for name in names.iter().rev() {
            println!("kernels: fetching {name}");
            let unpacked = home.join(format!("{series}.new"));
            fs::create_dir_all(&unpacked)?;
            // apt writes into the current directory; its sandbox user cannot.
            let script = "apt-get -q -o APT::Sandbox::User=root download \"$0\" && dpkg -x ./*.deb . && rm ./*.deb";
            let mut fetch = house.program("sh");
            fetch.args(["-c", script, name]).current_dir(&unpacked);
            if process::run(fetch, FETCH_LIMIT)?.is_success() {
                fs::rename(&unpacked, &dir)?;
                return Ok(Self { series, dir });
            }
            fs::remove_dir_all(&unpacked)?;
        }
        bail!("the package lists have no linux-image-{series}.*-cloud-amd64; apt-get update?")
    }

    fn image(&self) -> Result<PathBuf> {
        find(&self.dir.join("boot"), &|name| name.starts_with("vmlinuz-"))
            .context("no kernel image in the package")
    }

    fn module(&self, name: &str) -> Result<PathBuf> {
        let (plain, packed) = (format!("{name}.ko"), format!("{name}.ko.xz"));
        find(&self.dir.join("lib/modules"), &|file| {
            file == plain || file == packed
        })
        .with_context(|| format!("no module {name} in the package"))
    }
}

/// All numbers of a name, so that 6.1.0-56 comes after 6.1.0-9.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

fn find(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, wanted) {
                return Some(found);
            }
        } else if path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(wanted)
        {
            return Some(path);
        }
    }
    None
}

/// Makes the machine's file system: a shell, programs with their libraries, modules, tests.
fn pack(house: &House, kernel: &Kernel, programs: &[Program], plan: &[Run]) -> Result<PathBuf> {
    let root = house
        .target
        .join("kernels")
        .join(format!("{}-root", kernel.series));
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    let mut tree = Tree {
        house,
        root,
        libraries: BTreeSet::new(),
    };
    let init = house.root.join(INIT);
    tree.copy(&init, "/init")?;
    fs::set_permissions(tree.at("/init"), fs::Permissions::from_mode(0o755))?;
    for name in TOOLS {
        let path = house::find_program(name)
            .with_context(|| format!("{name} is needed inside the machine"))?;
        tree.program(&path, &format!("/usr/bin/{name}"))?;
    }
    // Tests find the node process relative to themselves, so everything keeps its place.
    for program in programs {
        tree.program(&program.path, &program.path.display().to_string())?;
    }
    for (at, name) in MODULES.iter().enumerate() {
        tree.module(&kernel.module(name)?, &format!("/modules/{at}-{name}.ko"))?;
    }
    let runs: Vec<String> = plan.iter().map(line).collect();
    tree.write("/plan", &runs.concat())?;
    tree.write(
        "/etc/passwd",
        "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    )?;
    tree.write("/etc/group", "root:x:0:\nnogroup:x:65534:\n")?;

    let initrd = house
        .target
        .join("kernels")
        .join(format!("{}.initrd", kernel.series));
    let mut cpio = house.program("sh");
    cpio.args(["-c", "find . | cpio --quiet -o -H newc > \"$0\""])
        .arg(&initrd);
    cpio.current_dir(&tree.root);
    process::must(cpio, FETCH_LIMIT)?;
    Ok(initrd)
}

/// What the machine's init reads: name, program, arguments.
fn line(run: &Run) -> String {
    let exact = if run.only.is_empty() { "" } else { " --exact " };
    format!(
        "{} {}{exact}{}\n",
        run.program,
        run.path.display(),
        run.only.join(" ")
    )
}

struct Tree<'a> {
    house: &'a House,
    root: PathBuf,
    libraries: BTreeSet<PathBuf>,
}

impl Tree<'_> {
    /// Where an absolute path of the machine lies here; its directory exists afterwards.
    fn place(&self, path: &str) -> Result<PathBuf> {
        let place = self.at(path);
        let dir = place.parent().context("a file lies in a directory")?;
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        Ok(place)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        fs::copy(from, self.place(to)?).with_context(|| from.display().to_string())?;
        Ok(())
    }

    fn write(&self, to: &str, text: &str) -> Result<()> {
        Ok(fs::write(self.place(to)?, text)?)
    }

    /// A program without its debug information, and the libraries that it loads.
    fn program(&mut self, from: &Path, to: &str) -> Result<()> {
        let mut strip = self.house.program("strip");
        strip.arg("-o").arg(self.place(to)?).arg(from);
        process::capture(strip)?;
        let mut ldd = self.house.program("ldd");
        ldd.arg(from);
        // A static program makes ldd fail, and has none.
        for library in process::capture(ldd)
            .unwrap_or_default()
            .lines()
            .filter_map(library)
        {
            if self.libraries.insert(library.clone()) {
                self.copy(&library, &library.display().to_string())?;
            }
        }
        Ok(())
    }

    fn module(&self, from: &Path, to: &str) -> Result<()> {
        if from.extension().is_some_and(|extension| extension == "xz") {
            let mut unpack = self.house.program("sh");
            unpack
                .args(["-c", "busybox xzcat \"$0\" > \"$1\""])
                .arg(from)
                .arg(self.place(to)?);
            process::capture(unpack)?;
            return Ok(());
        }
        self.copy(from, to)
    }
}

/// Of `libc.so.6 => /lib/libc.so.6 (0x…)` and `/lib64/ld.so (0x…)`: the path.
fn library(line: &str) -> Option<PathBuf> {
    line.split_whitespace()
        .find(|word| word.starts_with('/'))
        .map(PathBuf::from)
}

/// Runs the machine to its end and counts what its console says.
fn boot(
    house: &House,
    kernel: &Kernel,
    initrd: &Path,
    plan: &[Run],
    tally: &mut Tally,
) -> Result<()> {
    let mut qemu = house.program("qemu-system-x86_64");
    qemu.args(MACHINE)
        .arg("-kernel")
        .arg(kernel.image()?)
        .arg("-initrd")
        .arg(initrd);
    let series = kernel.series;
    let mut running: Option<Stage> = None;
    let mut ran = 0_usize;
    let end = process::lines(qemu, BOOT_LIMIT, |line| {
        let show = running.as_mut().is_none_or(|stage| stage.line(line));
        if show {
            println!("{series} | {line}");
        }
        if let Some(name) = line.strip_prefix("@@ begin ") {
            running = Some(Stage::new(format!("kernels {series} {name}")));
        } else if let Some(code) = line.strip_prefix("@@ end ")
            && let Some(stage) = running.take()
        {
            ran += 1;
            let end = if code == "0" {
                End::Success
            } else {
                End::Failure(code.parse().ok())
            };
            tally.add(stage, end);
        }
    })?;
    if let Some(stage) = running {
        tally.add(
            stage,
            if end.is_success() {
                End::Failure(None)
            } else {
                end
            },
        );
    }
    ensure!(
        ran == plan.len(),
        "{ran} of {} test programs ended; the machine: {end}",
        plan.len()
    );
    Ok(())
}

/// The oldest kernel that we support, and the long-term one after it.
const SERIES: [&str; 2] = ["6.1", "6.12"];
const PLAN: &str = "tests/kernels/plan.txt";
const INIT: &str = "tests/kernels/init.sh";
const TOOLS: [&str; 7] = [
    "busybox", "curl", "ip", "nginx", "nsenter", "openssl", "setpriv",
];
/// In the order in which they load.
const MODULES: [&str; 3] = ["veth", "inet_diag", "tcp_diag"];
const MACHINE: [&str; 16] = [
    "-accel",
    "tcg,thread=multi",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-m",
    "2G",
    "-nodefaults",
    "-no-reboot",
    "-display",
    "none",
    "-serial",
    "stdio",
    "-append",
    // Only what ends the kernel may break into the tests' lines.
    "console=ttyS0 loglevel=1 panic=-1",
];
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
const FETCH_LIMIT: Duration = Duration::from_secs(10 * 60);
const BOOT_LIMIT: Duration = Duration::from_secs(40 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_ordered_by_number() {
        let mut names = [
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-9-cloud-amd64",
        ];
        names.sort_by_key(|name| numbers(name));
        assert!(names[0].contains("-9-"));
    }

    #[test]
    fn libraries_are_read_from_ldd() {
        assert_eq!(
            library("\tlibc.so.6 => /lib/libc.so.6 (0x1)"),
            Some("/lib/libc.so.6".into())
        );
        assert_eq!(
            library("\t/lib64/ld-linux.so.2 (0x1)"),
            Some("/lib64/ld-linux.so.2".into())
        );
        assert_eq!(library("\tlinux-vdso.so.1 (0x1)"), None);
    }

    #[test]
    fn a_program_is_read_from_cargos_messages() {
        let line =
            r#"{"reason":"compiler-artifact","target":{"name":"bpf"},"executable":"/x/bpf-1"}"#;
        assert!(built(line).is_some_and(|program| program.name == "bpf"));
        assert!(built(r#"{"target":{"name":"bpf"},"executable":null}"#).is_none());
        assert!(built("not json").is_none());
    }
}
