//! Leaving: takes a pod, or a whole pin directory, and undoes what capture did. It never releases a
//! pod by accident: only a caller's order or the death of its namespace does.

use std::{fs, path::Path};

use super::{
    Capture, Error, Netns, NetnsCookie,
    bpf::{Node, State},
    maps::PodMaps,
    owner::Claim,
    pins, route, sys,
};

/// What [`release_all`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Whether there was a directory of pins at all.
    pub found: bool,
    /// Pods whose capture is undone in full.
    pub pods: Vec<NetnsCookie>,
    /// Pods that are no longer captured, but whose rules, routes and sysctl stay: their namespace
    /// lives and no path to it was found.
    pub unreachable: Vec<NetnsCookie>,
}

impl Capture {
    /// Lets go of a pod's namespace and nothing else: the pod stays captured, and so closed, until
    /// its namespace is dead and [`collect`](Self::collect) finds it.
    pub fn abandon(&self, cookie: NetnsCookie) {
        self.node.lock().netns.remove(&cookie);
    }

    /// Undoes the capture of one pod: its new connections go out directly. Connections whose socket
    /// is bound to `lo` already stay so. A pod that is not enrolled is released already.
    ///
    /// # Errors
    /// Something could not be undone; the pod is no longer captured all the same if its entry is
    /// gone.
    pub fn release(&self, cookie: NetnsCookie) -> Result<(), Error> {
        let node = &self.node;
        let mut state = node.lock();
        state.maps.remove_pod(cookie)?;
        let netns = state.netns.remove(&cookie);
        drop(state);
        let reached = release_pod(&node.generation.pod(cookie), netns.as_deref())?;
        tracing::info!(%cookie, reached, "pod released");
        Ok(())
    }

    /// Forgets the pods whose namespace is gone, and names them. A pod that this process enrolled
    /// keeps its namespace alive until it is released.
    ///
    /// # Errors
    /// The pins cannot be read or removed.
    pub fn collect(&self) -> Result<Vec<NetnsCookie>, Error> {
        let node = &self.node;
        let mut state = node.lock();
        let mut collected = Vec::new();
        for cookie in node.generation.pods()? {
            let dir = node.generation.pod(cookie);
            if pins::netns_inode(&dir)? == Some(0) {
                forget(node, &mut state, cookie)?;
                collected.push(cookie);
            }
        }
        // An entry without pins: a crash came between the two steps of a release.
        for cookie in state.maps.pods()? {
            if !node.generation.pod(cookie).exists() {
                forget(node, &mut state, cookie)?;
                collected.push(cookie);
            }
        }
        Ok(collected)
    }
}

/// Undoes everything of the node processes of this pin directory, of any ABI version. What stays:
/// sockets that are bound to `lo` already, and `lo` being up.
///
/// # Errors
/// A process serves the directory, it is not in a bpf file system, or the pins cannot be read or
/// removed.
pub fn release_all(pin_dir: &Path) -> Result<Released, Error> {
    let mut released = Released::default();
    let Some(_claim) = Claim::undo(pin_dir)? else {
        return Ok(released);
    };
    released.found = true;
    let generations = pins::generations(pin_dir)?;
    // First nobody is captured any more, then the rest goes.
    for generation in &generations {
        for link in pins::NODE_LINKS {
            detach(&generation.dir.join(link))?;
        }
    }
    for generation in &generations {
        for cookie in generation.pods()? {
            let reached = release_pod(&generation.pod(cookie), None)?;
            let list = if reached {
                &mut released.pods
            } else {
                &mut released.unreachable
            };
            list.push(cookie);
        }
        pins::remove(&generation.dir)?;
    }
    pins::clean(pin_dir)?;
    pins::remove_owner(pin_dir)?;
    // The directory may be the root of the file system, or hold what is not ours.
    if let Err(error) = fs::remove_dir(pin_dir) {
        tracing::debug!(%error, path = %pin_dir.display(), "the pin directory stays");
    }
    Ok(released)
}

/// Detaches `sk_lookup`, clears the namespace if it lives, and removes the pins. False: it lives but
/// could not be found.
fn release_pod(dir: &Path, netns: Option<&Netns>) -> Result<bool, Error> {
    // An unreadable link is on its way out with its pin.
    let inode = pins::netns_inode(dir).unwrap_or_default().unwrap_or(0);
    // Rules that cannot be read are of another ABI; the sysctls were most likely ours.
    let turned_on = PodMaps::open(dir)
        .and_then(|pod| pod.rules())
        .map_or(u32::MAX, |rules| rules.sysctls_turned_on);
    detach(&dir.join(pins::LINK))?;
    let found = if netns.is_none() && inode != 0 {
        Netns::find(inode)
    } else {
        None
    };
    let netns = netns.or(found.as_ref());
    let cleared = netns.map_or(Ok(()), |netns| route::remove(netns, turned_on));
    // Also when the namespace could not be cleared: pins without a program help nobody.
    pins::remove(dir)?;
    cleared?;
    Ok(netns.is_some() || inode == 0)
}

/// A dead namespace has taken its program, rules and routes along.
fn forget(node: &Node, state: &mut State, cookie: NetnsCookie) -> Result<(), Error> {
    state.maps.remove_pod(cookie)?;
    state.netns.remove(&cookie);
    pins::remove(&node.generation.pod(cookie))?;
    tracing::info!(%cookie, "the pod's network namespace is gone; forgotten");
    Ok(())
}

/// Detaches the link pinned there, whoever still holds it; none is fine, and so is a dead one.
fn detach(pin: &Path) -> Result<(), Error> {
    let Ok(Some(link)) = pins::link(pin) else {
        return Ok(());
    };
    match sys::link_detach(&link) {
        Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => Err(Error::pin(pin)(error)),
        _ => Ok(()),
    }
}
