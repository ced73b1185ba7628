//! The program: arguments in, exit code out. Never does the work itself.
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "the command line speaks before and beside the log"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ztunnel::app::Logs;
use ztunnel::config::{Config, LogFormat};
use ztunnel::logging;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A burst must not stay resident: one thread of the allocator gives pages back after a second.
/// One arena is enough for a few workers, each of which has its own cache in front of it.
#[expect(
    unsafe_code,
    reason = "the name under which the allocator looks for its settings"
)]
#[unsafe(export_name = "_rjem_malloc_conf")]
static ALLOCATOR_SETTINGS: Option<&'static [u8; 105]> = Some(
    b"narenas:2,background_thread:true,max_background_threads:1,\
      dirty_decay_ms:1000,muzzy_decay_ms:0,thp:never\0",
);

/// The node proxy of an ambient mesh: captures the pods' TCP by eBPF, carries it over HBONE and
/// enforces L4 authorization. Settings come from the environment; see deploy/README.md.
#[derive(Debug, Parser)]
#[command(name = "ztunnel", version)]
struct Arguments {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve the pods of this node (the default).
    Proxy {
        /// Taken for compatibility with the established proxy; not used.
        #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Undo everything that this node's capture left in the kernel: pods leave the mesh.
    Release {
        /// Where the programs are pinned; by default what BPF_PIN_DIR says.
        #[arg(long)]
        pin_dir: Option<PathBuf>,
    },
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    match Arguments::parse().verb {
        None => proxy(&[]),
        Some(Verb::Proxy { rest }) => proxy(&rest),
        Some(Verb::Release { pin_dir }) => release(pin_dir),
        Some(Verb::Version) => {
            println!("ztunnel {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
    }
}

fn proxy(rest: &[String]) -> ExitCode {
    let config = match Config::read() {
        Ok(config) => config,
        Err(error) => return failed("settings", &error),
    };
    let format = match config.log_format {
        LogFormat::Json => logging::Format::Json,
        LogFormat::Plain => logging::Format::Plain,
    };
    // Lines are written while the guard lives.
    let guard = match logging::init(format, &config.log_filter) {
        Ok(guard) => guard,
        Err(error) => return failed("logging", &error),
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        "starting"
    );
    if !rest.is_empty() {
        tracing::info!(arguments = ?rest, "arguments after the verb are not used");
    }
    for (variable, reason) in &config.ignored {
        tracing::warn!(variable, reason, "this variable is not honoured");
    }
    if !config.unusable.is_empty() {
        let unusable = config.unusable.join(" ");
        tracing::error!(%unusable, "variables that do not parse as JSON are left out of the node's metadata");
    }
    let ended = ztunnel::app::run(
        &config,
        Logs {
            rows: guard.source(),
            levels: guard.levels(),
        },
    );
    drop(guard);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ ztunnel::app::Error::WorkerLost(_)) => failed("ended", &error),
        Err(error) => failed("cannot start", &error),
    }
}

fn release(pin_dir: Option<PathBuf>) -> ExitCode {
    let pin_dir = pin_dir.unwrap_or_else(ztunnel::config::bpf_pin_dir);
    match ztunnel::capture::release_all(&pin_dir) {
        Ok(released) if !released.found => {
            println!("nothing is pinned at {}", pin_dir.display());
            ExitCode::SUCCESS
        }
        Ok(released) => {
            println!(
                "{} pods released from {}",
                released.pods.len(),
                pin_dir.display()
            );
            for cookie in &released.unreachable {
                println!(
                    "namespace {cookie}: not captured any more, but its ip rule and routes stay: no \
                     path leads to it"
                );
            }
            ExitCode::SUCCESS
        }
        Err(error) => failed("release", &error),
    }
}

/// One line: what was being done, what went wrong, and its causes.
fn failed(what: &str, error: &dyn std::error::Error) -> ExitCode {
    let mut line = format!("ztunnel: {what}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    eprintln!("{line}");
    ExitCode::FAILURE
}
