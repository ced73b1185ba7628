//! The node's side of capture: takes the pin directory, loads or adopts what is pinned there, gives
//! the handle through which pods are enrolled. It never leaves a moment in which an enrolled pod is
//! not captured.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        CgroupSockAddr, CgroupSockopt, Program, ProgramError, ProgramFd, SkLookup, links::FdLink,
    },
};
use ebpf_abi::{ABI_VERSION, MAX_WORKERS, program};

use super::{
    Count, Error, Netns, NetnsCookie, PodCapture, PodSettings, WorkerListeners,
    maps::{self, NODE_MAPS, NodeMaps, POD_MAPS, PodMaps},
    owner::Claim,
    pins::{self, Generation},
    preflight,
    questions::Resolvers,
    sys::{self, CgroupHook},
};

/// What capture must know of this node process.
#[derive(Clone, Debug)]
pub struct Params {
    /// Where programs, maps and links are pinned: a directory in a bpf file system, one per node
    /// process of a kernel.
    pub pin_dir: PathBuf,
    /// How many workers will accept; each gets its own listeners in every pod.
    pub workers: usize,
    /// Whether pods find a SOCKS5 proxy on their loopback device.
    pub socks5: bool,
    /// The mark of our sockets that leave pods, so that rules of others in the pod, such as those of
    /// istio-cni, let them through. Nothing of ours goes by it.
    pub mark: Option<u32>,
    /// Whether questions to resolvers are captured in any pod.
    pub dns: bool,
}

/// The kernel side of this node process. Dropping it changes nothing: pods stay captured.
#[derive(Clone, Debug)]
pub struct Capture {
    pub(super) node: Arc<Node>,
}

impl Capture {
    /// Adopts what is pinned, or loads it. What an incompatible binary pinned is replaced, with
    /// every pod in it captured throughout.
    ///
    /// # Errors
    /// A process of another node serves the directory, or the kernel refuses a program, a map, a link
    /// or a pin.
    pub fn start(params: &Params) -> Result<Self, Error> {
        let workers = u32::try_from(params.workers)
            .ok()
            .filter(|workers| (1..=MAX_WORKERS).contains(workers))
            .ok_or(Error::Workers {
                workers: params.workers,
                max: MAX_WORKERS,
            })?;
        preflight::mount_bpffs(&params.pin_dir)?;
        fs::create_dir_all(&params.pin_dir).map_err(Error::pin(&params.pin_dir))?;
        let claim = Claim::serve(&params.pin_dir)?;
        pins::clean(&params.pin_dir)?;
        let found = pins::generations(&params.pin_dir)?;
        let mut loader = Loader::new(params.dns);
        let (generation, maps) = match found.first() {
            Some(newest) if adoptable(newest) => loader.adopt(newest)?,
            _ => loader.replace(&params.pin_dir, &found)?,
        };
        for old in found.iter().filter(|old| **old != generation) {
            pins::remove(&old.dir)?;
        }
        let ours = Arc::new(maps::ours(&generation.dir)?);
        let resolvers = match params.dns {
            true => Some(Arc::new(Resolvers::open(&generation.dir)?)),
            false => None,
        };
        let state = State {
            loader,
            maps,
            netns: BTreeMap::new(),
        };
        let node = Arc::new(Node {
            generation,
            workers,
            socks5: params.socks5,
            listeners: params.workers,
            mark: params.mark,
            ours,
            resolvers,
            state: Lock::new(state),
            _claim: claim,
        });
        Ok(Self { node })
    }

    /// The pods that are enrolled, by this process or one before it.
    ///
    /// # Errors
    /// The pins cannot be read.
    pub fn enrolled(&self) -> Result<Vec<NetnsCookie>, Error> {
        self.node.generation.pods()
    }

    /// Captures a pod, or takes it over from the process before: its new connections come to the
    /// listeners returned, one set per worker.
    ///
    /// # Errors
    /// Nothing is left half done: a pod that was not captured before is not captured after.
    pub fn enrol(
        &self,
        netns: &Arc<Netns>,
        settings: &PodSettings,
    ) -> Result<(PodCapture, Vec<WorkerListeners>), Error> {
        PodCapture::enrol(&self.node, netns, settings)
    }

