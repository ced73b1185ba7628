//! The rules that a node agent of the established mesh puts into a pod to redirect its traffic, as
//! facts about that agent. Takes a pod; gives the rules in it, or nothing; never touches a node.

use anyhow::Result;

use crate::{netns::Netns, process::output};

/// Puts the rules into a pod, in both families.
pub fn install(pod: &Netns) -> Result<()> {
    restore(pod, "", "")
}

/// The same with those that redirect questions to resolvers.
pub fn install_with_dns(pod: &Netns) -> Result<()> {
    restore(pod, DNS_NAT, DNS_RAW)
}

fn restore(pod: &Netns, dns: &str, raw: &str) -> Result<()> {
    for (restore, loopback, probe) in [
        ("iptables-restore", "127.0.0.1/32", "169.254.7.127"),
        (
            "ip6tables-restore",
            "::1/128",
            "fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
        ),
    ] {
        let text = RULES.replace("DNS\n", dns) + raw;
        let text = text.replace("LOOPBACK", loopback).replace("PROBE", probe);
        output(Some(pod), restore, &["--noflush"], &text)?;
    }
    for family in ["-4", "-6"] {
        let any = if family == "-4" { "0.0.0.0/0" } else { "::/0" };
        let ip = |args: &[&str]| output(Some(pod), "ip", &[&[family], args].concat(), "").map(drop);
        ip(&[
            "route", "replace", "local", any, "dev", "lo", "table", "100",
        ])?;
        ip(&[
            "rule",
            "add",
            "fwmark",
            "0x111/0xfff",
            "pref",
            "32764",
            "lookup",
            "100",
        ])?;
    }
    Ok(())
}

/// As the agent restores them, with a place for what DNS capture adds.
const RULES: &str = "\
*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A OUTPUT -j ISTIO_OUTPUT
-A PREROUTING -j ISTIO_PRERT
-A ISTIO_PRERT -s PROBE -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT -d PROBE -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d LOOPBACK -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
DNS
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d LOOPBACK -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d LOOPBACK -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
";

const DNS_NAT: &str = "\
-A ISTIO_OUTPUT ! -o lo -p udp -m udp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT ! -d LOOPBACK -p tcp -m tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
";

/// Our own questions have a zone of their own, so that answers to them are not taken for the pod's.
const DNS_RAW: &str = "\
*raw
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m udp --dport 53 -m mark --mark 0x539/0xfff -j CT --zone 1
-A ISTIO_PRERT -p udp -m udp --sport 53 -m mark ! --mark 0x539/0xfff -j CT --zone 1
COMMIT
";
