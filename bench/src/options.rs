//! The command line: what is measured, how often, against whom, and where the results go. Parses; decides nothing.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::{Parser, Subcommand};

use crate::{
    contenders::{Contender, Setting},
    roles::Role,
    scenario,
};

/// Measures the mesh on this machine, with proof of every path.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask bench",
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    after_help = "`cargo xtask bench micro` measures the pure rooms and memory per workload; \
                  `cargo xtask profile SCENARIO CONTENDER` shows where the time goes."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Option<Verb>,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// A flame graph and a count of system calls of a contender's processes under a load.
    Profile(Profile),
    /// One of our own load generators.
    #[command(hide = true)]
    Role {
        #[command(subcommand)]
        role: Role,
    },
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Run {
    /// At most four minutes: fewer scenarios, repetitions and seconds.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Only these scenarios, such as S4,S22.
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    pub(crate) only: Vec<String>,
    /// Only these contenders, such as none,ours; ratios need `none`.
    #[arg(long, value_delimiter = ',', value_enum)]
    contenders: Vec<Contender>,
    /// Repetitions, of which the first does not count.
    #[arg(long)]
    reps: Option<usize>,
    /// Length of one measurement.
    #[arg(long)]
    seconds: Option<u32>,
    /// Writes the rows here.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Writes charts here, as SVG and as PNG.
    #[arg(long, value_name = "DIR")]
    pub(crate) plot: Option<PathBuf>,
    /// Measures although somebody else uses the machine, and keeps what that spoils.
    #[arg(long)]
    pub(crate) noisy: bool,
    #[command(flatten)]
    pub(crate) with: With,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Profile {
    /// Such as S4.
    pub(crate) scenario: String,
    #[arg(value_enum)]
    pub(crate) contender: Contender,
    /// How long to look.
    #[arg(long, default_value_t = 5)]
    pub(crate) seconds: u32,
    /// Writes the flame graph and the counts here.
    #[arg(long, value_name = "DIR", default_value = "target/profile")]
    pub(crate) to: PathBuf,
    #[command(flatten)]
    pub(crate) with: With,
}

/// Programs and their settings, the same for measuring and for looking.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct With {
    /// Another node proxy that takes its pods over ZDS: the path of its binary.
    #[arg(long, value_name = "PATH")]
    peer: Option<PathBuf>,
    /// A setting for it, such as those of a test CA; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    peer_env: Vec<(String, String)>,
    /// Worker threads of each proxy.
    #[arg(long, default_value_t = 2)]
    pub(crate) workers: usize,
    /// Proxies write no access log.
    #[arg(long)]
    pub(crate) no_access_log: bool,
    /// The node process of this mesh; `cargo xtask` fills it in.
    #[arg(long, hide = true, default_value = "ztunnel")]
    ztunnel: PathBuf,
    /// Envoy; `cargo xtask` fills it in.
    #[arg(long, hide = true, default_value = "envoy")]
    envoy: PathBuf,
}

impl Run {
    /// Those that take part, the yardstick first.
    pub(crate) fn contenders(&self) -> Result<Vec<Contender>> {
        for id in &self.only {
            let known = scenario::names();
            ensure!(
                known.iter().any(|name| name.eq_ignore_ascii_case(id)),
                "no scenario {id}; there are {}",
                known.join(", ")
            );
        }
        let mut wanted = self.contenders.clone();
        if wanted.is_empty() {
            use Contender::{Envoy, Limit, None, Ours, OursCrypto, Peer};
            wanted = vec![None, Ours, OursCrypto, Envoy, Limit];
            if self.with.peer.is_some() {
                wanted.push(Peer);
            }
        }
        if wanted.contains(&Contender::Peer) && self.with.peer.is_none() {
            bail!("the contender peer needs --peer PATH");
        }
        wanted.sort_unstable();
        wanted.dedup();
        Ok(wanted)
    }

    /// Repetitions, with the first.
    pub(crate) fn repetitions(&self) -> Result<usize> {
        let repetitions = self.reps.unwrap_or(if self.quick { 3 } else { 9 });
        ensure!(
            repetitions >= 2,
            "the first repetition does not count: --reps needs at least 2"
        );
        Ok(repetitions)
    }

    pub(crate) fn seconds(&self) -> Result<u32> {
        let seconds = self.seconds.unwrap_or(if self.quick { 1 } else { 3 });
        ensure!(seconds >= 1, "--seconds needs at least 1");
        Ok(seconds)
    }
}

impl With {
    pub(crate) fn setting(&self) -> Setting {
        Setting {
            ztunnel: self.ztunnel.clone(),
            envoy: self.envoy.clone(),
            peer: self.peer.clone(),
            peer_environment: self.peer_env.clone(),
            workers: self.workers,
            access_log: !self.no_access_log,
        }
    }
}

fn key_value(text: &str) -> Result<(String, String)> {
    let Some((key, value)) = text.split_once('=') else {
        bail!("not KEY=VALUE");
    };
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &str) -> Run {
        let always = ["bench", "--ztunnel", "z", "--envoy", "e"];
        let words = always.into_iter().chain(words.split_whitespace());
        Cli::try_parse_from(words).unwrap().run
    }

    #[test]
    fn the_yardstick_comes_first_and_a_peer_only_when_it_is_there() {
        let all = run("").contenders().unwrap();
        assert_eq!(all.first(), Some(&Contender::None));
        assert!(!all.contains(&Contender::Peer));
        assert!(
            run("--peer /p")
                .contenders()
                .unwrap()
                .contains(&Contender::Peer)
        );
        run("--contenders peer").contenders().unwrap_err();
        assert_eq!(
            run("--contenders ours,none").contenders().unwrap(),
            [Contender::None, Contender::Ours]
        );
    }

    #[test]
    fn an_unknown_scenario_is_named_and_one_repetition_is_too_few() {
        let error = run("--only S4,S99").contenders().unwrap_err();
        assert!(error.to_string().contains("S99"), "{error}");
        run("--reps 1").repetitions().unwrap_err();
        assert_eq!(run("--quick").repetitions().unwrap(), 3);
    }

    #[test]
    fn a_peers_setting_may_hold_an_equals_sign() {
        let setting = run("--peer-env A=b=c --peer-env D=").with.setting();
        let expected = [("A", "b=c"), ("D", "")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(setting.peer_environment, expected);
    }
}