    /// Writes down what a captured pod's node agent calls it, so that a process after this one finds
    /// it by that; a pod that no agent has has no name.
    ///
    /// # Errors
    /// The pod is not captured, or the name holds a zero byte.
    pub fn set_name(&self, cookie: NetnsCookie, uid: Option<&str>) -> Result<(), Error> {
        let pod = self.node.generation.pod(cookie);
        match uid {
            Some(uid) => pins::set_uid(&pod, uid.as_ref()),
            None => pins::remove_uid(&pod),
        }
    }

    /// Whether a captured pod is some node agent's.
    #[must_use]
    pub fn is_named(&self, cookie: NetnsCookie) -> bool {
        pins::uid(&self.node.generation.pod(cookie)).is_some()
    }

    /// The captured pods that a source calls so, enrolled by this process or one before it.
    ///
    /// # Errors
    /// The pins cannot be read.
    pub fn named(&self, uid: &str) -> Result<Vec<NetnsCookie>, Error> {
        let mut pods = self.enrolled()?;
        let generation = &self.node.generation;
        pods.retain(|cookie| pins::uid(&generation.pod(*cookie)).is_some_and(|is| is == uid));
        Ok(pods)
    }

    /// Every counter of the kernel side.
    ///
    /// # Errors
    /// A counter cannot be read.
    pub fn counters(&self) -> Result<Vec<Count>, Error> {
        let mut counts = self.node.lock().maps.counts()?;
        for cookie in self.enrolled()? {
            counts.extend(maps::pod_counts(&self.node.generation.pod(cookie), cookie)?);
        }
        Ok(counts)
    }
}

/// What all handles of this process share.
pub(super) struct Node {
    pub(super) generation: Generation,
    pub(super) workers: u32,
    pub(super) socks5: bool,
    /// The same number, of sets of listeners.
    pub(super) listeners: usize,
    pub(super) mark: Option<u32>,
    pub(super) ours: Arc<OwnedFd>,
    /// None where questions to resolvers are not captured.
    pub(super) resolvers: Option<Arc<Resolvers>>,
    state: Lock,
    _claim: Claim,
}

#[expect(
    clippy::disallowed_types,
    reason = "maps and pins are one kernel state that a call changes step by step, for which no \
              snapshot can stand; no connection's path takes this lock"
)]
type Lock = std::sync::Mutex<State>;

pub(super) struct State {
    pub(super) loader: Loader,
    pub(super) maps: NodeMaps,
    /// The pods that this process enrolled, so that a release finds their namespace.
    pub(super) netns: BTreeMap<NetnsCookie, Arc<Netns>>,
}

impl Node {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Every step leaves the kernel's state valid, so a panic between steps poisons nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("generation", &self.generation)
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

/// Loads programs from the embedded object against pinned maps.
pub(super) struct Loader {
    objects: EbpfLoader<'static>,
    dns: bool,
}

impl Loader {
    fn new(dns: bool) -> Self {
        let mut objects = EbpfLoader::new();
        // Nothing of ours depends on the kernel's own types.
        objects.btf(None);
        Self { objects, dns }
    }

    /// Swaps in this binary's programs over the pinned maps.
    fn adopt(&mut self, found: &Generation) -> Result<(Generation, NodeMaps), Error> {
        tracing::info!(pins = %found.dir.display(), "adopting pinned capture");
        let mut object = self.object(&found.dir, None)?;
        let mut maps = NodeMaps::take(&mut object)?;
        if !self.dns {
            // The process before may have captured DNS; its pods may be enrolled much later.
            maps.release_questions()?;
        }
        self.attach_node(&mut object, std::slice::from_ref(&found.dir), &found.dir)?;
        let adopted = Generation {
            number: found.number,
            abi: found.abi,
            dir: found.dir.clone(),
        };
        Ok((adopted, maps))
    }

