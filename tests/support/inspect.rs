//! What the mesh promises not to touch: addresses and routes of a pod, packet filters. Takes a
//! namespace; gives snapshots to compare; a tool that is missing is an error, never an empty answer.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::{netns::Netns, process::output};

/// `eth0` of a pod: its addresses, and every route that leaves by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eth0 {
    addresses: String,
    routes_v4: String,
    routes_v6: String,
    neighbours: String,
}

impl Eth0 {
    /// As they are now.
    pub fn of(netns: &Netns) -> Result<Self> {
        let ip = |args: &[&str]| output(Some(netns), "ip", args, "");
        Ok(Self {
            addresses: ip(&["-json", "address", "show", "dev", "eth0"])?,
            routes_v4: ip(&[
                "-4", "-json", "route", "show", "table", "all", "dev", "eth0",
            ])?,
            routes_v6: ip(&[
                "-6", "-json", "route", "show", "table", "all", "dev", "eth0",
            ])?,
            neighbours: ip(&["-json", "neigh", "show", "dev", "eth0", "nud", "permanent"])?,
        })
    }
}

/// Everything that decides where a pod's packets go: rules, routes of every table, and the setting
/// that lets accepted sockets inherit a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routing {
    rules: [String; 2],
    routes: [String; 2],
    fwmark_accept: String,
}

impl Routing {
    /// As it is now.
    pub fn of(netns: &Netns) -> Result<Self> {
        let ip = |args: &[&str]| output(Some(netns), "ip", args, "");
        let fwmark_accept =
            netns.within(|| Ok(fs::read_to_string("/proc/sys/net/ipv4/tcp_fwmark_accept")?))?;
        Ok(Self {
            rules: [ip(&["-4", "rule", "show"])?, ip(&["-6", "rule", "show"])?],
            routes: [
                ip(&["-4", "route", "show", "table", "all"])?,
                ip(&["-6", "route", "show", "table", "all"])?,
            ],
            fwmark_accept,
        })
    }
}

/// Rules of iptables and nftables in a namespace; empty if there are none.
pub fn packet_filter(netns: &Netns) -> Result<String> {
    let mut rules = String::new();
    for (program, args) in [
        ("iptables-save", &[][..]),
        ("ip6tables-save", &[][..]),
        ("nft", &["list", "ruleset"][..]),
    ] {
        rules.push_str(&output(Some(netns), program, args, "")?);
    }
    Ok(rules)
}

/// Fails with the rules if there are any.
pub fn no_packet_filter(netns: &Netns) -> Result<()> {
    let rules = packet_filter(netns)?;
    ensure!(
        rules.trim().is_empty(),
        "packet filter rules in {netns}:\n{rules}"
    );
    Ok(())
}

/// Connections from this namespace to `port` whose SYN nobody has answered yet.
pub fn unanswered_syns(netns: &Netns, port: u16) -> Result<usize> {
    netns.within(|| {
        let mut count = 0;
        // `/proc/net` would show the namespace of the process, not of this thread.
        for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
            let text = fs::read_to_string(table).with_context(|| format!("read {table}"))?;
            let to = format!(":{port:04X}");
            count += text
                .lines()
                .map(|line| line.split_whitespace().skip(2).take(2).collect::<Vec<_>>())
                .filter(|columns| matches!(columns[..], [peer, SYN_SENT] if peer.ends_with(&to)))
                .count();
        }
        Ok(count)
    })
}

/// As `/proc/net/tcp` writes it.
const SYN_SENT: &str = "02";
