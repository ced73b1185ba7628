//! One pod's capture: takes its namespace and settings, gives listeners, a dialer and a way to change
//! the settings. It never captures a connection before somebody can accept it.

use std::{path::Path, sync::Arc};

use aya::programs::loaded_programs;
use ebpf_abi::InboundRules;

use super::{
    Dialer, Error, Netns, NetnsCookie, PodSettings, WorkerListeners,
    bpf::{self, Node, State},
    dial::Exempt,
    listen::{self, Listening},
    maps::{POD_MAPS, PodMaps},
    pins, route, sys,
    watch::Watch,
};

/// A pod that this process captures. Dropping it changes nothing; [`super::Capture::release`] does.
#[derive(Clone, Debug)]
pub struct PodCapture {
    node: Arc<Node>,
    netns: Arc<Netns>,
    watch: Watch,
    ports_displaced: bool,
}

impl PodCapture {
    /// Everything that a captured connection meets comes first, the entry that captures last.
    pub(super) fn enrol(
        node: &Arc<Node>,
        netns: &Arc<Netns>,
        settings: &PodSettings,
    ) -> Result<(Self, Vec<WorkerListeners>), Error> {
        let outbound = settings.outbound()?;
        let cookie = netns.cookie();
        let mut state = node.lock();
        let dir = node.generation.pod(cookie);
        let known = dir.exists();
        refuse_taken(netns, &dir)?;
        let watch = Watch::open(netns)?;
        let turned_on = route::install(netns)?.turned_on;
        watch.forget();
        let (listeners, ports_displaced) =
            listen::open(netns, node.listeners, node.socks5, Listening::Steered)?;
        let base = InboundRules {
            workers: node.workers,
            sysctls_turned_on: turned_on,
            ..InboundRules::default()
        };
        let entry = Entry {
            node,
            netns,
            settings,
        };
        let prepared = if known && POD_MAPS.iter().all(|shape| shape.is_at(&dir)) {
            entry.take_over(&mut state, &base, &listeners)
        } else {
            entry.publish(&mut state, &base, &listeners)
        };
        let captured = prepared
            .and_then(|()| state.maps.replace_cidrs(cookie, &settings.cidrs(cookie)))
            .and_then(|()| state.maps.put_pod(cookie, &outbound));
        if let Err(error) = captured {
            // A pod that was captured before stays so, with whatever settings arrived.
            if !known {
                undo(node, &mut state, netns, turned_on);
            }
            return Err(error);
        }
        state.netns.insert(cookie, Arc::clone(netns));
        drop(state);
        tracing::info!(%cookie, adopted = known, ports_displaced, "pod captured");
        let pod = Self {
            node: Arc::clone(node),
            netns: Arc::clone(netns),
            watch,
            ports_displaced,
        };
        Ok((pod, listeners))
    }

    /// The pod's namespace, as the kernel side knows it.
    pub fn cookie(&self) -> NetnsCookie {
        self.netns.cookie()
    }

    /// Whether the application holds one of our usual ports, so that we listen on another. Capture
    /// does not depend on ports.
    pub const fn ports_displaced(&self) -> bool {
        self.ports_displaced
    }

    /// Changes the settings; connections that are open keep theirs. Take a new dialer if the
    /// addresses changed.
    ///
    /// # Errors
    /// The settings do not fit, or the pod was released.
    pub fn update(&self, settings: &PodSettings) -> Result<(), Error> {
        let outbound = settings.outbound()?;
        let cookie = self.cookie();
        let mut state = self.node.lock();
        if !state.netns.contains_key(&cookie) {
            return Err(Error::NotEnrolled { cookie });
        }
        let mut pod = PodMaps::open(&self.node.generation.pod(cookie))?;
        let inbound = settings.inbound(&pod.rules()?)?;
        pod.set_rules(&inbound)?;
        state.maps.replace_cidrs(cookie, &settings.cidrs(cookie))?;
        state.maps.put_pod(cookie, &outbound)
    }

    /// Looks whether the pod has changed what capture needs in its namespace, and puts back what is
    /// missing. True if something was. Without it the pod's connections fail; none leaves.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel refuses a rule, a route or a sysctl.
    pub fn repair(&self) -> Result<bool, Error> {
        if !self.watch.is_disturbed(&self.netns)? {
            return Ok(false);
        }
        let installed = route::install(&self.netns)?;
        self.watch.forget();
        Ok(installed.was_missing)
    }

    /// Makes sockets in the pod, which has these settings.
    pub fn dialer(&self, settings: &PodSettings) -> Dialer {
        Dialer::new(
            Arc::clone(&self.netns),
            Exempt::ByTag(Arc::clone(&self.node.ours)),
            self.node.mark,
            settings.own_addresses(),
        )
    }
}