    /// Builds a new generation, with every pod of the old ones in it, before the first program is
    /// swapped: from the swap on the new maps decide, and they know every pod.
    fn replace(
        &mut self,
        pin_dir: &Path,
        old: &[Generation],
    ) -> Result<(Generation, NodeMaps), Error> {
        let next = Generation::next(pin_dir, old.first());
        for old in old {
            tracing::warn!(
                pins = %old.dir.display(), abi = old.abi, ours = ABI_VERSION,
                "these pins cannot be adopted; replacing them, pods stay captured"
            );
        }
        let unfinished = Generation {
            dir: pins::unfinished_node(pin_dir),
            ..Generation::next(pin_dir, old.first())
        };
        pins::create(&unfinished.dir)?;
        pins::create(&unfinished.dir.join(pins::PODS))?;
        // The old process may still be draining: the sockets that it tags must stay exempt.
        for shape in [&maps::OURS, &maps::RESOLVERS] {
            if let Some(old) = old.iter().find(|old| shape.is_at(&old.dir)) {
                let pin = unfinished.dir.join(shape.name);
                let map = maps::descriptor(&old.dir, shape.name)?;
                sys::object_pin(map, &pin).map_err(Error::pin(&pin))?;
            }
        }
        let mut object = self.object(&unfinished.dir, None)?;
        let mut maps = NodeMaps::take(&mut object)?;
        for old in old {
            for cookie in old.pods()? {
                self.replace_pod(&unfinished, &mut maps, old, cookie)?;
            }
        }
        let old = old.iter().map(|old| old.dir.clone()).collect::<Vec<_>>();
        self.attach_node(&mut object, &old, &unfinished.dir)?;
        pins::publish(&unfinished.dir, &next.dir)?;
        tracing::info!(pins = %next.dir.display(), "capture loaded");
        Ok((next, maps))
    }

    /// Carries one pod over, closed: its settings are not readable, its listeners gone.
    fn replace_pod(
        &mut self,
        into: &Generation,
        maps: &mut NodeMaps,
        old: &Generation,
        cookie: NetnsCookie,
    ) -> Result<(), Error> {
        let dir = into.pod(cookie);
        let was = old.pod(cookie);
        if dir.exists() || pins::netns_inode(&was).unwrap_or_default() == Some(0) {
            return Ok(());
        }
        let (outbound, inbound) = maps::closed_rules(self.dns)?;
        maps.put_pod(cookie, &outbound)?;
        pins::create(&dir)?;
        let mut object = self.object(&into.dir, Some(&dir))?;
        PodMaps::open(&dir)?.set_rules(&inbound)?;
        if let Some(uid) = pins::uid(&was) {
            pins::set_uid(&dir, &uid)?;
        }
        let program = sk_lookup(&mut object)?;
        let program = program.fd().map_err(Error::program(program::SK_LOOKUP))?;
        let pin = dir.join(pins::LINK);
        match pins::swap(&was.join(pins::LINK), program) {
            Ok(Some(link)) => sys::object_pin(link, &pin).map_err(Error::pin(&pin))?,
            // Its connections stay bound to `lo`; the next enrolment attaches it again.
            Ok(None) => tracing::warn!(%cookie, "the pod's link is gone from its pins"),
            Err(error) => tracing::warn!(%cookie, %error, "the pod's link cannot be carried over"),
        }
        Ok(())
    }

    /// The object with its maps as pinned in these directories; those missing there are created and
    /// pinned. Without a pod's directory the pod's maps are made, and go with the object.
    pub(super) fn object(&mut self, node: &Path, pod: Option<&Path>) -> Result<Ebpf, Error> {
        for shape in &NODE_MAPS {
            self.objects.map_pin_path(shape.name, node.join(shape.name));
        }
        if let Some(pod) = pod {
            for shape in &POD_MAPS {
                self.objects.map_pin_path(shape.name, pod.join(shape.name));
            }
        }
        Ok(self.objects.load(OBJECT)?)
    }

