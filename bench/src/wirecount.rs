//! Counts what crosses the cables, by port: HBONE's 15008 and all other TCP, between the nodes and at the doors of the
//! pods of node `a`. Takes a topology; gives counts; the rules sit in the nodes' namespaces, the same for every contender.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::Value;
use ztunnel_tests::{
    process::output,
    topology::{LINK, Topology},
    ztunnel::HBONE,
};

/// Bytes of TCP, with headers, that crossed a place since the counters were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) between_nodes: Crossed,
    /// At the doors of the client's pod and of the server's pod on the same node.
    pub(crate) at_pods: Crossed,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Crossed {
    pub(crate) hbone_bytes: u64,
    pub(crate) other_bytes: u64,
}

impl Counts {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            between_nodes: self.between_nodes.since(before.between_nodes),
            at_pods: self.at_pods.since(before.at_pods),
        }
    }
}

impl Crossed {
    pub(crate) fn all(self) -> u64 {
        self.hbone_bytes + self.other_bytes
    }

    fn since(self, before: Self) -> Self {
        Self {
            hbone_bytes: self.hbone_bytes - before.hbone_bytes,
            other_bytes: self.other_bytes - before.other_bytes,
        }
    }

    fn add(&mut self, counter: &str, bytes: u64) {
        if counter.ends_with("hbone") {
            self.hbone_bytes += bytes;
        } else {
            self.other_bytes += bytes;
        }
    }
}

/// Starts counting in both nodes of `topology`; `doors` are the pods of node `a` that a local connection uses.
pub(crate) fn install(topology: &Topology, doors: &[&str]) -> Result<()> {
    let doors: Vec<_> = doors.iter().map(|pod| format!("p-{pod}")).collect();
    for node in topology.nodes() {
        let mut rules = format!("table netdev {TABLE} {{\n");
        chain(&mut rules, NODES, &[LINK.to_owned()])?;
        if node.name == "a" {
            chain(&mut rules, PODS, &doors)?;
        }
        rules.push_str("}\n");
        output(Some(&node.netns), "nft", &["-f", "-"], &rules).context("count packets")?;
    }
    Ok(())
}

/// The counters now.
pub(crate) fn read(topology: &Topology) -> Result<Counts> {
    let mut counts = Counts::default();
    for node in topology.nodes() {
        let text = output(
            Some(&node.netns),
            "nft",
            &["-j", "list", "counters", "table", "netdev", TABLE],
            "",
        )?;
        let page: Value = serde_json::from_str(&text)?;
        let counters = page
            .get("nftables")
            .and_then(Value::as_array)
            .context("nft lists no counters")?;
        for counter in counters.iter().filter_map(|entry| entry.get("counter")) {
            let name = counter.get("name").and_then(Value::as_str).unwrap_or("");
            let bytes = counter.get("bytes").and_then(Value::as_u64).unwrap_or(0);
            if name.starts_with(PODS) {
                counts.at_pods.add(name, bytes);
            } else {
                counts.between_nodes.add(name, bytes);
            }
        }
    }
    Ok(counts)
}

fn chain(rules: &mut String, place: &str, devices: &[String]) -> Result<()> {
    let devices: Vec<_> = devices.iter().map(|name| format!("\"{name}\"")).collect();
    let devices = devices.join(", ");
    write!(
        rules,
        "counter {place}-hbone {{ }}\n\
         counter {place}-other {{ }}\n\
         chain {place} {{\n\
         type filter hook ingress devices = {{ {devices} }} priority 0;\n\
         tcp dport {HBONE} counter name \"{place}-hbone\" accept\n\
         tcp sport {HBONE} counter name \"{place}-hbone\" accept\n\
         meta l4proto tcp counter name \"{place}-other\"\n\
         }}\n"
    )?;
    Ok(())
}

const TABLE: &str = "bench";
const NODES: &str = "nodes";
const PODS: &str = "pods";
