//! The local file. Takes its text, gives workloads, services, policies and pods, all checked, or
//! the place and the reason of the first fault; never gives a part of a file.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use serde_saphyr::{Location, MessageFormatter as _, Spanned, UserMessageFormatter};

use super::shape;
use crate::control::{Change, Error};
use crate::model::{NetworkAddr, NetworkMode, PodRef, Policy, ProbeSource, Service, Workload};

/// Everything that a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The workloads of the mesh, in file order.
    pub workloads: Vec<Arc<Workload>>,
    /// Its services.
    pub services: Vec<Arc<Service>>,
    /// Its policies.
    pub policies: Vec<Arc<Policy>>,
    /// The pods of this node that are to be enrolled.
    pub pods: Vec<PodEntry>,
}

impl State {
    /// What is different from an earlier state of the same file, pods apart. What is the same may be among it.
    #[must_use]
    pub fn changes_since(&self, before: &Self) -> Vec<Change> {
        let services: HashSet<_> = self.services.iter().map(|service| &service.key).collect();
        let workloads: HashSet<_> = self
            .workloads
            .iter()
            .map(|workload| &workload.uid)
            .collect();
        let policies: HashSet<_> = self.policies.iter().map(|policy| &policy.key).collect();
        let gone = |name: String| -> Arc<str> { name.into() };
        let mut changes = Vec::new();
        for old in before
            .services
            .iter()
            .filter(|old| !services.contains(&old.key))
        {
            changes.push(Change::AddressGone(gone(old.key.to_string())));
        }
        for old in before
            .workloads
            .iter()
            .filter(|old| !workloads.contains(&old.uid))
        {
            changes.push(Change::AddressGone(Arc::clone(&old.uid.0)));
        }
        for old in before
            .policies
            .iter()
            .filter(|old| !policies.contains(&old.key))
        {
            changes.push(Change::PolicyGone(gone(old.key.to_string())));
        }
        changes.extend(self.services.iter().map(Arc::clone).map(Change::Service));
        changes.extend(self.workloads.iter().map(Arc::clone).map(Change::Workload));
        changes.extend(self.policies.iter().map(Arc::clone).map(Change::Policy));
        changes
    }
}

/// A pod to enrol.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodEntry {
    /// Who it is.
    pub pod: PodRef,
    /// Where its network namespace is bound in the file system.
    pub netns: PathBuf,
    /// Destinations of its outbound connections that are not captured.
    pub exclude_outbound_cidrs: Vec<IpNet>,
    /// Destination ports of its outbound connections that are not captured.
    pub exclude_outbound_ports: Vec<u16>,
    /// Its own ports at which inbound connections are not captured.
    pub exclude_inbound_ports: Vec<u16>,
    /// Sources from which connections into it are not captured.
    pub exclude_inbound_cidrs: Vec<IpNet>,
    /// From where this node asks it how it is, past its policies.
    pub probe_sources: Vec<ProbeSource>,
    /// Its questions to resolvers are captured, if those of any pod are.
    pub dns_capture: bool,
}

/// Reads the text of a file; `file` is its name for error messages.
///
/// The shape is the established proxy's, with two deliberate differences: an empty trust domain
/// is `cluster.local` and an empty service account is `default`, as they are when a control plane
/// sends them. Unknown and repeated keys, values out of range, and names or addresses that are
/// given twice are refused.
///
/// # Errors
/// The first fault.
pub fn parse(file: &Path, text: &str) -> Result<State, Error> {
    if text.len() > usize::try_from(MAX_FILE_BYTES).unwrap_or(usize::MAX) {
        return Err(Error::TooLarge {
            file: file.to_owned(),
            limit_bytes: MAX_FILE_BYTES,
        });
    }
    let Some(shape) = read(file, text)? else {
        return Err(Error::Empty {
            file: file.to_owned(),
        });
    };
    state(shape).map_err(|fault| fault.in_file(file))
}

/// The largest file that is read.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// What is wrong, and where.
struct Fault {
    place: Location,
    field: String,
    reason: String,
}

impl Fault {
    fn in_file(self, file: &Path) -> Error {
        let (line, column) = if self.place == Location::UNKNOWN {
            (0, 0)
        } else {
            (self.place.line(), self.place.column())
        };
        Error::Invalid {
            file: file.to_owned(),
            line,
            column,
            field: self.field,
            reason: self.reason,
        }
    }
}