    /// Puts the node's programs on its links pinned in `old`, or on new ones; all are pinned in `dir`
    /// afterwards. The guard comes first: no socket is ever bound to `lo` without it. What shows a
    /// resolver in the place of its stand-in comes before what puts stand-ins there, and goes after it.
    fn attach_node(&self, object: &mut Ebpf, old: &[PathBuf], dir: &Path) -> Result<(), Error> {
        let name = program::SETSOCKOPT;
        let guard: &mut CgroupSockopt = program_of(object, name)?;
        guard.load().map_err(Error::program(name))?;
        let fd = guard.fd().map_err(Error::program(name))?;
        attach_to_root(
            fd,
            name,
            CgroupHook::Setsockopt,
            old,
            &dir.join(pins::SETSOCKOPT),
        )?;
        if self.dns {
            for (name, hook, link) in DNS {
                attach_address(object, name, hook, old, &dir.join(link))?;
            }
        } else {
            // A process before this one may have captured DNS.
            for (_, _, link) in DNS.iter().rev() {
                pins::remove_file(&dir.join(link))?;
            }
        }
        for (name, hook, link) in CONNECT {
            attach_address(object, name, hook, old, &dir.join(link))?;
        }
        Ok(())
    }
}

/// Whether the pins are ours to use as they are. A missing map would be made anew by the loader, and
/// empty: every pod in it would be open.
fn adoptable(generation: &Generation) -> bool {
    generation.abi == ABI_VERSION && NODE_MAPS.iter().all(|shape| shape.is_at(&generation.dir))
}

/// Loads a program that sees addresses, and attaches it.
fn attach_address(
    object: &mut Ebpf,
    name: &'static str,
    hook: CgroupHook,
    old: &[PathBuf],
    pin: &Path,
) -> Result<(), Error> {
    let program: &mut CgroupSockAddr = program_of(object, name)?;
    program.load().map_err(Error::program(name))?;
    let fd = program.fd().map_err(Error::program(name))?;
    attach_to_root(fd, name, hook, old, pin)
}

/// Swaps the program into the first living link of `old` with the name of `pin`, or attaches it
/// anew; either way the link is pinned at `pin` afterwards.
fn attach_to_root(
    program: &ProgramFd,
    name: &'static str,
    hook: CgroupHook,
    old: &[PathBuf],
    pin: &Path,
) -> Result<(), Error> {
    let link = pin.file_name().unwrap_or_default();
    for old in old.iter().map(|dir| dir.join(link)) {
        match pins::swap(&old, program) {
            Ok(Some(_)) if old == pin => return Ok(()),
            Ok(Some(link)) => return sys::object_pin(link, pin).map_err(Error::pin(pin)),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "attaching anew beside it"),
        }
    }
    let root = preflight::cgroup_root()?;
    let root = File::open(&root).map_err(Error::pin(&root))?;
    let link = sys::cgroup_link_create(program, root, hook)
        .map_err(|source| Error::Link { name, source })?;
    // In the place of a dead one, if there is one.
    pins::remove_file(pin)?;
    sys::object_pin(link, pin).map_err(Error::pin(pin))
}

/// Attaches a loaded `sk_lookup` to a pod and pins the link.
pub(super) fn attach_sk_lookup(
    program: &mut SkLookup,
    netns: &Netns,
    pin: &Path,
) -> Result<(), Error> {
    let failed = Error::program(program::SK_LOOKUP);
    let attached = program.attach(netns.file()).map_err(&failed)?;
    let link = program.take_link(attached).map_err(&failed)?;
    pin_link(link.into(), pin)
}

/// The object's `sk_lookup`, loaded.
pub(super) fn sk_lookup(object: &mut Ebpf) -> Result<&mut SkLookup, Error> {
    let program: &mut SkLookup = program_of(object, program::SK_LOOKUP)?;
    program.load().map_err(Error::program(program::SK_LOOKUP))?;
    Ok(program)
}

fn program_of<'a, P>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, Error>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = object
        .program_mut(name)
        .ok_or(Error::ProgramMissing { name })?;
    program.try_into().map_err(Error::program(name))
}

/// Pins a new link in the place of a dead one, if there is one.
fn pin_link(link: FdLink, pin: &Path) -> Result<(), Error> {
    pins::remove_file(pin)?;
    link.pin(pin).map(drop).map_err(|source| Error::PinLink {
        path: pin.to_path_buf(),
        source,
    })
}

type Hook = (&'static str, CgroupHook, &'static str);

const CONNECT: [Hook; 2] = [
    (program::CONNECT4, CgroupHook::Connect4, pins::CONNECT4),
    (program::CONNECT6, CgroupHook::Connect6, pins::CONNECT6),
];

const DNS: [Hook; 6] = [
    (program::RECVMSG4, CgroupHook::Recvmsg4, pins::RECVMSG4),
    (program::RECVMSG6, CgroupHook::Recvmsg6, pins::RECVMSG6),
    (
        program::GETPEERNAME4,
        CgroupHook::Getpeername4,
        pins::GETPEERNAME4,
    ),
    (
        program::GETPEERNAME6,
        CgroupHook::Getpeername6,
        pins::GETPEERNAME6,
    ),
    (program::SENDMSG4, CgroupHook::Sendmsg4, pins::SENDMSG4),
    (program::SENDMSG6, CgroupHook::Sendmsg6, pins::SENDMSG6),
];

/// What `cargo xtask setup` built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ztunnel-ebpf.o"));