// PROTOCOL.md#pod-taken
/// Two node processes in one pod would take turns: the last one attached wins, and a release of either
/// opens the pod. Programs of others are no matter: ours overrules them. It does not wait: the kernel
/// detaches a link some time after its last pin went, and whoever is refused for that asks again.
fn refuse_taken(netns: &Netns, dir: &Path) -> Result<(), Error> {
    let own = pins::link(&dir.join(pins::LINK))?.and_then(|link| sys::link_program(link).ok());
    let attached = sys::netns_sk_lookups(netns.file()).map_err(Error::NetnsPrograms)?;
    let mut others = attached.into_iter().filter(|id| Some(*id) != own);
    if others.any(is_ztunnel) {
        return Err(Error::PodTaken);
    }
    Ok(())
}

/// Whether a program that is loaded has the name of ours. A search, for there is no way by number.
fn is_ztunnel(id: u32) -> bool {
    loaded_programs().filter_map(Result::ok).any(|program| {
        program.id() == id && program.name_as_str() == Some(ebpf_abi::program::SK_LOOKUP)
    })
}

/// A pod's directory in the making.
struct Entry<'a> {
    node: &'a Node,
    netns: &'a Netns,
    settings: &'a PodSettings,
}

impl Entry<'_> {
    /// Replaces the listeners and the program of the process before; there is always one of each.
    fn take_over(
        &self,
        state: &mut State,
        base: &InboundRules,
        listeners: &[WorkerListeners],
    ) -> Result<(), Error> {
        let generation = &self.node.generation;
        let dir = generation.pod(self.netns.cookie());
        let mut pod = PodMaps::open(&dir)?;
        let before = pod.rules()?;
        let rules = self.settings.inbound(&InboundRules {
            sysctls_turned_on: before.sysctls_turned_on | base.sysctls_turned_on,
            ..*base
        })?;
        pod.put_listeners(listeners)?;
        pod.set_rules(&rules)?;
        pod.clear_listeners(base.workers)?;
        let mut object = state.loader.object(&generation.dir, Some(&dir))?;
        swap_or_attach(&mut object, self.netns, &dir, &dir)
    }

    /// Builds the pod's directory aside and gives it its name when it is complete. One that is there
    /// already lacks a map; its link is carried over.
    fn publish(
        &self,
        state: &mut State,
        base: &InboundRules,
        listeners: &[WorkerListeners],
    ) -> Result<(), Error> {
        let generation = &self.node.generation;
        let dir = generation.pod(self.netns.cookie());
        let unfinished = generation.unfinished_pod(self.netns.cookie());
        pins::create(&unfinished)?;
        let mut object = state.loader.object(&generation.dir, Some(&unfinished))?;
        let mut pod = PodMaps::open(&unfinished)?;
        pod.put_listeners(listeners)?;
        pod.set_rules(&self.settings.inbound(base)?)?;
        swap_or_attach(&mut object, self.netns, &dir, &unfinished)?;
        pins::remove(&dir)?;
        pins::publish(&unfinished, &dir)
    }
}

/// Puts the program on the link pinned in `old`, or on a new one, and the link's pin in `dir`.
fn swap_or_attach(
    object: &mut aya::Ebpf,
    netns: &Netns,
    old: &Path,
    dir: &Path,
) -> Result<(), Error> {
    let pin = dir.join(pins::LINK);
    let program = bpf::sk_lookup(object)?;
    let fd = program
        .fd()
        .map_err(Error::program(ebpf_abi::program::SK_LOOKUP))?;
    match pins::swap(&old.join(pins::LINK), fd)? {
        Some(_) if old == dir => Ok(()),
        Some(link) => sys::object_pin(link, &pin).map_err(Error::pin(&pin)),
        None => bpf::attach_sk_lookup(program, netns, &pin),
    }
}

/// Takes back a first enrolment that failed; what cannot be taken back is logged, the error that
/// caused it is what the caller sees.
fn undo(node: &Node, state: &mut State, netns: &Netns, turned_on: u32) {
    let cookie = netns.cookie();
    let steps = [
        state.maps.remove_pod(cookie),
        pins::remove(&node.generation.pod(cookie)),
        pins::remove(&node.generation.unfinished_pod(cookie)),
        route::remove(netns, turned_on),
    ];
    for error in steps.into_iter().filter_map(Result::err) {
        tracing::warn!(%cookie, %error, "cannot take back a failed enrolment");
    }
}