/// Text to shape; `None` for a document without content.
fn read(file: &Path, text: &str) -> Result<Option<shape::File>, Error> {
    // The size of the file bounds what the parser may build from it. Aliases, which could build
    // more, keep the library's own limits.
    let bytes = text.len().saturating_add(1);
    let options = serde_saphyr::options! {
        with_snippet: false,
        strict_booleans: true,
        emit_comments: false,
        budget: serde_saphyr::budget! {
            max_documents: 2, // the second has an error of its own
            max_events: bytes.saturating_mul(2).max(1_000),
            max_nodes: bytes.max(1_000),
        },
    };
    let mut field = String::new();
    let parsed = serde_saphyr::with_deserializer_from_str_with_options(text, options, |source| {
        serde_path_to_error::deserialize(source).map_err(|error| {
            field = path(error.path());
            error.into_inner()
        })
    });
    parsed.map_err(|error| {
        let error = error.without_snippet();
        let fault = Fault {
            place: error.location().unwrap_or(Location::UNKNOWN),
            field,
            reason: UserMessageFormatter.format_message(error).into_owned(),
        };
        fault.in_file(file)
    })
}

/// A path of keys without the step that the library takes to learn a value's place.
fn path(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            Segment::Map { key } | Segment::Enum { variant: key } if key != "value" => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(key);
            }
            Segment::Map { .. } | Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    text
}

/// Shape to state: what no single value can tell.
fn state(shape: shape::File) -> Result<State, Fault> {
    let mut state = State::default();
    let mut uids = Taken::new("uid");
    let mut addresses = Taken::new("address");
    for (index, entry) in shape.workloads.into_iter().enumerate() {
        let here = Here::new("workloads", index, &entry);
        let ip_places: Vec<_> = entry
            .value
            .workload_ips
            .iter()
            .map(|ip| ip.referenced)
            .collect();
        let workload = entry
            .value
            .into_workload()
            .map_err(|fault| here.fault(fault))?;
        uids.take(workload.uid.clone(), &here, ".uid", here.place)?;
        // Pods on the host's network share the node's address, and are not found by it.
        if workload.network_mode == NetworkMode::Standard {
            for (number, (ip, place)) in workload.ips.iter().zip(ip_places).enumerate() {
                let address = NetworkAddr::new(Arc::clone(&workload.network), *ip);
                addresses.take(address, &here, &format!(".workloadIps[{number}]"), place)?;
            }
        }
        state.workloads.push(Arc::new(workload));
    }
    let mut hostnames = Taken::new("service");
    for (index, entry) in shape.services.into_iter().enumerate() {
        let here = Here::new("services", index, &entry);
        let service = entry
            .value
            .into_service()
            .map_err(|fault| here.fault(fault))?;
        hostnames.take(service.key.clone(), &here, ".hostname", here.place)?;
        state.services.push(Arc::new(service));
    }
    let mut names = Taken::new("policy");
    for (index, entry) in shape.policies.into_iter().enumerate() {
        let here = Here::new("policies", index, &entry);
        let policy = entry.value.into_policy();
        names.take(policy.key.clone(), &here, ".name", here.place)?;
        state.policies.push(Arc::new(policy));
    }
    let mut pods = Taken::new("pod");
    let mut namespaces = Taken::new("network namespace");
    for (index, entry) in shape.pods.into_iter().enumerate() {
        let here = Here::new("pods", index, &entry);
        let pod = entry.value.into_pod().map_err(|fault| here.fault(fault))?;
        pods.take(pod.pod.to_string(), &here, ".name", here.place)?;
        let netns = pod.netns.display().to_string();
        namespaces.take(netns, &here, ".netns", here.place)?;
        state.pods.push(pod);
    }
    Ok(state)
}

/// An entry of one of the lists.
#[derive(Clone)]
struct Here {
    field: String,
    place: Location,
}

impl Here {
    fn new<T>(list: &str, index: usize, entry: &Spanned<T>) -> Self {
        Self {
            field: format!("{list}[{index}]"),
            place: entry.referenced,
        }
    }

    fn fault(&self, (key, reason): (&'static str, String)) -> Fault {
        Fault {
            place: self.place,
            field: format!("{}.{key}", self.field),
            reason,
        }
    }
}

/// Keys that only one entry may have.
struct Taken<K> {
    what: &'static str,
    by: HashMap<K, Here>,
}

impl<K: Hash + Eq + std::fmt::Display> Taken<K> {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            by: HashMap::new(),
        }
    }

    fn take(&mut self, key: K, here: &Here, field: &str, place: Location) -> Result<(), Fault> {
        match self.by.entry(key) {
            Entry::Vacant(free) => {
                free.insert(here.clone());
                Ok(())
            }
            Entry::Occupied(taken) => Err(Fault {
                place,
                field: format!("{}{field}", here.field),
                reason: format!(
                    "{} {} is already that of {} in line {}",
                    self.what,
                    taken.key(),
                    taken.get().field,
                    taken.get().place.line()
                ),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
