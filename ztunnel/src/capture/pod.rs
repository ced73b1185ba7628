//! One pod's capture: takes its namespace and settings, gives listeners, a dialer and a way to change
//! the settings. It never captures a connection before somebody can accept it.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aya::programs::loaded_programs;
use ebpf_abi::InboundRules;

use super::{
    Asking, Dialer, Error, Netns, NetnsCookie, PodSettings, WorkerListeners,
    bpf::{self, Node, State},
    dial::Exempt,
    listen::{self, Hearing, Listening},
    maps::{POD_MAPS, PodMaps},
    pins,
    questions::Meant,
    route,
    settings::StandIns,
    sys,
    watch::Watch,
};

/// A pod that this process captures. Dropping it changes nothing; [`super::Capture::release`] does.
#[derive(Clone, Debug)]
pub struct PodCapture {
    node: Arc<Node>,
    netns: Arc<Netns>,
    watch: Watch,
    asking: Asking,
    dns_port: u16,
    /// Whether the pod's `lo` speaks IPv6, as it was last seen. Changed under the node's lock.
    v6: Arc<AtomicBool>,
    ports_displaced: bool,
}

impl PodCapture {
    /// Everything that a captured connection meets comes first, the entry that captures last.
    pub(super) fn enrol(
        node: &Arc<Node>,
        netns: &Arc<Netns>,
        settings: &PodSettings,
    ) -> Result<(Self, Vec<WorkerListeners>), Error> {
        // Before anything is changed: whether they fit.
        settings.outbound(StandIns::default())?;
        let cookie = netns.cookie();
        let mut state = node.lock();
        let dir = node.generation.pod(cookie);
        let known = dir.exists();
        refuse_taken(netns, &dir)?;
        let watch = Watch::open(netns)?;
        let installed = route::install(netns, node.resolvers.is_some())?;
        let turned_on = installed.turned_on;
        watch.forget();
        let asking = Asking::new(settings.dns);
        let hearing = node.resolvers.as_ref().map(|resolvers| Hearing {
            meant: Meant::StoodFor(Arc::clone(resolvers), cookie),
            asking: asking.clone(),
        });
        let steered = Listening::Steered { ours: &node.ours };
        let opened = listen::open(
            netns,
            node.listeners,
            node.socks5,
            steered,
            hearing.as_ref(),
        )?;
        let stand_ins = StandIns {
            port: opened.dns_port,
            v6: installed.v6,
        };
        let outbound = settings.outbound(stand_ins)?;
        let base = InboundRules {
            workers: node.workers,
            sysctls_turned_on: turned_on,
            ..InboundRules::default()
        };
        let entry = Entry {
            node,
            netns,
            settings,
            stand_ins,
        };
        let prepared = if known && POD_MAPS.iter().all(|shape| shape.is_at(&dir)) {
            entry.take_over(&mut state, &base, &opened.workers)
        } else {
            entry.publish(&mut state, &base, &opened.workers)
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
        let ports_displaced = opened.displaced;
        tracing::info!(%cookie, adopted = known, ports_displaced, "pod captured");
        let pod = Self {
            node: Arc::clone(node),
            netns: Arc::clone(netns),
            watch,
            asking,
            dns_port: stand_ins.port,
            v6: Arc::new(AtomicBool::new(stand_ins.v6)),
            ports_displaced,
        };
        Ok((pod, opened.workers))
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
        let cookie = self.cookie();
        let mut state = self.node.lock();
        let stand_ins = StandIns {
            port: self.dns_port,
            v6: self.v6.load(Ordering::Relaxed),
        };
        let outbound = settings.outbound(stand_ins)?;
        if !state.netns.contains_key(&cookie) {
            return Err(Error::NotEnrolled { cookie });
        }
        let mut pod = PodMaps::open(&self.node.generation.pod(cookie))?;
        let inbound = settings.inbound(&pod.rules()?, cookie, stand_ins)?;
        pod.set_rules(&inbound)?;
        state.maps.replace_cidrs(cookie, &settings.cidrs(cookie))?;
        state.maps.put_pod(cookie, &outbound)?;
        self.asking.set(settings.dns);
        Ok(())
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
        let installed = route::install(&self.netns, self.node.resolvers.is_some())?;
        self.watch.forget();
        // IPv6 may have come to the pod's `lo`, or gone.
        if self.v6.load(Ordering::Relaxed) != installed.v6 {
            let mut state = self.node.lock();
            state.maps.set_dns_v6(self.cookie(), installed.v6)?;
            self.v6.store(installed.v6, Ordering::Relaxed);
        }
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
    stand_ins: StandIns,
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
        let base = InboundRules {
            sysctls_turned_on: before.sysctls_turned_on | base.sysctls_turned_on,
            ..*base
        };
        let rules = self
            .settings
            .inbound(&base, self.netns.cookie(), self.stand_ins)?;
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
        pod.set_rules(
            &self
                .settings
                .inbound(base, self.netns.cookie(), self.stand_ins)?,
        )?;
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
