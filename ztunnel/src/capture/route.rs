//! What a pod's network namespace needs so that an application's answers to a client come back to us:
//! takes the namespace, adds rules, tables and sysctls, and takes them away again. It never
//! touches a device other than `lo`, or an address.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
};

use nix::net::if_::if_indextoname;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder, new_connection,
    packet_route::{
        AddressFamily,
        route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use super::{Error, Netns, netns};

// PROTOCOL.md#reply-mark
/// On our connections to the application; its answers carry it too.
pub(super) const REPLY_MARK: u32 = 0x53a;

/// What [`install`] found.
pub(super) struct Installed {
    /// The sysctls that it turned on, a bit each.
    pub(super) turned_on: u32,
    /// Whether anything was not as it should be.
    pub(super) was_missing: bool,
    /// Whether `lo` speaks IPv6.
    pub(super) v6: bool,
}

/// Installs everything, with `dns` also what questions to resolvers need; what is there already
/// stays.
pub(super) fn install(netns: &Netns, dns: bool) -> Result<Installed, Error> {
    netns
        .run_apart(|| {
            let v6 = has_v6();
            let lo = name_of_lo()?;
            let mut turned_on = 0;
            for (bit, sysctl) in sysctls(v6) {
                if write(sysctl, "1")? {
                    turned_on |= bit;
                }
            }
            let added = on_netlink(async |handle| {
                let up = LinkUnspec::new_with_index(netns::LOOPBACK.get())
                    .up()
                    .build();
                accept(handle.link().set(up).execute().await, &[])
                    .map_err(route_error("set lo up"))?;
                let mut added = false;
                for wanted in wanted(v6, dns, Some(&lo)) {
                    added |= wanted.add(&handle).await?;
                }
                if v6 && !dns {
                    // A process before this one may have captured DNS.
                    stand_ins().remove(&handle).await?;
                }
                Ok(added)
            })?;
            Ok(Installed {
                turned_on,
                was_missing: added || turned_on != 0,
                v6,
            })
        })
        .map_err(Error::NetnsEnter)?
}

/// Whether the sysctls of the namespace that this thread is in are as [`install`] left them. One
/// that cannot be read is for `install` to name.
pub(super) fn sysctls_are_on() -> bool {
    sysctls(has_v6())
        .all(|(_, path)| fs::read_to_string(path).is_ok_and(|value| value.trim() == "1"))
}

/// Takes away what [`install`] added; what is gone already is fine. `lo` stays up.
pub(super) fn remove(netns: &Netns, turned_on: u32) -> Result<(), Error> {
    netns
        .run_apart(|| {
            let v6 = has_v6();
            for (bit, sysctl) in sysctls(v6) {
                if turned_on & bit != 0 {
                    write(sysctl, "0")?;
                }
            }
            on_netlink(async |handle| {
                for wanted in wanted(v6, true, None) {
                    wanted.remove(&handle).await?;
                }
                Ok(())
            })
        })
        .map_err(Error::NetnsEnter)?
}

enum Wanted {
    Rule(&'static str, Box<RuleMessage>),
    Route(&'static str, Box<RouteMessage>),
}

/// Without the name of `lo` they match whatever name it had when they were added.
fn wanted(v6: bool, dns: bool, lo: Option<&str>) -> Vec<Wanted> {
    let mut wanted = vec![
        Wanted::Rule(
            "IPv4 rule for marked replies",
            reply_rule(AddressFamily::Inet),
        ),
        Wanted::Route(
            "IPv4 route for marked replies",
            Box::new(
                RouteMessageBuilder::<Ipv4Addr>::new()
                    .table_id(REPLY_TABLE)
                    .output_interface(netns::LOOPBACK.get())
                    .kind(RouteType::Local)
                    .scope(RouteScope::Host)
                    .protocol(RouteProtocol::Static)
                    .build(),
            ),
        ),
    ];
    if v6 {
        wanted.push(Wanted::Rule(
            "IPv6 rule for marked replies",
            reply_rule(AddressFamily::Inet6),
        ));
        wanted.push(Wanted::Route(
            "IPv6 route for marked replies",
            Box::new(local_v6().table_id(REPLY_TABLE).build()),
        ));
        // PROTOCOL.md#v6-lo-rule
        // IPv4 takes any destination for local on a socket bound to `lo`; IPv6 wants a route. It has
        // a table of its own, which only such a socket looks into: anywhere else it would take what
        // has no other route, our own dials among it, and we would accept them again.
        wanted.push(Wanted::Route(
            "IPv6 route for captured connections",
            Box::new(local_v6().table_id(CAPTURE_TABLE).build()),
        ));
        wanted.push(Wanted::Rule(
            "IPv6 rule for captured connections",
            rule(
                AddressFamily::Inet6,
                CAPTURE_PRIORITY,
                CAPTURE_TABLE,
                lo.map(|lo| RuleAttribute::Oifname(lo.to_owned())),
            ),
        ));
        if dns {
            wanted.push(stand_ins());
        }
    }
    wanted
}

// PROTOCOL.md#dns-stand-in
/// The IPv6 ones; those of IPv4 are loopback addresses, and local without a route.
fn stand_ins() -> Wanted {
    let (prefix, bits) = ebpf_abi::STAND_INS_V6;
    Wanted::Route(
        "IPv6 route for stand-ins of resolvers",
        Box::new(
            local_v6()
                .destination_prefix(Ipv6Addr::from(prefix), bits)
                .build(),
        ),
    )
}

fn local_v6() -> RouteMessageBuilder<Ipv6Addr> {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .output_interface(netns::LOOPBACK.get())
        .kind(RouteType::Local)
        .protocol(RouteProtocol::Static)
}

fn reply_rule(family: AddressFamily) -> Box<RuleMessage> {
    let mark = [
        RuleAttribute::FwMark(REPLY_MARK),
        RuleAttribute::FwMask(u32::MAX),
    ];
    rule(family, REPLY_PRIORITY, REPLY_TABLE, mark)
}

fn rule(
    family: AddressFamily,
    priority: u32,
    table: u32,
    selectors: impl IntoIterator<Item = RuleAttribute>,
) -> Box<RuleMessage> {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Table(table),
    ];
    rule.attributes.extend(selectors);
    Box::new(rule)
}

impl Wanted {
    /// True if it was missing.
    async fn add(self, handle: &Handle) -> Result<bool, Error> {
        match self {
            Self::Rule(purpose, message) => {
                let mut request = handle.rule().add();
                *request.message_mut() = *message;
                accept(request.execute().await, &[libc::EEXIST]).map_err(route_error(purpose))
            }
            Self::Route(purpose, message) => accept(
                handle.route().add(*message).execute().await,
                &[libc::EEXIST],
            )
            .map_err(route_error(purpose)),
        }
    }

    async fn remove(self, handle: &Handle) -> Result<(), Error> {
        const GONE: &[i32] = &[libc::ENOENT, libc::ESRCH, libc::ENODEV];
        match self {
            Self::Rule(purpose, message) => {
                accept(handle.rule().del(*message).execute().await, GONE)
                    .map_err(route_error(purpose))
            }
            Self::Route(purpose, message) => {
                accept(handle.route().del(*message).execute().await, GONE)
                    .map_err(route_error(purpose))
            }
        }
        .map(drop)
    }
}

/// Takes the listed errors of the kernel for success: false, for nothing was to be done.
fn accept(answer: Result<(), rtnetlink::Error>, fine: &[i32]) -> Result<bool, rtnetlink::Error> {
    match answer {
        Err(rtnetlink::Error::NetlinkError(message))
            if fine.contains(&message.raw_code().saturating_neg()) =>
        {
            Ok(false)
        }
        other => other.map(|()| true),
    }
}

fn route_error(purpose: &'static str) -> impl Fn(rtnetlink::Error) -> Error {
    move |error| Error::Route {
        purpose,
        answer: error.to_string(),
    }
}

fn on_netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T, Error>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(async {
        let (connection, handle, _messages) = new_connection().map_err(Error::Runtime)?;
        let pump = tokio::spawn(connection);
        let answer = work(handle).await;
        pump.abort();
        answer
    })
}

/// Turns a sysctl to a value. True if it had another.
fn write(path: &str, value: &str) -> Result<bool, Error> {
    let failed = |source: io::Error| Error::Sysctl {
        path: path.into(),
        source,
    };
    if fs::read_to_string(path).map_err(failed)?.trim() == value {
        return Ok(false);
    }
    fs::write(path, value).map_err(failed)?;
    Ok(true)
}

/// The sysctls that bring the application's answers back to us, and the bit of each in what
/// [`install`] gives.
fn sysctls(v6: bool) -> impl Iterator<Item = (u32, &'static str)> {
    SYSCTLS
        .into_iter()
        .filter(move |(_, path)| v6 || !path.contains("/ipv6/"))
}

/// A rule wants a device by its name, which is the pod's to change.
fn name_of_lo() -> Result<String, Error> {
    if_indextoname(netns::LOOPBACK.get())
        .map(|name| name.to_string_lossy().into_owned())
        .map_err(|error| Error::Route {
            purpose: "find lo",
            answer: error.to_string(),
        })
}

fn has_v6() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
        .is_ok_and(|value| value.trim() == "0")
}

/// Opening one inside the namespace shows the namespace's own value. `tcp_fwmark_accept` serves both
/// families: accepted sockets answer with the mark of our SYN. `fwmark_reflect` does the same for the
/// reset of a port where nobody listens; without it that reset leaves by `eth0`, and our dial waits
/// for its deadline (6.18).
const SYSCTLS: [(u32, &str); 3] = [
    (1, "/proc/sys/net/ipv4/tcp_fwmark_accept"),
    (2, "/proc/sys/net/ipv4/fwmark_reflect"),
    (4, "/proc/sys/net/ipv6/fwmark_reflect"),
];
/// The number of the plaintext port; free in the tables that distributions name.
const REPLY_TABLE: u32 = 15006;
/// The number of the outbound port; as free.
const CAPTURE_TABLE: u32 = 15001;
/// Before `main` (32766) and the rules that `ip rule add` puts right above it.
const REPLY_PRIORITY: u32 = 32763;
const CAPTURE_PRIORITY: u32 = 32764;
